"""The page in a real browser: Debian's Chromium, driven by playwright; skipped where there is none."""

import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cnq.cli import cli
from cnq.convert import convert
from cnq.web.texts import as_json, as_markdown, displayed
from cnq.web.words import LANGUAGES, WORDS, language_of

TALK = [{"role": "system", "content": "简短。"}, {"role": "user", "content": "什么是`量化`？\n"},
        {"role": "assistant", "content": "把数变小。\n\n* 一"}]  # fmt: skip
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def test_every_word_is_there_in_both_languages():
    assert all(set(word) == set(LANGUAGES) and all(word.values()) for word in WORDS.values())


@pytest.mark.parametrize(
    ("accepted", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh;q=0.8", "en"), ("fr,en;q=0.5", "en"), ("fr", "zh"), ("", "zh")],
)
def test_the_page_speaks_the_browsers_language(accepted, language):
    assert language_of(accepted) == language


def test_an_exported_conversation_is_whole():
    assert json.loads(as_json("m", TALK)) == {"model": "m", "messages": TALK}
    text = as_markdown("m", TALK, "zh")
    assert text == "# m\n\n## 系统\n\n简短。\n\n## 用户\n\n什么是`量化`？\n\n## 模型\n\n把数变小。\n\n* 一\n"
    assert "## User\n" in as_markdown("m", TALK, "en")


def test_without_gradio_it_says_what_to_install(gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli, ["web", str(gguf(vocab="spm-added")), "--port", "0"])
    assert result.exit_code == 1
    assert "pip install 'cnq[web]'" in result.output


def test_what_cannot_be_served_is_said(gguf):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli, ["web", str(gguf(vocab="spm-added")), "--port", port])
    assert result.exit_code == 1 and f"port {port} of 127.0.0.1 is in use" in result.output
    result = CliRunner().invoke(cli, ["web", str(gguf(vocab="spm")), "--port", "0"])
    assert result.exit_code == 1 and "has no chat template" in result.output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("vector<int> 和 <table>", r"vector\<int> 和 \<table>"),
        ("a &lt; b & c", r"a \&lt; b \& c"),
        ("`vector<int>` <b>", r"`vector<int>` \<b>"),
        ("``a`<b``<c>", r"``a`<b``\<c>"),
        ("<a>\n```html\n<b>\n```\n<c>", "\\<a>\n```html\n<b>\n```\n\\<c>"),
        ("```\n<b>", "```\n<b>"),
        ("> 引用 <|im_end|>", r"> 引用 \<|im_end|>"),
        (r"\<b>", r"\<b>"),
    ],
)
def test_nothing_is_taken_for_html(text, shown):
    assert displayed(text) == shown


@pytest.fixture(scope="module")
def endless(gguf, tmp_path_factory):
    """The tiny model, which never ends by itself: the logits of its three end tokens stay 0."""
    source, folder = gguf(vocab="spm-added", max_position_embeddings=4096).parent / "hf", tmp_path_factory.mktemp("endless")
    shutil.copytree(source, folder / "hf")
    tensors = load_file(folder / "hf" / "model.safetensors")
    tensors["lm_head.weight"][[2, 420, 422]] = 0
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    return convert(folder / "hf", folder / "endless.gguf", dtype="f16").path


@contextmanager
def page_of(gguf: Path):
    command = [sys.executable, "-m", "cnq", "web", str(gguf), "--port", "0", "--threads", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line), process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def test_a_conversation_in_the_browser(browser, endless, tmp_path):
    from playwright.sync_api import expect

    with page_of(endless) as (told, process):
        url = told["url"]
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10)
        asked, problems = [], []
        context = browser.new_context(locale="zh-CN", accept_downloads=True, viewport={"width": 1280, "height": 860})
        page = context.new_page()
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(url)
        box = page.locator("#question textarea")
        bot, users = page.locator("#chat .bot.message"), page.locator("#chat .user.message")
        send, stop, again, undo = (page.locator(f"#{id}") for id in ("send", "stop", "again", "undo"))
        expect(send).to_have_text("发送")

        # A short answer, and the language of the page.
        slider = page.locator("#max_tokens input[type=number]")
        slider.fill("12")
        slider.blur()
        question = "人工智能是什么？`<b>` <table> vector<int> &lt;"
        box.fill(question)
        box.press("Enter")
        expect(users).to_have_count(1)
        expect(users.first).to_contain_text(question.replace("`", ""))
        expect(bot).to_have_count(1)
        expect(send).to_be_visible()
        first = bot.first.inner_text()
        assert first.strip()
        page.get_by_label("English").check()
        expect(send).to_have_text("Send")
        expect(box).to_have_attribute("placeholder", re.compile("Enter sends"))

        # A long one: it grows, stop ends it at once, and what was said stays.
        slider.fill("4000")
        slider.blur()
        box.fill("第二个问题")
        send.click()
        expect(stop).to_be_visible()
        expect(bot).to_have_count(2)
        before = len(bot.nth(1).inner_text())
        page.wait_for_function("n => document.querySelectorAll('#chat .bot.message')[1].innerText.length > n", arg=before)
        stop.click()
        expect(send).to_be_visible()
        said = bot.nth(1).inner_text()
        cpu = psutil.Process(process.pid).cpu_percent
        cpu()
        page.wait_for_timeout(400)
        assert cpu() < 30  # per cent of a core: the model rests
        assert bot.nth(1).inner_text() == said
        expect(users).to_have_count(2)

        # Once more, with another end; undo takes the question back.
        slider.fill("5")
        slider.blur()
        again.click()
        expect(send).to_be_visible()
        page.wait_for_function("said => document.querySelectorAll('#chat .bot.message')[1]?.innerText !== said", arg=said)
        expect(users).to_have_count(2)
        undo.click()
        expect(users).to_have_count(1)
        expect(box).to_have_value("第二个问题")

        # A full context: the oldest turn goes, and the page says so.
        box.fill("量" * 2500)
        send.click()
        expect(bot).to_have_count(2)
        expect(send).to_be_visible()
        box.fill("化" * 2500)
        send.click()
        expect(page.get_by_text("Turns the model forgets: 2.")).to_be_visible()
        expect(bot).to_have_count(3)
        expect(send).to_be_visible()
        undo.click()
        undo.click()
        expect(users).to_have_count(1)

        # Files.
        page.locator("#system textarea").fill("简短。")
        for id, ending in (("json", ".json"), ("markdown", ".md")):
            with page.expect_download() as download:
                page.locator(f"#{id}").click()
            assert download.value.suggested_filename.endswith(ending)
            download.value.save_as(tmp_path / id)
        messages = json.loads((tmp_path / "json").read_text(encoding="utf-8"))["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        assert messages[1]["content"] == question
        assert f"## User\n\n{question}\n" in (tmp_path / "markdown").read_text(encoding="utf-8")

        assert not problems
        assert {u for u in asked if not u.startswith((url, "data:", "blob:"))} == set()
        context.close()
        process.terminate()
        out, errors = process.communicate(timeout=15)
        assert (process.returncode, out, errors) == (0, "", "")
