"""Chat formats: how a conversation becomes the text that a model was trained on, and where its answer ends.

One Jinja template a format serves training, chat, server and the GGUF itself; the Go template beside it says the same to
Ollama. Sources: ymcui/Chinese-LLaMA-Alpaca scripts/inference/inference_hf.py and scripts/training/build_dataset.py;
Chinese-LLaMA-Alpaca-2 scripts/inference; Chinese-LLaMA-Alpaca-3 scripts/ollama/Modelfile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import PromptError

Message = dict[str, str]  # role: system, user or assistant; content

BILINGUAL = "You are a helpful assistant. 你是一个乐于助人的助手。"
ALPACA_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Format:
    """jinja: for transformers and llama.cpp. go: for Ollama, without BOS, which its tokenizer adds.

    system: what the model was trained to find first when the user gives nothing. stop: text that never belongs to an answer.
    temperature, repeat_penalty: the authors' settings.
    """

    name: str
    jinja: str
    go: str
    stop: tuple[str, ...]
    system: str | None = None
    temperature: float = 0.2
    repeat_penalty: float = 1.1
    parameters: dict[str, int] = field(default_factory=dict)


_SYSTEM_FIRST = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = 'DEFAULT' -%}{%- set turns = messages -%}
{%- endif -%}
"""

_GO_FIRST_USER = '{{- $first := 0 }}{{- if eq (index .Messages 0).Role "system" }}{{- $first = 1 }}{{- end }}'

ALPACA = Format(
    name="alpaca",
    jinja=_SYSTEM_FIRST.replace("DEFAULT", ALPACA_PREAMBLE) + "{{- bos_token + system + '\\n\\n' -}}"
    "{%- for m in turns -%}"
    "{%- if m['role'] == 'user' -%}{{- '### Instruction:\\n\\n' + m['content'] + '\\n\\n### Response:\\n\\n' -}}"
    "{%- else -%}{{- m['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}",
    go=(
        "{{ if .System }}{{ .System }}\n\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}### Instruction:\n\n{{ .Content }}\n\n### Response:\n\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}\n\n{{ end }}{{ end }}'
    ),
    stop=("### Instruction:",),
    system=ALPACA_PREAMBLE,
)

LLAMA_2 = Format(
    name="llama-2",
    jinja=_SYSTEM_FIRST.replace("DEFAULT", BILINGUAL) + "{%- for m in turns -%}"
    "{%- if m['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '')"
    " + m['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}",
    go=_GO_FIRST_USER
    + '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}[INST] {{ if and $.System (eq $i $first) }}<<SYS>>\n'
    "{{ $.System }}\n<</SYS>>\n\n{{ end }}{{ .Content }} [/INST]"
    '{{ else if eq .Role "assistant" }} {{ .Content }}</s><s>{{ end }}{{ end }}',
    stop=("[INST]",),
    system=BILINGUAL,
)

LLAMA_3 = Format(
    name="llama-3",
    jinja=_SYSTEM_FIRST.replace("DEFAULT", BILINGUAL) + "{%- macro turn(role, content) -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + content + '<|eot_id|>' -}}"
    "{%- endmacro -%}"
    "{{- bos_token + turn('system', system) -}}"
    "{%- for m in turns -%}{{- turn(m['role'], m['content']) -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}",
    go="{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    stop=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    system=BILINGUAL,
    parameters={"num_keep": 24},
)

CHATML = Format(
    name="chatml",
    jinja="{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    go="{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    stop=("<|im_start|>", "<|im_end|>"),
)

FORMATS = {f.name: f for f in (ALPACA, LLAMA_2, LLAMA_3, CHATML)}


def named(name: str) -> Format:
    """Raises PromptError for a name that is not known."""
    if name not in FORMATS:
        raise PromptError(f"unknown prompt format {name}; known are {', '.join(FORMATS)}.")
    return FORMATS[name]


def render(jinja: str, messages: Sequence[Message], *, bos: str = "", eos: str = "", add_generation_prompt: bool = True) -> str:
    """The conversation as text, with the beginning-of-text token as text where the template puts it.

    Templates come with models from anywhere: they run in jinja2's immutable sandbox, set up as transformers does.
    Raises PromptError when the template refuses the conversation or cannot run.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise PromptError(f"the model's chat template refuses this conversation: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now}
    try:
        template = environment.from_string(jinja)
        return template.render(
            messages=list(messages), bos_token=bos, eos_token=eos, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PromptError(f"the model's chat template cannot be rendered: {error}. Choose a format with --format.") from error


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def of_template(jinja: str) -> tuple[Format, str | None] | None:
    """(format, system text the template adds by itself) when a Jinja template says what one of FORMATS says, else None.

    Told by what it renders, not by its text: three conversations must come out alike.
    """
    conversations: list[list[Message]] = [
        [{"role": "system", "content": "SYS"}, {"role": "user", "content": "甲"}],
        [{"role": "system", "content": "SYS"}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "乙。"},
         {"role": "user", "content": "c"}],
    ]  # fmt: skip

    def rendered(template: str, messages: list[Message]) -> str:
        return render(template, messages, bos="<bos>", eos="</s>").removeprefix("<bos>")

    for candidate in FORMATS.values():
        try:
            if all(rendered(jinja, c) == rendered(candidate.jinja, c) for c in conversations):
                return candidate, _own_system(jinja, candidate)
        except PromptError:
            continue
    return None


def _own_system(jinja: str, candidate: Format) -> str | None:
    """The system text that a template adds when the conversation has none."""
    user: Message = {"role": "user", "content": "甲"}
    bare = render(jinja, [user]).removeprefix("<bos>")
    marked = render(candidate.jinja, [{"role": "system", "content": "\0"}, user])
    before, after = marked.split("\0")
    if bare.startswith(before) and bare.endswith(after) and len(bare) >= len(before) + len(after):
        return bare[len(before) : len(bare) - len(after)]
    return None


def template_of(fields: dict[str, Any]) -> str | None:
    """A GGUF's own chat template, the default one where there are several."""
    template = fields.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None
