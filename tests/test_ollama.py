"""The Modelfile, read back by a parser that follows Ollama's grammar."""

import pytest

from cnq import prompts
from cnq.errors import OutputExists, PromptError
from cnq.ollama import _quoted, modelfile, write_modelfile

COMMANDS = ("FROM", "TEMPLATE", "SYSTEM", "PARAMETER", "LICENSE", "MESSAGE", "ADAPTER")


def parse(text: str) -> list[tuple[str, str]]:
    """(command, value) pairs. A value is the rest of the line, or what stands between triple quotes; there are no escapes."""
    found = []
    while text := text.lstrip("\n"):
        command, _, rest = text.partition(" ")
        name = ""
        if command == "PARAMETER":
            name, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, text = rest[3:].partition('"""')
        else:
            value, _, text = rest.partition("\n")
            value = value.strip()
        assert command in COMMANDS, command
        found.append((f"{command} {name}".strip(), value))
    return found


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_every_format_is_said_outright(name, gguf, tmp_path):
    path = gguf(vocab="spm-added")
    said = parse(modelfile(path, tmp_path, name)[0])
    format = prompts.FORMATS[name]
    assert said[0] == ("FROM", str(path))
    assert ("TEMPLATE", format.go) in said
    assert [value for key, value in said if key == "PARAMETER stop"] == list(format.stop)
    settings = dict(said)
    assert settings["PARAMETER repeat_penalty"] == "1.1"
    assert settings["PARAMETER temperature"] == "0.2"
    assert settings["PARAMETER num_ctx"] == "512"  # what the model was trained with
    assert settings.get("SYSTEM") == format.system


@pytest.mark.parametrize("name", prompts.FORMATS)
def test_no_bos_in_the_template(name):
    """Ollama's tokenizer adds it: a second one spoils the answer. Between turns of LLaMA-2 it belongs."""
    go = prompts.FORMATS[name].go
    assert not go.startswith("<s>")
    assert "<|begin_of_text|>" not in go
    assert go.count("<s>") == ("</s><s>" in go)


def test_the_format_comes_from_the_gguf(gguf, tmp_path):
    _, format, notes = modelfile(gguf(vocab="spm-added"), tmp_path)
    assert format == "chatml"
    assert not notes


def test_beside_the_gguf_the_path_is_relative(gguf):
    path = gguf(vocab="spm-added")
    assert modelfile(path, path.parent)[0].startswith(f"FROM ./{path.name}\n")


def test_a_gguf_without_a_template_asks_for_a_format(gguf, tmp_path):
    with pytest.raises(PromptError, match="--format"):
        write_modelfile(gguf(vocab="spm"), tmp_path / "Modelfile")


def test_an_existing_modelfile_is_kept(gguf, tmp_path):
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(OutputExists, match="--force"):
        write_modelfile(gguf(vocab="spm-added"), tmp_path / "Modelfile")
    assert (tmp_path / "Modelfile").read_text() == "mine"


@pytest.mark.parametrize("value", ["a", "a b", " a", "a ", "a\nb", 'say "x"', "\n", "结束。\n", "### Instruction:"])
def test_values_come_back_as_they_were(value):
    assert parse(f"SYSTEM {_quoted(value)}\nFROM x\n") == [("SYSTEM", value), ("FROM", "x")]


def test_three_quotes_cannot_be_said():
    with pytest.raises(PromptError):
        _quoted('a """\n b')
    with pytest.raises(PromptError):
        _quoted('a\nb"')
