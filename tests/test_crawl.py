"""tools/crawl_prompts.py against a server of its own on loopback, which answers as endpoints do: well, badly, not at all."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from email.utils import formatdate
from pathlib import Path

import crawl_prompts
import pytest
from click.testing import CliRunner, Result
from crawl import endpoint as endpoint_module
from crawl.endpoint import _retry_after, is_local
from crawl.items import TASKS, TOPICS, Item, prompt, read
from crawl.similar import Seen, _bigrams
from openai_server import SENTENCES, Server, completion, item
from starlette.responses import JSONResponse, Response

from cnq.corpus import read_source

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def run(server, tmp_path, monkeypatch) -> Callable[..., Result]:
    """The program, on the server, into tmp_path/out.json; it waits a hundredth of what it would."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint_module, "_LONGEST_WAIT", 0.02)

    def call(*options: str, url: str = server.url) -> Result:
        defaults = ["--endpoint", url, "--model", "big", "--n", "6", "--concurrency", "1", "--rate", "0"]
        return CliRunner().invoke(crawl_prompts.main, [str(tmp_path / "out.json"), *defaults, *options])

    return call


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def counts(result: Result) -> dict[str, int]:
    lines = (re.fullmatch(r"\s*(\D+?)\s+([\d,]+)\s*", line) for line in result.stdout.splitlines())
    return {found[1]: int(found[2].replace(",", "")) for found in lines if found}


# What is asked


def test_topics_and_tasks():
    assert (len(TOPICS), len(set(TOPICS)), len(TASKS)) == (82, 82, 14)


def test_a_prompt_draws_ten_of_each_and_the_lengths():
    drawn = random.Random(1)
    prompts = [prompt(7, drawn) for _ in range(60)]
    for text in prompts:
        assert "请编写 7 条" in text and "拒绝" in text and "JSON" in text
        assert len(re.search("话题：(.*)。", text)[1].split("、")) == 10
        assert sum(f"- {name}：" in text for name in TASKS) == 10
        assert 80 <= int(re.search(r"不超过 (\d+) 字", text)[1]) <= 120
        assert 128 <= int(re.search(r"少于 (\d+) 字", text)[1]) <= 512
    assert all(any(topic in text for text in prompts) for topic in TOPICS)


# What is read

ONE = {"instruction": "列出三种水果", "input": "", "output": "苹果、梨、桃"}
TWO = {"instruction": "翻译成英文", "input": "你好", "output": "Hello"}
BOTH = json.dumps([ONE, TWO], ensure_ascii=False)


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        (BOTH, [ONE, TWO]),
        (f"好的，以下是数据：\n```json\n{BOTH}\n```\n希望有帮助！", [ONE, TWO]),
        (json.dumps({"data": [ONE, {"more": [TWO]}]}), [ONE, TWO]),
        (BOTH[1:-1], [ONE, TWO]),
        ("\n".join(json.dumps(x) for x in (ONE, TWO)), [ONE, TWO]),
        (BOTH[:-12], [ONE]),  # cut in the middle of the second's answer
        (BOTH[: BOTH.index("翻")], [ONE]),
        ('{"data": ' + BOTH[:-12], [ONE]),
        (BOTH.replace("苹果、", "苹果\n"), [ONE | {"output": "苹果\n梨、桃"}, TWO]),  # a line break in a string
        (BOTH.replace("苹果", '"苹果"'), [TWO]),  # quotes that are not escaped
        (BOTH.replace("}, {", ",}, {"), [TWO]),
        (BOTH.replace("苹果", "[ } {"), [ONE | {"output": "[ } {、梨、桃"}, TWO]),
        ("抱歉，我不能。", []),
        ("", []),
        ("{" * 5000, []),
        ('{"a":' * 5000, []),
        ('{"a":' * 5000 + "1" + "}" * 5000, []),
        ("[" * 5000 + "{", []),
    ],
)
def test_whole_items_are_read_out_of_anything(reply, items):
    assert [x for x in read(reply) if isinstance(x, Item)] == [Item(**x) for x in items]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": "  \n"}, "incomplete"),
        ({"output": None}, "incomplete"),
        ({"output": ["一", "二"]}, "incomplete"),
        ({"output": 7}, "incomplete"),
        ({"instruction": "…"}, "incomplete"),  # the format of the prompt, sent back
        ({"instruction": "长" * 301}, "too long"),
        ({"input": "长" * 401}, "too long"),
        ({"output": "长" * 1501}, "too long"),
        ({"instruction": "List three fruits."}, "not Chinese"),
        ({"output": "苹\ufffd"}, "damaged characters"),
        ({"output": "苹\x00"}, "damaged characters"),
        ({"output": "\ud83d"}, "damaged characters"),  # half a character: legal JSON, no text
    ],
)
def test_what_is_no_item_has_a_reason(change, reason):
    assert list(read(json.dumps([ONE | change, TWO]))) == [reason, Item(**TWO)]


@pytest.mark.parametrize("none", [None, "无", " <无输入> ", "None", "（空）", "N/A"])
def test_no_input_is_the_empty_text(none):
    (found,) = read(json.dumps(ONE | {"input": none}))
    assert found.input == ""
    (found,) = read(json.dumps({k: v for k, v in ONE.items() if k != "input"}))
    assert found.input == ""


# What is alike


def test_near_duplicates_are_those_that_comparing_every_pair_finds():
    draw = random.Random(0)
    letters = "".join(SENTENCES[:50])
    texts = [*SENTENCES[:300], "", "。", "好", "你好", "你好！"]
    texts += ["".join(c if draw.random() > share else draw.choice(letters) for c in text)
              for share in (0.05, 0.1, 0.15, 0.2) for text in texts[:150]]  # fmt: skip
    for threshold in (0.4, 0.7, 1):
        seen, kept = Seen(threshold), []
        for text in texts:
            grams = _bigrams(text)
            like = any(2 * len(grams & old) >= threshold * (len(grams) + len(old)) for old in kept if grams and old)
            assert seen.add(text) != like, text
            if not like:
                kept.append(grams)
        few, many = {0.4: (290, 500), 0.7: (400, 800), 1: (800, 904)}[threshold]
        assert few < len(kept) < many


def test_width_case_and_punctuation_make_no_other_text():
    seen = Seen()
    assert seen.add("请用 Python 写一个函数，求 1 到 100 的和。")
    assert not seen.add("请用PYTHON写一个函数：求１到１００的和")
    assert seen.add("请用 Java 写一个类，表示一个长方形。")


# The program


def test_a_crawl(run, server, tmp_path):
    server.answers = [
        completion(f"好的：\n```json\n{json.dumps([item(100), item(101)])}\n```"),
        completion("我不会写 JSON。"),
        completion(json.dumps([item(100), item(102) | {"output": ""}, item(103)])),
        completion(json.dumps([item(104), item(105)])[:-15], "length"),
    ]
    result = run()
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert records == [item(i) for i in (100, 101, 103, 104, 0, 1)]
    assert counts(result) == {
        "requests": 5, "asked again": 0, "given up": 0, "replies": 5, "replies cut off": 1, "replies without items": 1,
        "items": 8, "kept": 6, "near-duplicates": 1, "incomplete": 1, "prompt tokens": 50, "completion tokens": 100,
    }  # fmt: skip
    assert len(read_source(tmp_path / "out.json", render=str).documents) == 6
    assert names(tmp_path) == ["out.json"]
    assert (
        server.seen[0].keys() == {"model", "messages", "temperature"}
        and "请编写 20 条" in server.seen[0]["messages"][0]["content"]
    )
    assert "authorization" not in server.headers[0]


def test_it_adds_to_what_there_is_and_stops_at_n(run, server, tmp_path):
    there = [{"id": 7, "instruction": "一条原有的指令", "output": "回答"}, item(0)]
    (tmp_path / "out.json").write_text(json.dumps(there), encoding="utf-8")
    result = run("--n", "5")
    records = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert records == [*there, item(1), item(2), item(3)]
    assert (counts(result)["near-duplicates"], len(server.seen)) == (1, 2)
    assert run("--n", "5").exit_code == 0
    assert len(server.seen) == 2  # nothing to ask for


def test_retries(run, server):
    server.answers = [
        JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.4"}),
        Response("<html>bad gateway</html>", 502),
        Response("<html>It works!</html>", 200),
        JSONResponse({"choices": []}),
        JSONResponse({"choices": [{"message": {"content": 7}}]}),
        JSONResponse({"error": "overloaded"}, 503),
    ]
    result = run()
    assert result.exit_code == 0, result.output
    assert (counts(result)["asked again"], counts(result)["requests"]) == (6, 3)
    assert server.at[1] - server.at[0] >= 0.4
    assert "status 429: slow down; trying again in 0.4 s" in result.stderr


def test_a_retry_after_holds_for_all(run, server):
    server.answers, server.delay = [JSONResponse({}, 429, {"Retry-After": "0.5"})], 0.2
    assert run("--n", "10", "--items", "2", "--concurrency", "2", "--rate", "6000").exit_code == 0
    late = [at for at in server.at[2:] if at - server.at[0] < 0.5]
    assert not late


def test_retry_after_is_seconds_or_a_date():
    def told(value):
        return _retry_after(endpoint_module.httpx.Headers({"retry-after": value}))

    assert (told("7"), told("0.25"), told("-3"), told("soon"), told("nan"), told("inf"), told("1e999"), told("")) == (
        7, 0.25, 0, None, None, None, None, None)  # fmt: skip
    assert 5 < told(formatdate(time.time() + 8, usegmt=True)) <= 8


def test_rate(run, server):
    started = time.monotonic()
    assert run("--n", "8", "--rate", "600", "--concurrency", "8").exit_code == 0
    assert len(server.at) >= 4
    assert all(at - started > 0.099 * i for i, at in enumerate(server.at))


def test_concurrency(run, server):
    server.delay = 0.5
    assert run("--n", "16", "--items", "2", "--concurrency", "8").exit_code == 0
    assert (len(server.seen), server.most) == (8, 8)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (JSONResponse({"error": {"message": "Incorrect API key"}}, 401), "export OPENAI_API_KEY="),
        (JSONResponse({"error": {"message": "no access"}}, 403), "export OPENAI_API_KEY="),
        (
            JSONResponse({"error": {"message": "The model `big` does not exist"}}, 404),
            "Its models: big, small; --model was big",
        ),
        (JSONResponse({"error": {"message": "invalid model ID"}}, 400), "Its models: big, small"),
        (JSONResponse({"error": {"code": "insufficient_quota", "message": "quota"}}, 429), "top it up"),
        (JSONResponse({"error": {"message": "pay"}}, 402), "top it up"),
        (Response(status_code=307, headers={"Location": "http://127.0.0.1:1/"}), "answers 307"),
        (JSONResponse({}, 429, {"Retry-After": "86400"}), "asks to wait 86400 seconds"),
    ],
)
def test_what_trying_again_cannot_mend_is_said_at_once(run, server, tmp_path, answer, said):
    server.answers = [answer]
    result = run()
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(server.seen) == 1
    assert names(tmp_path) == []


def test_what_was_there_before_an_error_is_kept(run, server, tmp_path):
    server.answers = [completion(json.dumps([item(100), item(101)])), JSONResponse({"error": {"message": "expired"}}, 401)]
    result = run()
    assert (result.exit_code, counts(result)["kept"]) == (1, 2)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == [item(100), item(101)]
    assert names(tmp_path) == ["out.json"]


def test_a_prompt_that_is_refused_is_not_the_end(run, server):
    server.answers = [completion(json.dumps([item(100)])), JSONResponse({"error": {"message": "content filter"}}, 400)]
    result = run()
    assert (result.exit_code, counts(result)["given up"], counts(result)["asked again"]) == (0, 1, 0)


def test_an_outage_ends_it(run, server, monkeypatch):
    monkeypatch.setattr(endpoint_module, "_TRIES", 2)
    server.answers = [Response("down", 500)] * 10
    result = run()
    assert result.exit_code == 1
    assert "5 requests in a row came to nothing" in result.stderr
    assert len(server.seen) == 10


def test_a_model_that_writes_nothing_of_use(run, server):
    server.answers = [completion('[{"instruction": "Write', "length")] * 30
    result = run()
    assert result.exit_code == 1
    assert "the last 20 replies held nothing to keep" in result.stderr
    assert counts(result)["replies without items"] == 20


def test_an_answer_that_never_ends(run, server, monkeypatch):
    monkeypatch.setattr(endpoint_module, "_MOST_BYTES", 5000)
    server.answers = [Response(b"x" * 10_000), completion(json.dumps([item(i) for i in range(100, 106)]))]
    result = run()
    assert result.exit_code == 0
    assert "more than 5000 bytes" in result.stderr


def test_a_slow_answer_is_asked_for_again(run, server):
    server.delay = 5
    server.answers = []

    def hurry():
        time.sleep(1.2)
        server.delay = 0

    threading.Thread(target=hurry).start()
    result = run("--timeout", "1")
    assert result.exit_code == 0
    assert "TimeoutError" in result.stderr or "ReadTimeout" in result.stderr


def test_nobody_there(run):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    result = run(url=f"http://127.0.0.1:{port}/v1")
    assert result.exit_code == 1
    assert "nothing answers at" in result.stderr and "cnq serve" in result.stderr


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://127.0.0.1/v1", "http://", "http://[::1", "https:///v1"])
def test_no_url(run, url):
    result = run(url=url)
    assert result.exit_code == 1
    assert "Expected one like" in result.stderr


@pytest.mark.parametrize(
    ("url", "local"),
    [("http://localhost:8000/v1", True), ("http://127.8.9.1/v1", True), ("http://[::1]:8000/v1", True),
     ("http://localhost.example.com/v1", False), ("http://192.168.1.5:8000/v1", False), 
     ("https://127.0.0.1.example.com/", False)],
)  # fmt: skip
def test_what_is_on_this_machine(url, local):
    assert is_local(url) == local


def test_a_key_is_wanted_elsewhere_and_sent(run, server, monkeypatch, tmp_path):
    result = run(url="https://api.example.com/v1")
    assert result.exit_code == 1
    assert "OPENAI_API_KEY holds no key" in result.stderr
    monkeypatch.setenv("MY_KEY", " sk-1\n")
    assert run("--api-key-env", "MY_KEY").exit_code == 0
    assert server.headers[0]["authorization"] == "Bearer sk-1"
    monkeypatch.setenv("MY_KEY", "sk-\n1")
    assert "no key has" in run("--api-key-env", "MY_KEY").stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "expected a list"), ("nothing", "is no JSON"), ('[{"text": "一段文字"}]', "record 1"), ('["x"]', "record 1"),
     ("指令".encode("gb18030"), "is GBK")],
)  # fmt: skip
def test_a_file_that_is_no_alpaca_json_is_left_alone(run, server, tmp_path, content, said):
    path = tmp_path / "out.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    result = run()
    assert (result.exit_code, len(server.seen)) == (1, 0)
    assert said in result.stderr
    assert path.read_bytes() == before


def test_another_name_than_json(server, tmp_path):
    result = CliRunner().invoke(crawl_prompts.main, [str(tmp_path / "o.txt"), "--endpoint", server.url, "--model", "big"])
    assert result.exit_code == 1
    assert "ends in .json" in result.stderr


# Broken off


def program(server: Server, out: Path, n: int) -> subprocess.Popen:
    command = [sys.executable, ROOT / "tools" / "crawl_prompts.py", out, "--endpoint", server.url, "--model", "big", "--n",
               str(n), "--rate", "0", "--concurrency", "3"]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_kill_9_loses_only_what_is_on_its_way(server, run, tmp_path):
    out, journal = tmp_path / "out.json", tmp_path / "out.json.journal.jsonl"
    server.delay = 0.05
    process = program(server, out, 500)
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 4)
    process.kill()
    process.communicate()
    assert not out.exists()
    kept = sum(len(json.loads(line)) for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    assert server.given - kept <= 2 * (3 + 1)  # three on their way, and one perhaps answered but not yet written
    with journal.open("ab") as f:
        f.write('[{"instruction": "一条被切断'.encode()[:-1])
    result = run("--n", str(kept + 2))
    assert result.exit_code == 0, result.output
    assert len(json.loads(out.read_text(encoding="utf-8"))) >= kept + 2
    assert f"{kept + 2} records, 2 of them new" in result.stdout
    assert names(tmp_path) == ["out.json"]


def test_ctrl_c_writes_what_there_is(server, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so their children, ignore it
    out, journal = tmp_path / "out.json", tmp_path / "out.json.journal.jsonl"
    server.delay = 0.05
    process = program(server, out, 500)
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 2)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    n = len(json.loads(out.read_text(encoding="utf-8")))
    assert n >= 4
    assert f"{n} records, {n} of them new" in told and "near-duplicates" in told
    assert names(tmp_path) == ["out.json"]


def test_two_at_once(server, run, tmp_path):
    server.delay = 0.2
    process = program(server, tmp_path / "out.json", 500)
    wait_for(lambda: server.seen)
    result = run()
    process.kill()
    process.communicate()
    assert result.exit_code == 1
    assert "another crawl" in result.stderr


def test_a_damaged_journal_is_named(run, tmp_path, server):
    journal = tmp_path / "out.json.journal.jsonl"
    journal.write_bytes(json.dumps([item(0)]).encode() + b"\n{broken\n" + json.dumps([item(1)]).encode() + b"\n")
    before = journal.read_bytes()
    result = run()
    assert (result.exit_code, len(server.seen)) == (1, 0)
    assert "line 2 is damaged" in result.stderr
    assert journal.read_bytes() == before
