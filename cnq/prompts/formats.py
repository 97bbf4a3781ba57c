"""The formats themselves, as data. Sources stand beside each."""

from dataclasses import dataclass, field
from functools import cached_property

from ..errors import PromptError
from .templates import BOS, EOS, Rounds, Turns

BILINGUAL = "You are a helpful assistant. 你是一个乐于助人的助手。"
ALPACA_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA_PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHINESE_VICUNA_PREAMBLE = (
    "The following is a conversation between an AI assistant called Assistant and a human user called User. "
    "The assistant is intelligent, knowledgeable and polite to answer questions of user."
)


@dataclass(frozen=True)
class Format:
    """shape: what stands around the texts. system: what the model was trained to find first when the user gives nothing.

    stop: text that never belongs to an answer. temperature, repeat_penalty: the authors' settings. parameters: more for Ollama.
    """

    name: str
    shape: Turns | Rounds
    stop: tuple[str, ...]
    system: str | None = None
    temperature: float = 0.2
    repeat_penalty: float = 1.1
    parameters: dict[str, int] = field(default_factory=dict)

    @cached_property
    def jinja(self) -> str:
        """The template for transformers and llama.cpp."""
        return self.shape.jinja(self.system)

    def go(self, bos: str = "", eos: str = "", *, adds_bos: bool = True) -> str:
        """The template for Ollama, whose system text, the default included, comes from elsewhere.

        bos, eos: the model's tokens as text. adds_bos: its tokenizer puts bos first, so the template must not.
        """
        template = self.shape.go()
        if adds_bos:
            template = template.removeprefix(BOS)
        return template.replace(BOS, bos).replace(EOS, eos)


# ymcui/Chinese-LLaMA-Alpaca: scripts/inference/inference_hf.py; between rounds as in scripts/inference/gradio_demo.py
ALPACA = Format(
    name="alpaca",
    shape=Rounds(
        begin=BOS, system=("", "\n\n"), user=("### Instruction:\n\n", ""), header="\n\n### Response:\n\n", between="\n\n",
        end=EOS,
    ),
    stop=("### Instruction:",),
    system=ALPACA_PREAMBLE,
)  # fmt: skip

# the same, scripts/training/build_dataset.py: what the models were trained with
ALPACA_TRAINING = Format(
    name="alpaca-training",
    shape=Rounds(
        begin=BOS, system=("", "\n\n"), user=("### Instruction:\n", ""), header="\n\n### Response: ", between="\n\n", end=EOS,
    ),
    stop=("### Instruction:",),
    system=ALPACA_PREAMBLE,
)  # fmt: skip

# ymcui/Chinese-LLaMA-Alpaca-2: scripts/inference, scripts/training/build_dataset.py
LLAMA_2 = Format(
    name="llama-2",
    shape=Rounds(
        begin=BOS, system=("<<SYS>>\n", "\n<</SYS>>\n\n"), inside=True, user=("[INST] ", " [/INST]"), answer=(" ", EOS),
        between=BOS,
    ),
    stop=("[INST]",),
    system=BILINGUAL,
)  # fmt: skip

# ymcui/Chinese-LLaMA-Alpaca-3: scripts/ollama/Modelfile
LLAMA_3 = Format(
    name="llama-3",
    shape=Turns(begin=BOS, open="<|start_header_id|>", mid="<|end_header_id|>\n\n", close="<|eot_id|>"),
    stop=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    system=BILINGUAL,
    parameters={"num_keep": 24},
)

# Qwen and many others
CHATML = Format(
    name="chatml",
    shape=Turns(open="<|im_start|>", mid="\n", close="<|im_end|>\n"),
    stop=("<|im_start|>", "<|im_end|>"),
)

# lm-sys/FastChat: fastchat/conversation.py, vicuna_v1.1
VICUNA = Format(
    name="vicuna",
    shape=Rounds(begin=BOS, system=("", " "), user=("USER: ", ""), header=" ASSISTANT:", answer=(" ", EOS)),
    stop=("USER:",),
    system=VICUNA_PREAMBLE,
    temperature=0.7,
    repeat_penalty=1.0,
)

# Facico/Chinese-Vicuna: prompt.py, chat_prompt; settings of scripts/generate.sh
CHINESE_VICUNA = Format(
    name="chinese-vicuna",
    shape=Rounds(begin=BOS, system=("", "\n\n"), user=("User:", ""), header="\n\nAssistant:", between="\n\n", end=EOS),
    stop=("\n\nUser:",),
    system=CHINESE_VICUNA_PREAMBLE,
    temperature=0.1,
    repeat_penalty=2.0,
)

# michael-wzhu/PromptCBLUE: src/ft_llama_lora. It has single rounds without system text; both are put in line with them here
PROMPTCBLUE = Format(
    name="promptcblue",
    shape=Rounds(
        begin=BOS, system=("", "\n"), inside=True, user=("问：\n", ""), header="\n答：\n", answer=("", "\n" + EOS), between=BOS,
    ),
    stop=("\n问：",),
    temperature=0.0,
    repeat_penalty=1.0,
)  # fmt: skip

# baichuan-inc/Baichuan-13B-Chat: modeling_baichuan.py, tokens 195 and 196; generation_config.json
BAICHUAN = Format(
    name="baichuan",
    shape=Rounds(user=("<reserved_102>", ""), header="<reserved_103>", answer=("", EOS)),
    stop=("<reserved_102>",),
    temperature=0.3,
)

# baichuan-inc/Baichuan2: generation_utils.py and fine-tune/fine-tune.py, tokens 195 and 196; generation_config.json
BAICHUAN_2 = Format(
    name="baichuan-2",
    shape=Rounds(user=("<reserved_106>", ""), header="<reserved_107>", end=EOS),
    stop=("<reserved_106>",),
    temperature=0.3,
    repeat_penalty=1.05,
)

# nilboy/chinese-llama-65b
LLAMA_65B = Format(
    name="65b",
    shape=Rounds(
        begin=BOS,
        system=("<|im_start|>system\n", "\n<|im_end|>\n"),
        user=("<|im_start|>user\n", "\n<|im_end|>"),
        header="\n<|im_start|>assistant\n",
        answer=("", "\n<|im_end|>"),
        between="\n",
    ),
    stop=("<|im_start|>", "<|im_end|>"),
    temperature=0.1,
    repeat_penalty=1.3,
)

FORMATS = {
    f.name: f
    for f in (
        ALPACA, ALPACA_TRAINING, LLAMA_2, LLAMA_3, CHATML, VICUNA, CHINESE_VICUNA, PROMPTCBLUE, BAICHUAN, BAICHUAN_2, LLAMA_65B,
    )
}  # fmt: skip
ALIASES = {"alpaca-2": "llama-2", "qwen": "chatml"}


def named(name: str) -> Format:
    """Raises PromptError for a name that is not known."""
    if (name := ALIASES.get(name, name)) not in FORMATS:
        raise PromptError(f"unknown prompt format {name}; known are {', '.join((*FORMATS, *ALIASES))}.")
    return FORMATS[name]
