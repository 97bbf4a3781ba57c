"""A report as a Hugging Face model card: README.md with YAML front matter, Chinese and English."""

import json
import re
import shlex

from ..files import decimal
from .data import KLD_BOUND, NONE, Choice, Report, clean, number, with_error

MARKER = "# Written by cnq, which replaces this file. Remove this line to keep your own text."
_PLAIN = re.compile(r"[\w.+/@ -]+")


def card(report: Report, choice: Choice | None) -> str:
    """The card's text. Beginning with `---` and MARKER, it is known again as cnq's own."""
    return "\n".join(["---", MARKER, *_front(report), "---", "", *_body(report, choice), ""])


def is_ours(text: str) -> bool:
    return text.replace("\r\n", "\n").startswith(f"---\n{MARKER}\n")


def _front(report: Report) -> list[str]:
    """What the hub reads. A licence or a base that is not known is left out: the hub refuses made-up values."""
    lines = []
    if report.licence:
        lines.append(f"license: {_yaml(report.licence)}")
    if report.languages:
        lines += ["language:", *(f"- {_yaml(language)}" for language in report.languages)]
    if report.hub_id:
        lines += [f"base_model: {_yaml(report.hub_id)}", "base_model_relation: quantized"]
    tags = ["gguf", "llama.cpp", *(["imatrix"] if any(s.imatrix for s in report.subjects) else [])]
    return [*lines, "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags), "quantized_by: cnq"]


def _yaml(text: str) -> str:
    """A YAML string: JSON's form is one. Never bare: `no` is a language, and a truth value."""
    return json.dumps(clean(text), ensure_ascii=False)


def _md(text: str) -> str:
    """Text as Markdown that is nothing but text, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", clean(text))


def _code(text: str) -> str:
    return f"`{text}`" if _PLAIN.fullmatch(text) else _md(text)


def _body(report: Report, choice: Choice | None) -> list[str]:
    source = f" [{_md(report.hub_id)}](https://huggingface.co/{report.hub_id})" if report.hub_id else ""
    source = source or (f" {_code(report.source)}" if report.source else "")
    lines = [
        f"# {_md(report.title)} GGUF",
        "",
        f"量化自{source or '原模型'}，可用 llama.cpp、Ollama 与 cnq 在 CPU 上运行。",
        "",
        f"Quantized from{source or ' the original model'}, to run on a CPU with llama.cpp, Ollama or cnq.",
        "",
    ]
    if choice:
        lines += [*_advice(choice), ""]
    lines += [
        "| 文件 file | 类型 type | 大小 size | bits/weight | PPL | 平均 KLD mean | 首选相同 same top % | 写 decode tok/s |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for s in (*report.by_size, report.base):
        a = s.measured.against if s.measured else None
        cells = (
            _code(s.path.name),
            _code(s.label),
            decimal(s.nbytes),
            f"{s.bits_per_weight:.2f}",
            with_error(s.measured.ppl if s.measured else None),
            with_error(s.kld),
            with_error(a.same_top if a else None),
            number(s.speed.decode if s.speed else None),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if rows := _compensated(report):
        lines += [
            "",
            "误差互补的舍入与普通舍入相比，类型与大小相同 Compensated rounding against plain, same types and size:",
            "",
            *rows,
        ]
    lines += [
        "",
        "PPL: 困惑度，越小越好 perplexity, less is better. KLD: 与原模型的 KL 散度（nat），0 是没有差别 KL divergence from the "
        "original in nats, 0 is no difference. 首选相同: 两个模型认为最可能的下一个词元相同的比例 how often both think the "
        "same next token likeliest. ±: 一个标准误差 one standard error.",
        "",
        "## 运行 Running it",
        "",
        "```sh",
        *_commands(report, choice),
        "```",
        "",
    ]
    if report.format:
        lines += [f"提示格式 Prompt format: {_code(report.format)}", ""]
    return [*lines, *_measured(report)]


def _compensated(report: Report) -> list[str]:
    """A line for each text on which compensated rounding was compared with plain."""
    return [
        f"- {_md(c.path.name)}, {_md(used.name)}: KLD {number(p.plain)} → {number(p.mine)}, × {p.kld.value:.2f} "
        f"(95 %: {p.kld.low:.2f}–{p.kld.high:.2f})"
        for c in report.compensations
        for used, p in c.domains
    ]


def _advice(choice: Choice) -> list[str]:
    name, kld = f"**{_code(choice.subject.path.name)}**", with_error(choice.kld)
    if choice.within:
        return [
            f"请取 {name}：平均 KLD 加两倍标准误差不超过 {KLD_BOUND} 的文件里最小的一个（{kld}）。",
            "",
            f"Take {name}: the smallest file whose mean KLD, with twice its standard error, is at most {KLD_BOUND} ({kld}).",
        ]
    return [
        f"没有一个文件的平均 KLD 在 {KLD_BOUND} 以内；与原模型最接近的是 {name}，为 {kld}。",
        "",
        f"No file has a mean KLD within {KLD_BOUND}; the closest to the original is {name}, with {kld}.",
    ]


def _commands(report: Report, choice: Choice | None) -> list[str]:
    subject = choice.subject if choice else next(iter(report.by_size), report.base)
    name = shlex.quote(clean(subject.path.name))
    return [f"llama-cli -m {name}", f"cnq chat {name}"]


def _measured(report: Report) -> list[str]:
    lines = ["## 测量 How it was measured", ""]
    if report.n_chunks:
        lines.append(f"- {report.n_chunks} × {report.n_ctx} tokens, {report.n_scored:,} scored, as llama-perplexity does")
    for what, uses in (("测量 measured on", report.held_out), ("重要性矩阵 importance matrix from", report.calibration)):
        lines += [
            f"- {what}: {_md(u.name)}, {u.chunks} chunks, {_md(u.split or NONE)}, sha256 {_code(u.sha256[:16])}…" for u in uses
        ]
    machine = report.machine
    lines.append(f"- 机器 machine: {_md(machine.cpu)}, {machine.cores} cores, {decimal(machine.memory)}")
    if report.versions:
        lines.append(f"- 版本 versions: {_md(', '.join(f'{k} {v}' for k, v in report.versions.items()))}")
    return [*lines, "", "全部数字与图 All figures and plots: [report.html](report.html), [report.json](report.json)"]
