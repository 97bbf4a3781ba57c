"""Examinations: files of both benchmarks, the prompt, the scoring."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from cnq.choices import LETTERS, _prompt, _read, _spellings, score_choices
from cnq.cli import cli
from cnq.engine.model import Model
from cnq.errors import CorpusError

HEAD = "id,question,A,B,C,D,answer\n"
ROWS = [f'{i},"第{i}题：1+{i}=？",{i},{i + 1},{i + 2},"{i},0",{LETTERS[i % 4]}\n' for i in range(8)]


@pytest.fixture
def ceval(tmp_path):
    for part, name in (("val", "physics_val"), ("dev", "physics_dev"), ("val", "law_val"), ("dev", "law_dev")):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f"{name}.csv").write_text(HEAD + "".join(ROWS), encoding="utf-8")
    return tmp_path


def test_both_layouts_are_read(ceval, tmp_path):
    (question,) = _read(ceval / "val" / "law_val.csv")[3:4]
    assert (question.text, question.options, question.answer) == ("第3题：1+3=？", ("3", "4", "5", "3,0"), "D")
    cmmlu = tmp_path / "c.csv"
    cmmlu.write_text("\ufeff,Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,b\n", encoding="utf-8")
    assert _read(cmmlu)[0].answer == "B"


@pytest.mark.parametrize("shots", [0, 2])
def test_the_score_is_the_likeliest_letter(ceval, gguf, shots):
    """Against the whole logits of each prompt, computed afresh."""
    path = gguf(vocab="spm", max_position_embeddings=2048)
    found = score_choices(path, ceval, shots=shots, n_ctx=2048)
    with Model(path, n_ctx=2048) as model:
        for subject in found.subjects:
            right = 0
            examples = _read(ceval / "dev" / f"{subject.name}_dev.csv")[:shots]
            for question in _read(ceval / "val" / f"{subject.name}_val.csv"):
                tokens, _ = _prompt(model, subject.name, examples, question)
                logits = model.logits(tokens)[-1]
                scores = [np.log(np.exp(logits[_spellings(model, letter)]).sum()) for letter in LETTERS]
                right += LETTERS[int(np.argmax(scores))] == question.answer
            assert subject.right == right
    assert found.accuracy == pytest.approx(100 * sum(s.right for s in found.subjects) / 16)


def test_the_prompt_is_cevals(ceval, gguf):
    questions = _read(ceval / "val" / "law_val.csv")
    with Model(gguf(), n_ctx=512) as model:
        tokens, cut = _prompt(model, "law", questions[:1], questions[1])
        text = b"".join(model.piece(t) for t in tokens).decode().strip()
    assert not cut
    assert text == (
        "以下是中国关于law考试的单项选择题，请选出其中的正确答案。\n\n"
        "第0题：1+0=？\nA. 0\nB. 1\nC. 2\nD. 0,0\n答案：A\n\n第1题：1+1=？\nA. 1\nB. 2\nC. 3\nD. 1,0\n答案："
    )


def test_examples_that_do_not_fit_are_left_out_and_counted(ceval, gguf):
    found = score_choices(gguf(), ceval, shots=5, n_ctx=256, limit=2)
    assert all(s.truncated == s.n == 2 for s in found.subjects)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no questions"), (HEAD, "no questions"), ("question,A,B\nx,1,2\n", "line 2"), (HEAD + "0,q,1,2,3,4,\n", "use val/"),
     (HEAD + "0,q,1,2,3,4,E\n", "line 2")],
)  # fmt: skip
def test_files_that_are_no_examinations_are_refused(tmp_path, gguf, content, message):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "x_val.csv").write_text(content)
    with pytest.raises(CorpusError, match=message):
        score_choices(gguf(), tmp_path)


def test_an_empty_folder_and_missing_examples_are_refused(tmp_path, ceval, gguf):
    with pytest.raises(CorpusError, match="no examinations"):
        score_choices(gguf(), tmp_path / "none")
    (ceval / "dev" / "law_dev.csv").unlink()
    with pytest.raises(CorpusError, match="no examples for law"):
        score_choices(gguf(), ceval, shots=5)


def test_the_command(ceval, gguf):
    arguments = ["evaluate", str(gguf()), "--choices", str(ceval)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "% of 16 questions" in result.output
    assert len(json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)[0]["subjects"]) == 2
