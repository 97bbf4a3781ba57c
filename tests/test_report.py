"""The report: its three files say what the data say, stand alone, and believe nothing that a file says."""

import base64
import hashlib
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import yaml

from cnq.corpus import Source, Used, chunks
from cnq.engine.quantizer import Outcome
from cnq.errors import OutputExists
from cnq.evaluate import Measured, evaluate
from cnq.imatrix import collect
from cnq.machine import Machine
from cnq.paired import Interval, Paired
from cnq.quantize import quantize
from cnq.report import Compensation, Report, Subject, write_report
from cnq.report.card import MARKER
from cnq.report.data import KLD_BOUND, choose, number, with_error
from cnq.report.words import SCRIPT, TERMS
from cnq.scores import Estimate
from cnq.speed import Speed

TYPES = ("Q8_0", "Q4_K_M")
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def report(wide_gguf, tmp_path_factory) -> Report:
    """Of two real quantizations, measured on a few chunks."""
    folder = tmp_path_factory.mktemp("report")
    source = Source("sentences", hashlib.sha256(b"sentences").hexdigest(), tuple(tiny.SENTENCES * 6))

    def text(split):
        return lambda m: chunks([source], lambda t: m.tokenize(t, add_special=True, parse_special=False), 64, 6, split)

    calibration = collect(wide_gguf, text("calibration"), folder / "imatrix.gguf", n_ctx=64)
    files = [quantize(wide_gguf, folder / f"tiny-{t}.gguf", t, imatrix=calibration.path).path for t in TYPES]
    found = evaluate(files, text("held-out"), base=wide_gguf, n_ctx=64)
    timed = Speed(prefill=1234.5, decode=56.78, ram=123_456_789, n_prompt=512, n_gen=32, threads=2)
    return Report(
        title="Tiny 小模型",
        base=Subject(wide_gguf, "F16", False, found.base, replace(timed, decode=34.56)),
        subjects=tuple(Subject(m.path, t, t != "Q8_0", m, timed) for m, t in zip(found.models, TYPES, strict=True)),
        n_ctx=found.n_ctx,
        n_chunks=found.n_chunks,
        n_scored=found.n_scored,
        held_out=found.manifest,
        calibration=calibration.manifest,
        imatrix=calibration.path,
        format="alpaca",
        licence="apache-2.0",
        source="owner/tiny-model",
        versions={"cnq": "0.1.0", "llama-cpp-python": "0.3.36"},
        machine=Machine("Some CPU", 2, 8_000_000_000),
        seconds={"convert": 1.5, "quantize": 2.25},
        commands=("cnq quantize a.gguf b.gguf -t Q4_K_M",),
        languages=("zh", "en"),
    )


class Page(HTMLParser):
    """tags: (name, attributes) in order. rows: the text of each table row's cells. text: all of it but style and script."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.handle_data(" ")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data
            if "td" in self._open or "th" in self._open:
                self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    return write_report(report, tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def html(written) -> str:
    return written.html.read_text(encoding="utf-8")


def front_matter(card: Path) -> dict:
    _, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front)


# report.json


def test_json_has_the_numbers_of_the_data(report, written):
    """All of them, to the last digit; not the arrays of single tokens."""
    found = json.loads(written.json.read_text(encoding="utf-8"))
    for subject, entry in zip([*report.subjects, report.base], [*found["files"], found["base"]], strict=True):
        m = subject.measured
        assert entry["file"] == subject.path.name
        assert (entry["type"], entry["imatrix"]) == (subject.type, subject.imatrix)
        assert (entry["nbytes"], entry["bits_per_weight"]) == (subject.path.stat().st_size, m.bits_per_weight)
        assert entry["speed"] == asdict(subject.speed)
        assert entry["measured"]["ppl"] == asdict(m.ppl)
        assert entry["measured"]["bits_per_byte"] == m.bits_per_byte
        assert "klds" not in entry["measured"]
        if m.against:
            expected = asdict(m.against)
            for name in ("kld_percentiles", "dp_percentiles"):
                expected[name] = {f"{percent:g}": value for percent, value in expected[name].items()}
            assert entry["measured"]["against"] == expected
    assert found["evaluation"]["held_out"] == [asdict(u) for u in report.held_out]
    assert found["calibration"] == [asdict(u) for u in report.calibration]
    assert found["evaluation"]["n_scored"] == report.n_scored
    assert found["imatrix"]["n_chunks"] == 6
    assert (found["versions"], found["seconds"]) == (report.versions, report.seconds)
    assert "小模型" in written.json.read_text(encoding="utf-8")


def test_json_counts_every_tensor(report, written):
    found = json.loads(written.json.read_text(encoding="utf-8"))
    for subject, entry in zip(report.subjects, found["files"], strict=True):
        assert sum(t["tensors"] for t in entry["tensor_types"].values()) == len(subject.file.tensors)
        assert sum(t["nbytes"] for t in entry["tensor_types"].values()) < entry["nbytes"]


def test_what_is_no_number_is_null(report, tmp_path):
    subject = report.subjects[0]
    broken = replace(subject, measured=replace(subject.measured, ppl=Estimate(float("inf"), float("nan"))))
    found = write_report(replace(report, subjects=(broken,)), tmp_path)
    entry = json.loads(found.json.read_text(encoding="utf-8"), parse_constant=pytest.fail)["files"][0]
    assert entry["measured"]["ppl"] == {"value": None, "error": None}


# report.html


def test_the_table_shows_every_figure(report, html):
    """Each cell, read back, is its number of the data within half a unit of the last digit shown."""
    table = {row[0]: row for row in Page(html).rows if row[0].endswith(".gguf")}
    assert list(table) == [report.subjects[1].path.name, report.subjects[0].path.name, report.base.path.name]

    def shows(text: str, value: float) -> bool:
        places = len(text.partition(".")[2])
        return abs(float(text) - value) <= 0.5001 * 10**-places

    for subject in (*report.subjects, report.base):
        m, a = subject.measured, subject.measured.against
        _, kind, size, bpw, ppl, ratio, bpb, kld, median, high, top, dp, decode, prefill, ram = table[subject.path.name]
        assert kind == subject.type + ("-im" if subject.imatrix else "")
        number_, unit = size.split()
        assert shows(number_, subject.path.stat().st_size / {"kB": 1e3, "MB": 1e6}[unit])
        pairs = [(bpw, m.bits_per_weight), (bpb, m.bits_per_byte), (decode, subject.speed.decode), (prefill, 1234.5)]
        both = [(ppl, m.ppl)]
        if a:
            pairs += [(median, a.kld_percentiles[50]), (high, a.kld_percentiles[99])]
            both += [(ratio, a.ratio), (kld, a.kld), (top, a.same_top), (dp, a.dp_rms)]
        else:
            assert {ratio, kld, median, high, top, dp} == {"–"}
        for text, estimate in both:
            value, error = text.split(" ± ")
            pairs += [(value, estimate.value), (error, estimate.error)]
        assert not [(text, value) for text, value in pairs if not shows(text, value)]
        assert ram == "123.5 MB"


def test_the_page_needs_nothing_else(html):
    """No network, no other file: every reference stays on the page, or is the JSON beside it."""
    references = [
        value
        for _, attrs in Page(html).tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster", "formaction")
    ]
    assert references
    assert {r for r in references if not r.startswith("#")} == {"report.json"}
    assert set(re.findall(r"url\(.", html)) <= {"url(#"}
    assert "@import" not in html
    assert "http:" not in html
    assert "https:" not in html
    ids = [attrs["id"] for _, attrs in Page(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {r[1:] for r in references if r.startswith("#")} <= set(ids)


def test_both_languages_say_as_much(html):
    tags = [attrs for _, attrs in Page(html).tags]
    zh, en = (sum(attrs.get("lang") == lang for attrs in tags) for lang in ("zh", "en"))
    assert zh == en > 50
    text = Page(html).text
    for term in TERMS:
        assert term.zh[1] in text
        assert term.en[1] in text
    for head in ("哪一层用了什么类型", "Which layer got which type", "每个数字的来历", "How every figure was made"):
        assert head in text


def test_without_scripts_nothing_is_hidden(html):
    """The style hides a language only where the script has chosen one."""
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    hiding = [rule for rule in style.split("}") if "display: none" in rule]
    assert all("data-lang" in rule or "@media print" in rule for rule in hiding)
    assert "data-lang" not in re.search(r"<html[^>]*>", html)[0]


def test_the_only_script_is_the_one_the_policy_names(html):
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert scripts == [SCRIPT]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in Page(html).tags if tag == "meta" and "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_pictures_are_whole_and_name_every_matrix(report, html):
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(pictures) == 1 + len(report.subjects) + 1  # sizes, types of each file, importance
    assert "DejaVu" not in html
    titles = [[t.text for t in picture.iter("title")] for picture in pictures]
    assert not titles[0]
    for subject, found in zip(report.by_size[::-1], titles[1:-1], strict=True):  # the one advised is first
        expected = {f"{t.name}: {t.type.name}" for t in subject.file.tensors.values() if len(t.shape) == 2}
        assert {t.rpartition(",")[0] for t in found} == expected
    assert len(titles[-1]) == 14  # 7 matrices in each of 2 layers
    labels = "".join(t.text for t in pictures[0].iter("text"))
    assert "Q8_0" in labels
    assert "Q4_K_M-im" in labels


def test_the_manifest_the_machine_and_the_commands_are_told(report, html):
    text = Page(html).text
    assert report.held_out[0].sha256 in text
    assert "Some CPU" in text
    assert "llama-cpp-python 0.3.36" in text
    assert report.commands[0] in text


def test_the_same_data_give_the_same_bytes(report, written, tmp_path):
    again = write_report(report, tmp_path)
    for name in ("html", "json", "card"):
        assert getattr(again, name).read_bytes() == getattr(written, name).read_bytes()


# Advice


def compensated(report: Report, name: str = "blk.0.attn_q.weight") -> Report:
    """The report with made-up outcomes of compensation in its last file, and one comparison."""
    outcomes = [
        Outcome(f"blk.{i}.{role}.weight", None, "Q4_K", None, 2.0 * (i + 1), 1.0 * (i + 1), True, 0.1, False)
        for i in range(2)
        for role in ("attn_q", "ffn_down")
    ]
    outcomes.append(Outcome("output.weight", None, "Q6_K", None, 3.0, 3.0, False, 0.1, False))
    outcomes.append(Outcome(name, 3, "Q4_K", "12 tokens, and 3 to judge by, are too few"))
    paired = Paired(0.2, 0.12, Interval(0.6, 0.55, 0.66), 0.1, 0.07, Interval(0.7, 0.6, 0.8), 70.0, 75.5,
                    Interval(5.5, 4.5, 6.5), 9, 10)  # fmt: skip
    path = report.subjects[-1].path
    return replace(report, compensations=(Compensation(path, tuple(outcomes), ((report.held_out[0], paired),)),))


def test_compensation_is_told_with_intervals_and_a_picture(report, tmp_path):
    written = write_report(compensated(report), tmp_path)
    page = written.html.read_text()
    assert "0.600 [0.550, 0.660]" in page
    assert "+5.5 [+4.5, +6.5]" in page
    assert "4 of 6 matrices have compensated codes" in page
    assert "6 个矩阵里有 4 个采用了互补的编码" in page
    assert "blk.0.attn_q 3" in page
    assert 'aria-label="error by layer of' in page
    (found,) = json.loads(written.json.read_text())["compensation"]
    assert [m["kept"] for m in found["matrices"]] == [True] * 4 + [False] * 2
    assert found["compared_with_plain"][0]["kld"] == {"value": 0.6, "low": 0.55, "high": 0.66}
    assert "× 0.60 (95 %: 0.55–0.66)" in written.card.read_text()
    assert written.html.read_bytes() == write_report(compensated(report), tmp_path).html.read_bytes()
    assert "Rounding that compensates" not in write_report(report, tmp_path).html.read_text()


def test_hostile_names_of_matrices_are_text(report, tmp_path):
    page = write_report(compensated(report, "<script>alert(1)</script>"), tmp_path).html.read_text()
    assert "<script>alert" not in page


def klded(report: Report, *klds: tuple[float, float]) -> Report:
    """The report with other KLDs, (value, error) of each subject; the first subject is the larger file."""
    changed = []
    for s, (value, error) in zip(report.subjects, klds, strict=True):
        against = replace(s.measured.against, kld=Estimate(value, error))
        changed.append(replace(s, measured=replace(s.measured, against=against)))
    return replace(report, subjects=tuple(changed))


@pytest.mark.parametrize(
    ("klds", "index", "within"),
    [
        (((0.001, 0.0001), (0.03, 0.002)), 1, True),  # the smaller one will do
        (((0.001, 0.0001), (0.045, 0.004)), 0, True),  # within by its mean, but not by twice its error
        (((0.2, 0.01), (0.3, 0.01)), 0, False),  # neither: the closest
        (((0.001, 0.0001), (float("nan"), 0.1)), 0, True),
    ],
)
def test_the_smallest_file_within_the_bound_is_advised(report, klds, index, within, tmp_path):
    changed = klded(report, *klds)
    choice = choose(changed)
    assert choice.subject is changed.subjects[index]
    assert choice.within == within
    written = write_report(changed, tmp_path)
    first = Page(written.html.read_text(encoding="utf-8")).text.split("规则")[0]
    assert choice.subject.path.name in first
    assert ("请取" in first and "Take" in first) == within
    assert str(KLD_BOUND) in written.html.read_text(encoding="utf-8")
    advice = json.loads(written.json.read_text(encoding="utf-8"))["advice"]
    assert advice == {"kld_bound": KLD_BOUND, "file": choice.subject.path.name, "within": within}


def test_without_measurements_there_is_a_report_and_no_advice(report, tmp_path):
    bare = [replace(s, measured=None, speed=None) for s in (*report.subjects, report.base)]
    unknown = replace(
        report, subjects=tuple(bare[:-1]), base=bare[-1], n_ctx=0, n_chunks=0, n_scored=0, held_out=(), calibration=(),
        imatrix=None, licence=None, source=None, format=None, versions={}, seconds={}, commands=(), languages=(),
    )  # fmt: skip
    written = write_report(unknown, tmp_path)
    page = Page(written.html.read_text(encoding="utf-8"))
    assert "cnq evaluate" in page.text
    assert all(row[4:] == ["–"] * 11 for row in page.rows if row[0].endswith(".gguf"))
    assert json.loads(written.json.read_text(encoding="utf-8"))["advice"] is None
    assert front_matter(written.card).keys() == {"pipeline_tag", "tags", "quantized_by"}


def test_measuring_on_the_calibration_text_is_told(report, tmp_path, html):
    assert "flatters" not in html
    flattered = replace(report, held_out=report.calibration)
    assert "flatters" in write_report(flattered, tmp_path).html.read_text(encoding="utf-8")


# The model card


def test_the_front_matter_is_what_the_hub_reads(written):
    assert written.card.name == "README.md"
    assert front_matter(written.card) == {
        "license": "apache-2.0",
        "language": ["zh", "en"],
        "base_model": "owner/tiny-model",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "imatrix"],
        "quantized_by": "cnq",
    }
    assert written.card.read_text(encoding="utf-8").splitlines()[:2] == ["---", MARKER]


def test_a_path_is_no_base_model(report, tmp_path):
    card = write_report(replace(report, source="/home/someone/my-model"), tmp_path).card
    assert "base_model" not in front_matter(card)


def test_a_readme_of_the_user_is_kept(report, tmp_path):
    mine = tmp_path / "README.md"
    mine.write_text("---\nlicense: mit\n---\n# My own\n")
    written = write_report(report, tmp_path)
    assert mine.read_text() == "---\nlicense: mit\n---\n# My own\n"
    assert written.card == tmp_path / "MODEL_CARD.md"
    assert front_matter(written.card)["quantized_by"] == "cnq"


def test_a_readme_of_cnq_is_replaced(report, tmp_path):
    first = write_report(replace(report, title="Old"), tmp_path)
    second = write_report(report, tmp_path)
    assert first == second
    assert "Old" not in second.card.read_text(encoding="utf-8")
    second.card.write_bytes(second.card.read_bytes().replace(b"\n", b"\r\n"))  # git on Windows does so
    assert write_report(report, tmp_path).card == second.card


def test_when_both_names_are_taken_nothing_is_written(report, tmp_path):
    for name in ("README.md", "MODEL_CARD.md"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputExists, match="README"):
        write_report(report, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "MODEL_CARD.md"}


# Hostile files


EVIL = "</title><script>alert(1)</script><img src=x onerror=\"alert(2)\">\n\x1b[31m---\n| `$\\frac{` & 'x' [a](javascript:b)"


def evil_gguf(path: Path) -> Path:
    """Matrices with names that are markup, a formula, and a layer number that would make a picture of any width."""
    import gguf as lib

    writer = lib.GGUFWriter(path, "llama")
    names = ["<script>alert(3)</script>", "$\\frac{", "]]>--><!--", "attn_q", "词", "\x07\x1b[2J"]
    for layer in (0, 999_999):
        for name in names:
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros((2, 32), np.float32))
    for i in range(60):
        writer.add_tensor(f"blk.1.role{i}.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_names_in_files_stay_text(report, tmp_path):
    path = evil_gguf(tmp_path / "<img src=x onerror=alert(4)>&\"'|`$.gguf")
    used = Used(EVIL, EVIL, EVIL, 1, 2, 3, 4)
    measured = replace(report.subjects[0].measured, path=path)
    evil = replace(
        report, title=EVIL, base=Subject(path, EVIL, False, None, None), subjects=(Subject(path, EVIL, True, measured, None),),
        held_out=(used,), calibration=(used,), imatrix=None, format=EVIL, licence=EVIL, source=EVIL, versions={EVIL: EVIL},
        machine=Machine(EVIL, 1, 1), seconds={EVIL: 1.0}, commands=(EVIL,), languages=(EVIL,),
    )  # fmt: skip
    written = write_report(evil, tmp_path / "out")
    html = written.html.read_text(encoding="utf-8")
    page = Page(html)
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script"]
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "alert(1)</script>" in page.text
    assert "first 32 of" in page.text
    assert "\x1b" not in html + written.card.read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    front = front_matter(written.card)
    assert set(front) == {"license", "language", "pipeline_tag", "tags", "quantized_by"}
    assert front["license"].startswith("</title><script>")
    body = written.card.read_text(encoding="utf-8").split("---\n", 2)[2]
    outside = re.sub(r"```sh\n.*?```", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    assert json.loads(written.json.read_text(encoding="utf-8"))["title"] == EVIL


def test_a_file_name_that_is_no_text_is_still_reported(report, tmp_path):
    path = tmp_path / "name-\udcff.gguf"  # a byte that is no UTF-8, as Python shows it
    path.write_bytes(report.subjects[0].path.read_bytes())
    subject = replace(report.subjects[0], path=path)
    written = write_report(replace(report, subjects=(subject,)), tmp_path / "out")
    assert json.loads(written.json.read_text(encoding="utf-8"))["files"][0]["file"] == "name-?.gguf"


# Figures


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.031273, 0.000238, "0.03127 ± 0.00024"),
        (10.4321, 0.7433, "10.43 ± 0.74"),
        (1234.5, 123.0, "1234 ± 123"),
        (0.0, 0.0, "0"),
        (5.5, float("nan"), "5.500"),
        (float("nan"), 1.0, "–"),
    ],
)
def test_the_error_says_how_many_digits(value, error, text):
    assert with_error(Estimate(value, error)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(132.4, "132"), (5.788, "5.79"), (0.0000321, "0.0000321"), (-0.5, "-0.500"), (0, "0")]
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text


def test_measured_has_no_field_the_report_forgets(report, written):
    """A figure added to Measured or Against later turns up in the JSON by itself."""
    entry = json.loads(written.json.read_text(encoding="utf-8"))["files"][0]
    assert set(entry["measured"]) | {"path", "nbytes", "bits_per_weight", "klds", "same"} == set(Measured.__dataclass_fields__)
