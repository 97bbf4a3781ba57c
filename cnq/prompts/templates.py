"""The two shapes that formats have, each as a Jinja template (transformers, llama.cpp) and as a Go template (Ollama).

Both say the same of every conversation. Ollama joins messages of one role that follow each other by an empty line before its
template sees them, and hands it all system messages joined likewise: so the Jinja templates do that themselves.
"""

import json
import re
from dataclasses import dataclass
from string import Template

BOS, EOS = "{bos}", "{eos}"  # stand for the model's own tokens in the strings of a format, and in its Go template
_NO_SYSTEM = "not messages or messages[0]['role'] != 'system'"

_TURNS = Template("""\
$begin{%- for m in messages -%}
{%- if loop.first or messages[loop.index0 - 1]['role'] != m['role'] -%}
{{- $open + m['role'] + $mid -}}
{%- else -%}
{{- '\\n\\n' -}}
{%- endif -%}
{{- m['content'] -}}
{%- if loop.last or messages[loop.index0 + 1]['role'] != m['role'] -%}
{{- $close -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- $open + 'assistant' + $mid -}}
{%- endif -%}""")
_DEFAULT_TURN = Template("""\
{%- if $no_system -%}
{{- $open + 'system' + $mid + $system + $close -}}
{%- endif -%}
""")


@dataclass(frozen=True)
class Turns:
    """Every message, of whatever role, is open + role + mid + text + close. begin: comes before the first."""

    open: str
    mid: str
    close: str
    begin: str = ""

    def jinja(self, system: str | None) -> str:
        """system: text of the system message that a conversation without one begins with."""
        values = {"open": _text(self.open), "mid": _text(self.mid), "close": _text(self.close)}
        default = _DEFAULT_TURN.substitute(values, system=_text(system), no_system=_NO_SYSTEM) if system else ""
        return _TURNS.substitute(values, begin=_printed(_text(self.begin)) + default)

    def go(self) -> str:
        turn = self.open + "{{ .Role }}" + self.mid + "{{ .Content }}" + self.close
        return self.begin + "{{ range .Messages }}" + turn + "{{ end }}" + self.open + "assistant" + self.mid


# The system text is gathered by hand: in filters, llama-server does not see that a template uses it, and puts it elsewhere.
_ROUNDS = Template("""\
{%- set ns = namespace(system=$default) -%}
{%- for m in messages if m['role'] == 'system' -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system or not loop.first else '') + m['content'] -%}
{%- endfor -%}
{%- set system = $stated if ns.system else '' -%}
$begin{%- set ns.user = $user -%}
{%- for m in messages -%}
{%- set opens = loop.first or messages[loop.index0 - 1]['role'] != m['role'] -%}
{%- set closes = loop.last or messages[loop.index0 + 1]['role'] != m['role'] -%}
{%- if m['role'] == 'user' -%}
{{- (ns.user if opens else '\\n\\n') + m['content']$after_user -}}
{%- set ns.user = $next_user -%}
{%- elif m['role'] == 'assistant' -%}
{{- ($answer if opens else '\\n\\n') + m['content']$after_answer -}}
{%- elif m['role'] != 'system' -%}
{{- raise_exception('it knows the roles system, user and assistant, not ' + m['role']) -}}
{%- endif -%}
{%- endfor -%}
""")
_HEADER = Template("""\
{%- if add_generation_prompt -%}
{{- $header -}}
$end{%- endif -%}""")
_END = Template("""\
{%- elif messages and messages[-1]['role'] == 'assistant' -%}
{{- $end -}}
""")


class _Go(Template):
    delimiter = "@"  # Go has variables with a $


_GO_ROUNDS = _Go("""\
@begin{{ range .Messages }}{{ if eq .Role "user" }}@user{{ .Content }}@after_user\
{{ else if eq .Role "assistant" }}@answer{{ .Content }}@after_answer{{ end }}{{ end }}@header""")
_GO_SYSTEM = _Go("{{ if .System }}@before{{ .System }}@after{{ end }}")
_GO_SYSTEM_ONCE = _Go('{{ if $system }}@before{{ $system }}@after{{ $system = "" }}{{ end }}')


@dataclass(frozen=True)
class Rounds:
    """A question and its answer make a round; all system text stands at one place.

    user, answer: what comes before and after their texts. header: calls for an answer, before answer[0]; prompts end with it.
    system: before and after its text, nothing of which is there when there is none. inside: it stands in the first question,
    else before it. begin: before everything. between: before each question but the first. end: after the answer that ends a
    text for training: of formats whose authors put no end token between rounds.
    """

    user: tuple[str, str]
    header: str = ""
    answer: tuple[str, str] = ("", "")
    system: tuple[str, str] = ("", "")
    inside: bool = False
    begin: str = ""
    between: str = ""
    end: str = ""

    def jinja(self, system: str | None) -> str:
        """system: text that is there when the conversation does not begin with a system message."""
        rounds = _ROUNDS.substitute(
            default=f"{_text(system)} if {_NO_SYSTEM} else ''" if system else "''",
            stated=_sum(_text(self.system[0]), "ns.system", _text(self.system[1])),
            begin=_printed(_sum(_text(self.begin), "" if self.inside else "system")),
            user=_sum(_text(self.user[0]), "system" if self.inside else ""),
            after_user=_closing(self.user[1]),
            next_user=_text(self.between + self.user[0]),
            answer=_text(self.header + self.answer[0]) or "''",
            after_answer=_closing(self.answer[1]),
        )
        end = _END.substitute(end=_text(self.end)) if self.end else ""
        return rounds + (_HEADER.substitute(header=_text(self.header), end=end) if self.header else "")

    def go(self) -> str:
        before, after = self.system
        begin = "{{ $system := .System }}" if self.inside else _GO_SYSTEM.substitute(before=before, after=after)
        user = self.user[0] + (_GO_SYSTEM_ONCE.substitute(before=before, after=after) if self.inside else "")
        after_user = self.user[1]
        if self.between:
            begin += '{{ $between := "" }}'
            user = "{{ $between }}" + user
            after_user += f"{{{{ $between = {json.dumps(self.between, ensure_ascii=False)} }}}}"
        return _GO_ROUNDS.substitute(
            begin=self.begin + begin,
            user=user,
            after_user=after_user,
            answer=self.header + self.answer[0],
            after_answer=self.answer[1],
            header=self.header,
        )


def _text(text: str) -> str:
    """A text as a Jinja expression: strings, and the variables that hold the model's tokens. Empty for no text."""
    tokens = {BOS: "bos_token", EOS: "eos_token"}
    return _sum(*(tokens.get(part) or _string(part) for part in re.split(r"(\{bos\}|\{eos\})", text) if part))


def _string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _sum(*terms: str) -> str:
    return " + ".join(filter(None, terms))


def _printed(expression: str) -> str:
    return f"{{{{- {expression} -}}}}\n" if expression else ""


def _closing(text: str) -> str:
    return f" + ({_text(text)} if closes else '')" if text else ""
