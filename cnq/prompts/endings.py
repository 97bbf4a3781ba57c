"""Whether an answer ends where llama.cpp sees that it ends: a chat that never stops is the commonest complaint."""

from dataclasses import dataclass
from typing import Any

from .formats import Format
from .rendering import token_text
from .segments import TOKEN, segments

# Besides eos, eot and eom, by their text: llama.cpp src/llama-vocab.cpp, special_eog_ids.
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
    "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip
_QUESTION, _ANSWER = {"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}


@dataclass(frozen=True)
class Ending:
    """What a template writes behind an answer. token: its id, None when the vocabulary has none of that text.

    counted: llama.cpp ends generation there by itself.
    """

    text: str
    token: int | None
    counted: bool

    @property
    def warning(self) -> str | None:
        if self.counted:
            return None
        what = "no token of its vocabulary" if self.token is None else "none of the tokens that llama.cpp stops at"
        return (
            f"its chat template ends answers with {self.text}, which is {what}. cnq stops there; so that other programs do, "
            "name it as eos_token in tokenizer_config.json and convert the model again"
        )


def ending(template: Format | str, fields: dict[str, Any]) -> Ending | None:
    """The end of an answer with a GGUF's tokens; None when the template writes none. Of several tokens, the one that counts.

    Raises PromptError when the template cannot render a question and its answer.
    """
    bos, eos = token_text(fields, "bos"), token_text(fields, "eos")
    (answer,) = (text for text, learned in segments(template, [_QUESTION, _ANSWER], bos=bos, eos=eos) if learned)
    text = answer.rpartition(_ANSWER["content"])[2].strip()
    if not text:
        return None
    tokens = fields.get("tokenizer.ggml.tokens")
    ids = {token: id for id, token in enumerate(tokens)} if isinstance(tokens, list) else {}
    named = {fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    known = [token for token in (text, *TOKEN.findall(text)) if token in ids]
    for token in known:
        if token in _ENDS or ids[token] in named:
            return Ending(token, ids[token], True)
    return Ending(known[0], ids[known[0]], False) if known else Ending(text, None, False)
