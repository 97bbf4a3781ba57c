"""The Modelfile, read back by a parser that follows Ollama's grammar; and models made through Ollama's API."""

import json
import os
import shutil
import socket
import unicodedata
import uuid

import pytest
import renderers
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from ollama_server import serving

from cnq import prompts
from cnq.cli import cli
from cnq.engine.model import Model
from cnq.errors import NoSpace, OllamaError, OutputExists, PromptError
from cnq.gguf_file import GgufFile
from cnq.ollama import modelfile as module
from cnq.ollama import write_modelfile
from cnq.ollama.create import create, names
from cnq.ollama.grammar import COMMANDS, Command, kept, parse, written
from cnq.ollama.modelfile import _adds_bos, modelfile, recipe_of

# Grammar

ALL_TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('\n" \t\r\u3000"""#')), max_size=40)


@given(ALL_TEXT, ALL_TEXT)
def test_what_is_written_is_read_back(system, template):
    """Whatever the values: they come back, without the characters that Ollama drops, or are refused."""
    commands = [Command("from", "./m.gguf"), Command("system", system), Command("template", template), Command("license", "x")]
    try:
        text = "\n".join(map(written, commands)) + "\n"
    except OllamaError:
        assert any(line.rstrip().endswith('"""') for line in kept(system + "\n" + template).splitlines())
        return
    assert [c.value for c in parse(text)] == ["./m.gguf", kept(system), kept(template), "x"]


@given(ALL_TEXT)
def test_anything_is_read_or_refused(text):
    try:
        commands = parse(text)
    except OllamaError:
        return
    assert any(c.name == "from" for c in commands)
    assert all(c.name in COMMANDS for c in commands)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("SYSTEM a b  ", "a b"),
        ("SYSTEM   a", "a"),
        ("system a", "a"),
        ("SYSTEM", None),
        ("SYSTEM ", ""),
        ('SYSTEM "a b "', "a b "),
        ('SYSTEM "a\nb"', "a\nb"),
        ('SYSTEM """a\n  b """', "a\n  b "),
        ('SYSTEM """say "x\\n""""', 'say "x\\n"'),
        ('SYSTEM """a\n"""\n', "a\n"),
        ('SYSTEM """a""" b', None),
        ('SYSTEM """a"""  \n', "a"),
        ('SYSTEM """a\nb" c', None),
        ('SYSTEM a "b" c', 'a "b" c'),
        ("SYSTEM # no comment", "# no comment"),
        ("# comment\n\n  SYSTEM a", "a"),
        ("SYSTEM 全角\u3000空格\u200d", "全角空格"),
        ("\ufeffSYSTEM a", "a"),
        ("SYSTEM\ta", "a"),
        ("PARAMETER stop  a ", "a"),
        ("PARAMETER stop", None),
        ("MESSAGE user 你好", "你好"),
        ("MESSAGE tool x", None),
        ("SYSTEMS a", None),
        ("1 a", None),
    ],
)
def test_the_grammar(text, value):
    """By hand from Ollama's parser; None = it refuses."""
    whole = f"{text}\nFROM x\n"
    if value is None:
        with pytest.raises(OllamaError, match="Modelfile, line"):
            parse(whole)
    else:
        command, source = parse(whole)
        assert (command.value, source) == (value, Command("from", "x"))


def test_a_modelfile_without_from_is_refused():
    with pytest.raises(OllamaError, match="no FROM"):
        parse("SYSTEM x\n")


def test_which_characters_ollama_drops_is_what_go_says():
    """strconv.IsPrint of every character that this Python's Unicode knows."""
    known = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    (answer,) = renderers.go([{"printable": known}])
    blanks = "\t\n\r "  # Ollama keeps these by another rule
    wrong = [
        hex(c) for c, go in zip(known, answer["printable"], strict=True) if go != bool(kept(chr(c))) and chr(c) not in blanks
    ]
    assert not wrong


@pytest.mark.parametrize(
    "path", [r"C:\模型\a b.gguf", "/data/my model's #1.gguf", "./量化.gguf", r"\\server\share\m.gguf", "./~m.gguf"]
)
def test_paths(path):
    assert written(Command("from", path)) == f"FROM {path}"


# Modelfile


def said(text):
    found = {}
    for c in parse(text):
        found.setdefault(c.key or c.name, []).append(c.value)
    return found


@pytest.fixture
def read(gguf, tmp_path):
    """read(format, **arguments of gguf) -> (path, what the Modelfile for it says)."""

    def write(format=None, **settings):
        path = gguf(**settings)
        write_modelfile(path, tmp_path / "Modelfile", format=format, force=True)
        return path, said((tmp_path / "Modelfile").read_text(encoding="utf-8"))

    return write


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_every_format_is_said_outright(name, read):
    path, found = read(name, vocab="spm-added")
    format = prompts.FORMATS[name]
    assert found["from"] == [str(path)]
    assert found["template"] == [format.go("<s>", "</s>")]
    assert found["stop"] == list(format.stop)
    assert found["repeat_penalty"] == [str(format.repeat_penalty)]
    assert found["temperature"] == [str(format.temperature)]
    assert found["num_ctx"] == ["512"]  # what the model was trained with
    assert found.get("system") == ([format.system] if format.system else None)
    assert found.get("num_keep") == (["24"] if name == "llama-3" else None)
    assert "requires" not in found


@pytest.mark.parametrize("vocab", ["spm-added", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("name", prompts.FORMATS)
def test_exactly_one_bos_or_none(name, vocab, gguf):
    """Ollama's tokenizer adds one where ours does; a template that has it too spoils the answers."""
    recipe = recipe_of(gguf(vocab=vocab), name)
    with Model(recipe.gguf, n_ctx=64) as model:
        bos, ours = model.token_text("bos"), prompts.FORMATS[name].jinja
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
        (answer,) = renderers.go([{"template": recipe.template, "messages": messages}])
        ids = model.tokenize(answer["text"], add_special=True, parse_special=True)
        doubled = model.adds_bos and ids[:2] == [model.bos, model.bos]
        assert doubled == any("begin with two" in note for note in recipe.notes)
        if not doubled:
            text = prompts.render(ours, messages, bos=bos, eos=model.token_text("eos"))
            text = text.removeprefix(bos) if model.adds_bos else text
            assert ids == model.tokenize(text, add_special=True, parse_special=True)


@pytest.mark.parametrize("vocab", ["spm", "llama-bpe", "qwen2", "gpt-2", "tekken"])
@pytest.mark.parametrize("silent", [True, False])
def test_whether_the_tokenizer_adds_bos_is_what_llama_cpp_does(vocab, silent, gguf, tmp_path):
    """Also of a GGUF that does not say so."""
    path = tmp_path / "m.gguf"
    raw = gguf(vocab=vocab).read_bytes()
    path.write_bytes(raw.replace(b"tokenizer.ggml.add_bos_token", b"tokenizer.ggml.add_box_token") if silent else raw)
    with Model(path, n_ctx=64) as model:
        assert _adds_bos(model.fields) == model.adds_bos


def test_the_format_comes_from_the_gguf(gguf, tmp_path):
    made = write_modelfile(gguf(vocab="spm-added"), tmp_path / "Modelfile")
    assert made.format == "chatml"
    assert not made.notes


def with_fields(gguf, monkeypatch, **fields):
    """Recipes of a GGUF with other metadata."""
    path = gguf(vocab="spm-added")

    class Changed(GgufFile):
        def __init__(self, path):
            super().__init__(path)
            self.fields |= fields

    monkeypatch.setattr(module, "GgufFile", Changed)
    return path


def test_a_template_that_is_not_known_is_left_to_ollama(gguf, monkeypatch, tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    path = with_fields(gguf, monkeypatch, **{"tokenizer.chat_template": template})
    made = write_modelfile(path, tmp_path / "Modelfile")
    assert made.format is None
    assert any("Ollama 0.30" in note for note in made.notes)
    found = said((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert "template" not in found
    assert "stop" not in found


def test_an_end_that_does_not_count_becomes_a_stop(gguf, monkeypatch, tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|stop|>{% endfor %}"
    path = with_fields(gguf, monkeypatch, **{"tokenizer.chat_template": template})
    made = write_modelfile(path, tmp_path / "Modelfile")
    assert any("<|stop|>" in note for note in made.notes)
    assert said((tmp_path / "Modelfile").read_text(encoding="utf-8"))["stop"] == ["<|stop|>"]


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}", "{{ messages.x.y }}"])
def test_a_template_that_raises_is_refused(template, gguf, monkeypatch, tmp_path):
    path = with_fields(gguf, monkeypatch, **{"tokenizer.chat_template": template})
    with pytest.raises(PromptError, match="chat template"):
        write_modelfile(path, tmp_path / "Modelfile")
    assert not (tmp_path / "Modelfile").exists()
    assert write_modelfile(path, tmp_path / "Modelfile", format="alpaca").format == "alpaca"


def test_dropped_characters_are_told(gguf, monkeypatch, tmp_path):
    template = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n全角　空格<|im_end|>\n{% endif %}"
    jinja = template.replace("\\n", "\n") + prompts.FORMATS["chatml"].jinja
    path = with_fields(gguf, monkeypatch, **{"tokenizer.chat_template": jinja, "general.license": "apache-2.0"})
    made = write_modelfile(path, tmp_path / "Modelfile")
    assert any("U+3000" in note and "--create" in note for note in made.notes)
    found = said((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert found["system"] == ["全角空格"]
    assert found["license"] == ["apache-2.0"]
    assert recipe_of(path).system == "全角　空格"  # what --create sends


def test_a_template_with_tools_may_be_preferred(gguf, monkeypatch):
    path = with_fields(
        gguf, monkeypatch, **{"tokenizer.chat_template": "{% if tools %}{% endif %}{{ messages[0]['content'] }}"}
    )
    assert any("OLLAMA_GO_TEMPLATE" in note for note in recipe_of(path, "alpaca").notes)


def test_a_file_name_that_ollama_could_not_read(gguf, tmp_path):
    path = tmp_path / "量化　模型.gguf"
    shutil.copy(gguf(vocab="spm-added"), path)
    with pytest.raises(OllamaError, match=r"U\+3000.*Rename it"):
        write_modelfile(path, tmp_path / "Modelfile")
    assert not (tmp_path / "Modelfile").exists()


def test_beside_the_gguf_the_path_is_relative(gguf):
    path = gguf(vocab="spm-added")
    assert modelfile(recipe_of(path), path.parent).startswith(f"FROM ./{path.name}\n")


def test_a_gguf_without_a_template_asks_for_a_format(gguf, tmp_path):
    with pytest.raises(PromptError, match="--format"):
        write_modelfile(gguf(vocab="spm"), tmp_path / "Modelfile")


def test_an_existing_modelfile_is_kept(gguf, tmp_path):
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(OutputExists, match="--force"):
        write_modelfile(gguf(vocab="spm-added"), tmp_path / "Modelfile")
    assert (tmp_path / "Modelfile").read_text() == "mine"


def run(*arguments):
    return CliRunner().invoke(cli, ["ollama", *map(str, arguments)])


def test_several_ggufs_on_the_command_line(gguf, tmp_path):
    paths = [tmp_path / "m-Q4_K_M.gguf", tmp_path / "m-Q8_0.gguf"]
    for path in paths:
        shutil.copy(gguf(vocab="spm-added"), path)
    result = run(*paths, "--json")
    assert result.exit_code == 0, result.output
    assert [m["path"] for m in json.loads(result.output)] == [str(p.with_name(f"{p.stem}.Modelfile")) for p in paths]
    assert "FROM ./m-Q8_0.gguf\n" in (tmp_path / "m-Q8_0.Modelfile").read_text(encoding="utf-8")
    assert json.loads(run(paths[0], "--json").output)["path"] == str(tmp_path / "Modelfile")


# API


def test_a_model_is_made(gguf):
    path = gguf(vocab="spm-added")
    steps, said = [], []
    with serving() as ollama:
        made = create(path, "my-model:q4", host=ollama.url, progress=lambda *at: steps.append(at), say=said.append)
    size = path.stat().st_size
    assert (made.name, made.format, made.sent, made.nbytes) == ("my-model:q4", "chatml", True, size)
    assert steps[-1] == (size, size)
    assert said[-1] == "success"
    (blob,) = ollama.blobs.values()
    assert blob == path.read_bytes()
    sent = ollama.models["my-model:q4"]
    format = prompts.FORMATS["chatml"]
    assert sent["template"] == format.go("<s>", "</s>")
    assert sent["parameters"] == {"num_ctx": 512, "temperature": 0.2, "repeat_penalty": 1.1, "stop": list(format.stop)}
    assert list(sent["files"].values()) == list(ollama.blobs)
    assert "system" not in sent


def test_what_the_server_has_is_not_sent_again(gguf):
    path = gguf(vocab="spm-added")
    with serving() as ollama:
        create(path, "a", host=ollama.url)
        again = create(path, "b", host=ollama.url, format="alpaca")
    assert not again.sent
    assert len([line for line in ollama.seen if line.startswith("POST /api/blobs/")]) == 1
    assert ollama.models["b"]["system"] == prompts.FORMATS["alpaca"].system


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("another digest", "refuses: digest mismatch"),
        ("400", "refuses: invalid model name"),
        ("error while creating", "refuses: .*no space left on device"),
        ("hang up while sending", "broke"),
        ("hang up while creating", "broke"),
        ("no success", "broke off while it made a; its last word was 'writing manifest'"),
        ("not ollama", "does not speak as Ollama"),
    ],
)
def test_what_goes_wrong_is_told(fail, words, wide_gguf):
    with serving(fail) as ollama, pytest.raises(OllamaError, match=words):
        create(wide_gguf, "a", host=ollama.url, format="llama-2")
    assert not ollama.models


def test_without_ollama(gguf, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # nobody listens
        monkeypatch.setenv("OLLAMA_HOST", address)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(OllamaError, match=f"no Ollama answers at {address}. Install it from ollama.com/download"):
            create(gguf(vocab="spm-added"), "a")


@pytest.mark.parametrize("name", ["", "中文", "a b", "a:b:c", "../x", "a/b/c/d", "-a", "a:", "x" * 81, "a\n"])
def test_names_that_ollama_refuses_are_refused_before_anything_is_sent(name, gguf):
    with serving() as ollama, pytest.raises(OllamaError, match="no name for a model"):
        create(gguf(vocab="spm-added"), name, host=ollama.url)
    assert not ollama.seen


@pytest.mark.parametrize("name", ["a", "a:q4_K_M", "me/a", "host.example:5000/me/a:1.0", "A_1.2-b"])
def test_names_that_ollama_takes(name, gguf):
    with serving() as ollama:
        assert create(gguf(vocab="spm-added"), name, host=ollama.url).name == name


def test_a_disk_too_small(gguf, monkeypatch, tmp_path):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1) if folder == tmp_path else None)
    path = gguf(vocab="spm-added")
    with serving() as ollama:
        with pytest.raises(NoSpace, match="3 copies"):
            create(path, "a", host=ollama.url)
        assert not ollama.blobs
        assert create(path, "a", host=ollama.url, force=True).sent


def test_tags_of_several_files(tmp_path):
    files = [tmp_path / f"a-7b-{type}.gguf" for type in ("Q4_K_M", "Q4_K_S", "Q4_K_M-im")]
    assert names("m", files) == ["m:Q4_K_M", "m:Q4_K_S", "m:Q4_K_M-im"]
    assert names("m:x", files[:1]) == ["m:x"]
    with pytest.raises(OllamaError, match="has a tag"):
        names("m:x", files)


def test_the_command_makes_models(gguf, tmp_path):
    paths = [tmp_path / "m-Q4_K_M.gguf", tmp_path / "m-Q8_0.gguf"]
    for i, path in enumerate(paths):
        shutil.copy(gguf(vocab="spm-added", num_hidden_layers=i + 1), path)
    with serving() as ollama:
        result = run(*paths, "--create", "m", "--host", ollama.url)
        assert result.exit_code == 0, result.output
        assert "ollama run m:Q8_0" in result.output
        assert list(ollama.models) == ["m:Q4_K_M", "m:Q8_0"]
        assert json.loads(run(paths[0], "--create", "m", "--host", ollama.url, "--json").stdout)["sent"] is False
    assert not list(tmp_path.glob("*Modelfile"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "x"], "--host needs --create"),
        (["--create", "a", "-o", "M"], "one GGUF"),
        (["--create", "a", "--host", "http://127.0.0.1:99999"], "Is --host right"),
        (["--format", "klingon"], "unknown prompt format"),
    ],
)
def test_wrong_options(arguments, words, gguf):
    result = run(gguf(vocab="spm-added"), *arguments)
    assert result.exit_code != 0
    assert words in result.output
    assert "Traceback" not in result.output


def test_not_a_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4")
    with serving() as ollama:
        result = run(tmp_path / "m.gguf", "--create", "a", "--host", ollama.url)
    assert result.exit_code == 1
    assert "no GGUF" in result.output
    assert not ollama.seen


@pytest.mark.skipif(not shutil.which("ollama"), reason="no Ollama on PATH")
def test_against_a_real_ollama(gguf):
    """What it makes says what was sent, and it renders prompts as we do; it must be running."""
    import httpx
    import ollama

    path, name = gguf(vocab="spm-added"), f"cnq-test-{uuid.uuid4().hex[:8]}"
    client = ollama.Client()
    try:
        client.list()
    except (ConnectionError, httpx.HTTPError):
        pytest.skip("Ollama does not run")
    try:
        create(path, name, format="llama-2")
        shown = client.show(name)
        assert shown.template == recipe_of(path, "llama-2").template
        assert shown.modelfile
        host = os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"
        messages = renderers.CONVERSATIONS["rounds"]
        body = {"model": name, "messages": messages, "stream": False, "_debug_render_only": True}
        reply = httpx.post(f"{host if '://' in host else 'http://' + host}/api/chat", json=body, timeout=60).json()
        rendered = reply.get("_debug_info", {}).get("rendered_template")
        ours = prompts.render(prompts.FORMATS["llama-2"].jinja, messages, bos="<s>", eos="</s>")
        assert rendered is None or rendered == ours.removeprefix("<s>")
    finally:
        client.delete(name)
