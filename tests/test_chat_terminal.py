"""What is drawn and what is typed: wrapping, Markdown, redrawing on an emulated screen, commands, the editor's rules."""

import re
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console
from wcwidth import iter_graphemes

from cnq.chat import open_chat
from cnq.chat_terminal import commands, status
from cnq.chat_terminal.drawing import Drawing, rendered
from cnq.chat_terminal.editor import CommandCompleter, _History, is_open, message
from cnq.chat_terminal.markdown import Markdown, Prose, finished
from cnq.chat_terminal.painter import Painter
from cnq.chat_terminal.wrapping import breaks, cell_width, clusters, may_break, printable
from cnq.errors import CnqError, PromptError

ROOT = Path(__file__).parents[1]
FAMILY, THUMB, FLAG, ACCENT, HEART = "👨\u200d👩\u200d👧", "👍🏽", "🇨🇳", "e\u0301", "❤\ufe0f"
MIXED = st.lists(
    st.sampled_from(
        [*"量化模型，。（）“”《》…—！？ab-1 ", "Python ", "https://a.cn/x ", FAMILY, THUMB, FLAG, ACCENT, HEART, "한"]
    ),
    max_size=60,
).map("".join)


# What is written, and where lines end


def parts(text, width):
    cuts = [0, *breaks(text, width), len(text)]
    return [text[a:b] for a, b in pairwise(cuts)]


@given(MIXED, st.integers(2, 30))
def test_no_line_is_too_wide_and_nothing_is_lost_or_torn(text, width):
    lines = parts(text, width)
    assert "".join(lines) == text
    assert all(cell_width(line.rstrip()) <= width for line in lines)
    assert all(lines) or not text
    assert [c for line in lines for c in iter_graphemes(line)] == list(iter_graphemes(text))


@given(MIXED, st.integers(16, 30))
def test_lines_end_where_they_may_unless_a_word_is_wider(text, width):
    lines = parts(text, width)
    for before, after in pairwise(lines):
        inside = list(iter_graphemes(before))
        if not may_break(inside[-1], next(iter_graphemes(after))):
            assert not any(may_break(a, b) for a, b in pairwise(inside))


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("我想在 apple 工作，", 10, ["我想在 ", "apple 工", "作，"]),
        ("一二三四五。", 10, ["一二三四", "五。"]),
        ("他说（一二三）四", 8, ["他说（一", "二三）四"]),
        ("一二三（四五）", 8, ["一二三", "（四五）"]),
        ("说：“好。”一二", 10, ["说：“好。”", "一二"]),
        ("use asyncio.run() 在这里", 12, ["use ", "asyncio.run(", ") 在这里"]),
        ("abcdefghijkl", 5, ["abcde", "fghij", "kl"]),
        (f"好{FAMILY}{FAMILY}{FLAG}", 4, [f"好{FAMILY}", f"{FAMILY}{FLAG}"]),
    ],
)
def test_where_chinese_lines_end(text, width, lines):
    assert parts(text, width) == lines


JOINING = ["量", "a", "e", "\u0301", "👨", "\u200d", "👩", "👍", "🏽", "🇨", "🇳", "❤", "\ufe0f", "\n", "\r"]


@given(st.lists(st.sampled_from(JOINING), max_size=12).map("".join), st.integers(1, 4))
def test_a_stream_comes_in_whole_clusters(text, width):
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    out = list(clusters(pieces))
    assert "".join(out) == text
    assert [c for piece in out for c in iter_graphemes(piece)] == list(iter_graphemes(text))
    assert len(out) == len(pieces) + 1


def test_a_cluster_without_end_is_not_waited_for():
    assert max(map(len, clusters(["e", *["\u0301"] * 1000]))) < 100


def test_an_answer_cannot_command_the_terminal():
    assert printable("a\x1b]0;title\x07b\x1b[2Jc\r\x00\x9b1md\n\te") == "a]0;titleb[2Jc1md\n\te"


# Markdown


def shown(text, width=80):
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in rendered(Console(width=width, force_terminal=True), Markdown(text))]


def bold(text):
    out = "".join(rendered(Console(width=200, force_terminal=True, color_system="truecolor"), Markdown(text)))
    return re.findall(r"\x1b\[1m(.*?)\x1b\[0m", out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**注意：**请不要", ["注意："]),
        ("他说**“重点”**。", ["“重点”"]),
        ("这是**粗体**文字", ["粗体"]),
        ("**Note:** here", ["Note:"]),
        ("**（一）**和**（二）**", ["（一）", "（二）"]),
        ("2 ** 3 和 4 ** 5", []),
        ("snake_case_name 和 a*b*c", []),
        ("**没有结束", []),
    ],
)
def test_emphasis_beside_chinese(text, expected):
    assert bold(text) == expected


def test_commonmark_is_otherwise_as_it_was():
    """Against markdown-it's own parser, on text without wide characters."""
    from markdown_it import MarkdownIt

    from cnq.chat_terminal.markdown import _parser

    theirs = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    for text in (
        "*a*b _c_d",
        "**a: **b",
        '**"a"**b',
        "a***b** c*",
        "_a_ ~~b~~ `c*`",
        "*(*a*)*",
        "[a*](b) *",
        "foo******bar*****baz",
    ):
        assert _parser().render(text) == theirs.render(text)


def test_line_breaks_and_tags_are_shown_as_they_are_meant():
    assert shown("白日依山尽，\n黄河入海流。") == ["白日依山尽，", "黄河入海流。"]
    assert shown("List<String> a <b>x</b>") == ["List<String> a <b>x</b>"]
    assert shown("<div>\n文字\n</div>") == ["<div>", "文字", "</div>"]


def test_a_table_of_chinese_is_aligned():
    lines = shown("|名称|大小|\n|---|---:|\n|量化|4.1 GB|\n|a 😀|7|", 40)
    assert len({cell_width(line) for line in lines if line}) == 1, lines
    wide = shown("|名称|说明|\n|---|---|\n|甲|" + "很长的说明，" * 20 + "|", 40)
    assert all(cell_width(line) <= 40 for line in wide)


def test_code_is_left_as_it_is():
    lines = shown("```python\nif a:\n\tprint('你好')\n\n```")
    assert [line.strip() for line in lines] == ["if a:", "print('你好')"]


@given(st.text(max_size=80))
@example("[a]: x\n\n[a]")
@example("```\n~~~\n- a\n\t- b")
def test_any_text_can_be_drawn(text):
    rendered(Console(width=20, force_terminal=True), Markdown(text))
    assert 0 <= finished(text) <= len(text)


def test_only_what_cannot_change_is_finished():
    assert finished("一段\n\n二段") == 0, "二 may still become a heading of the first: the line is not whole"
    assert finished("一段\n\n二段\n") == len("一段\n\n")
    assert finished("一段\n#") == 0
    assert finished("一段\n---") == 0
    assert finished("- 甲\n- 乙\n") == 0
    assert finished("```\na\n\nb\n") == 0
    assert finished("```\na\n```\n\n好\n") == len("```\na\n```\n\n")


# Redrawing


class Screen:
    """What a terminal shows of what is written to it: the sequences that the painter uses, wide characters, scrolling."""

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.lines, self.row, self.column, self.wraps = [[]], 0, 0, True
        self.written = 0

    def write(self, text):
        self.written += len(text)
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            elif part.endswith("A") and part[0] == "\x1b":
                up = int(part[2:-1])
                assert self.row - up >= max(0, len(self.lines) - self.rows), "above the first row of the screen"
                self.row -= up
            elif part == "\x1b[J":
                assert self.column == 0
                del self.lines[self.row :]
                self.lines.append([])
            elif part.startswith("\x1b[?7"):
                self.wraps = part.endswith("h")
            elif part[0] != "\x1b":
                for cluster in iter_graphemes(part):
                    self._put(cluster)

    def _down(self):
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def _put(self, cluster):
        width = cell_width(cluster)
        if self.column + width > self.columns:
            if not self.wraps:
                return
            self.column = 0
            self._down()
        line = self.lines[self.row]
        del line[self.column :]
        line += [" "] * (self.column - len(line)) + [cluster] + [""] * (width - 1)
        self.column += width

    @property
    def text(self):
        return ["".join(line).rstrip() for line in self.lines]


BLOCKS = st.sampled_from([
    "量化把一个大模型变小，让它在普通的电脑上运行。" * 3, "短。", "# 标题", "## 二 *斜*", "- 甲\n- 乙，**粗**\n  - 丙\n- 丁",
    "1. 一\n2. 二\n3. 三" + "很长" * 40, "> 引用\n> 第二行",
    "```python\nfor i in range(3):\n    print(i)  # 注释\n\n\nx = 1\n```",
    "| 名 | 值 |\n|---|---|\n| 甲 | 1 |\n| 乙丙丁 | 22 |", "---", f"{FAMILY}家{FLAG}{HEART}", "白日依山尽，\n黄河入海流。",
    "```\n没有结束", "行" * 300, "a\tb", "1986\\. 年",
])  # fmt: skip


def drawn(pieces, columns=40, rows=10, notes=()):
    screen = Screen(columns, rows)
    console = Console(file=screen_file(screen), width=columns, height=rows, force_terminal=True, color_system=None)
    drawing = Drawing(console)
    for i, piece in enumerate(pieces):
        drawing.update(piece, notes if i == 0 else (), f"{i} tok/s · a status that is longer than forty columns are")
    drawing.finish("", ())
    return screen


def screen_file(screen):
    file = StringIO()
    file.write = screen.write
    return file


@settings(max_examples=60, deadline=None)
@given(st.lists(BLOCKS, max_size=6).map("\n\n".join), st.integers(1, 40), st.sampled_from([4, 10, 40]))
def test_a_streamed_answer_ends_as_one_printed_at_once(text, width, rows):
    """Whatever was redrawn meanwhile, also when the live block is taller than the screen: the same remains."""
    pieces = list(clusters(text[i : i + width] for i in range(0, len(text), width)))
    streamed, at_once = drawn(pieces, rows=rows), drawn([text], rows=rows)
    assert [line for line in streamed.text if line] == [line for line in at_once.text if line]
    assert "tok/s" not in "".join(streamed.text)
    assert streamed.column == 0


def test_what_does_not_change_is_not_written_again():
    """A long paragraph: each update costs about a line, and not the paragraph."""
    screen = Screen(80, 30)
    painter = Painter(screen.write, lambda: (80, 30))
    lines = [f"{i}: " + "量" * 35 for i in range(20)]
    painter.update([], [*lines, "status"])
    before = screen.written
    painter.update([], [*lines[:-1], lines[-1] + "化", "status"])
    assert screen.written - before < 200
    before = screen.written
    painter.update([], [*lines[:-1], lines[-1] + "化", "status"])
    assert screen.written == before
    painter.finish(lines)
    assert screen.text == [*lines, ""]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 3)), max_size=8))
def test_the_painter_keeps_what_is_done_and_only_that(steps):
    screen = Screen(20, 6)
    painter = Painter(screen.write, lambda: (20, 6))
    expected = []
    for n, (done, live, same) in enumerate(steps):
        finished_lines = [f"done {n}.{i}" for i in range(done)]
        expected += finished_lines
        now = [f"live {'x' if i < same else n}.{i}" for i in range(live)]
        painter.update(finished_lines, now)
        assert screen.text == [*expected, *(now[-5:] or [""])]
    painter.finish(["end"])
    assert screen.text == [*expected, "end", ""]


def test_a_terminal_that_takes_a_character_for_wider_keeps_its_rows():
    screen = Screen(10, 10)
    painter = Painter(screen.write, lambda: (10, 10))
    painter.update([], ["量" * 5 + "量", "b"])  # as if it took more cells than we think
    painter.update([], ["c", "d"])
    assert screen.text == ["c", "d"]


def test_a_narrower_terminal_meanwhile():
    """It has put the live lines anew, in more rows; those are drawn over too."""
    size = [20, 10]
    screen = Screen(20, 10)
    painter = Painter(screen.write, lambda: tuple(size))
    painter.update(["done"], ["x" * 20, "y" * 5])
    size[0] = 10
    screen.columns, screen.lines, screen.row = 10, [list("done"), ["x"] * 10, ["x"] * 10, ["y"] * 5], 3
    painter.update([], ["a", "b"])
    assert screen.text == ["done", "a", "b"]


def test_the_meter():
    assert status.line(1234, 4096, 9.87, "Ctrl-C stops") == "1234/4096 ▓▓▓░░░░░░░ 30 % · 9.9 tok/s · Ctrl-C stops"
    assert status.line(0, 4096) == "0/4096 ░░░░░░░░░░ 0 %"
    assert status.meter(5000, 4096) == "5000/4096 ▓▓▓▓▓▓▓▓▓▓ 122 %"


# Commands


@pytest.fixture(scope="module")
def small(gguf):
    with open_chat(gguf(vocab="spm-added"), max_tokens=4, temperature=0) as chat:
        yield chat


@pytest.fixture
def chat(small):
    small.system = None
    small.reset()
    small.notes.clear()
    return small


def run(chat, line):
    assert commands.is_command(line)
    return commands.run(chat, line)


def test_what_is_a_command():
    for line in ("/help", "/exit ", "/system 你是\n助手", "/params temperature=0", "/HELP"):
        assert commands.is_command(line)
    for line in ("help", " /help", "/usr/bin/python 是什么？", "/", "// x", "1/2", "/。", ""):
        assert not commands.is_command(line)


@pytest.mark.parametrize(
    ("line", "saying"),
    [
        ("/rest", "there is no command /rest; the nearest is /reset. /help lists all"),
        ("/re", "the nearest is /reset or /regen"),
        ("/quit", "/help lists all"),
        ("/xyzzy", "there is no command /xyzzy; /help lists all"),
        ("/save", "name a file: /save FILE"),
        ("/load /nowhere/x.json", "/nowhere/x.json cannot be read: No such file"),
        ("/params temperature=hot", "temperature=hot: expected a number"),
        ("/params hot", "'hot': expected key=value"),
        ("/params temperature=1 hot", "expected key=value"),
        ("/undo", "nothing to undo"),
        ("/regen", "no answer yet"),
    ],
)
def test_what_a_wrong_command_is_told(chat, line, saying):
    with pytest.raises((CnqError, PromptError), match=re.escape(saying)):
        run(chat, line)


def test_the_commands_do_what_they_say(chat, tmp_path):
    assert "no system text" in run(chat, "/system").text
    assert run(chat, "/system 你是助手。").changed and chat.system == "你是助手。"
    assert run(chat, "/system").text == "你是助手。"
    first = "".join(chat.ask("你好\n吗"))
    reply = run(chat, "/regen")
    assert "the same answer again" in reply.text
    assert "".join(reply.answer) == first
    file = tmp_path / "a talk.json"
    assert "3 messages" in run(chat, f"/save {file}").text
    stats = run(chat, "/stats").text
    assert "tiny-F16.gguf" in stats and "turns     1" in stats and "answer    4 tokens" in stats and "/512 " in stats
    assert run(chat, "/undo").text == "taken back: 你好"
    assert len(chat.messages) == 1
    assert run(chat, f'/load "{file}"').changed
    assert [m["content"] for m in chat.messages[:2]] == ["你是助手。", "你好\n吗"]
    run(chat, "/reset")
    assert chat.messages == [{"role": "system", "content": "你是助手。"}]
    run(chat, "/system -")
    assert chat.messages == []
    assert run(chat, "/exit").leave


def test_params_are_shown_and_set(chat):
    assert run(chat, "/params temperature=0.5, top_k = 20").changed
    text = run(chat, "/params").text
    assert "temperature = 0.5" in text and "top_k = 20" in text and "seed = random" in text and "max_tokens = 4" in text
    assert max(cell_width(line) for line in text.splitlines()) < 80
    run(chat, "/params temperature=0")


def test_every_command_is_in_the_help_and_on_the_page(chat):
    text = run(chat, "/help").text
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    for name in commands.COMMANDS:
        assert f"/{name}" in text
        assert page.count(f"| `/{name}") == 2, "in English and in Chinese"
    assert max(cell_width(line) for line in text.splitlines()) < 80


# The editor


def test_triple_quotes():
    assert is_open('"""') and is_open('  """一\n二')
    assert not is_open('"""一\n二"""') and not is_open("一") and not is_open('一"""')
    assert message('"""\n一\n\n二\n"""') == "一\n\n二"
    assert message('"""一"""') == "一"
    for text in ('a = """x"""', '"""a""" + """b"""', '"""没有结束', "行\\\n行"):
        assert message(text) == text


def completions(text):
    return [c.text for c in CommandCompleter().get_completions(Document(text), CompleteEvent())]


def test_what_is_completed(tmp_path):
    assert completions("/re") == ["/reset", "/regen"]
    assert set(completions("/")) == {f"/{name}" for name in commands.COMMANDS}
    assert completions("/params temperature=0 to") == ["top_k=", "top_p="]
    (tmp_path / "talk.json").write_text("")
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completions("你好 /re") == completions("hello") == completions("/system re") == []


def test_the_history_is_kept_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = _History({"[pasted text 1: …]": "long"})
    history.append_string("你好\n世界")
    history.append_string("[pasted text 1: …] 总结")
    file = tmp_path / "cnq" / "chat_history"
    assert file.stat().st_mode & 0o077 == 0
    assert list(_History({}).load_history_strings()) == ["你好\n世界"]


def test_a_history_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history = _History({})
    assert "questions are not remembered" in history.note and "file" in history.note
    history.append_string("你好")
    assert history.get_strings() == ["你好"]


def test_prose_is_wrapped_in_a_console():
    assert rendered(Console(width=10), Prose("一二三四五。")) == ["一二三四", "五。"]
