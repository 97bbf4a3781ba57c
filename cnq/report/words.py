"""What a report's terms mean, in plain words, Chinese and English, and the form a page is written in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """id: the anchor on the page. zh, en: (name, one plain sentence, how exactly)."""

    id: str
    zh: tuple[str, str, str]
    en: tuple[str, str, str]


TERMS = (
    Term(
        "token",
        ("词元 token", "模型读写文字的单位，是一个字、一个词或其中一部分。", "由模型自己的词表决定"),
        (
            "token",
            "The unit in which a model reads and writes: a word, a character, or part of one.",
            "by the model's own vocabulary",
        ),
    ),
    Term(
        "bpw",
        ("每权重比特", "平均用多少个比特存放模型的一个数；F16 的原模型是 16。", "8 × 全部张量的字节数 / 权重个数，词表在内"),
        (
            "bits per weight",
            "How many bits hold one number of the model on average; an F16 original has 16.",
            "8 × bytes of all tensors / number of weights, vocabulary included",
        ),
    ),
    Term(
        "ppl",
        (
            "困惑度 PPL",
            "模型读一段文字时有多意外：好比每一步平均在多少个词元之间拿不定主意。越小越好；只能在词表相同的模型之间比较。",
            "exp(−ln p(词元) 的平均)",
        ),
        (
            "perplexity PPL",
            "How surprised the model is by a text: as if it wavered between that many tokens at each step. Less is better; "
            "comparable only between models with the same vocabulary.",
            "exp(−mean of ln p(token))",
        ),
    ),
    Term(
        "ratio",
        ("困惑度比", "量化后的 PPL 除以原模型的 PPL：1.02 就是变差 2 %。", "误差计入了两者读的是同样的词元（协方差）"),
        (
            "PPL ratio",
            "The quantized file's PPL over the original's: 1.02 is 2 % worse.",
            "its error takes into account that both read the same tokens (covariance)",
        ),
    ),
    Term(
        "bpb",
        (
            "每字节比特",
            "预测文字的一个字节平均需要多少比特。越小越好；词表不同的模型之间也能比较。",
            "Σ −log2 p(词元) / 计分词元的字节数",
        ),
        (
            "bits per byte",
            "How many bits it takes to predict one byte of the text. Less is better; comparable between vocabularies too.",
            "Σ −log2 p(token) / bytes of the scored tokens",
        ),
    ),
    Term(
        "kld",
        (
            "KL 散度 KLD",
            "量化后的模型对下一个词元的看法与原模型相差多少：0 是完全一样。"
            "它是量化损失最灵敏的度量，因为在每个位置上比较全部词元的概率。",
            "Σ p·(ln p − ln q)，p 是原模型，q 是量化后的模型，对词表求和（ln p ≤ −16 的不计）；单位 nat；对计分词元取平均",
        ),
        (
            "KL divergence KLD",
            "How far the quantized model's opinion on the next token is from the original's: 0 is no difference. The most "
            "sensitive measure of what was lost, as it compares the probabilities of all tokens at every position.",
            "Σ p·(ln p − ln q) over the vocabulary, p the original's, q the quantized model's, without tokens of ln p ≤ −16; "
            "in nats; mean of the scored tokens",
        ),
    ),
    Term(
        "percentiles",
        (
            "KLD 中位数与 99 %",
            "一半的位置低于中位数；一百个位置里有一个高于 99 % 那一栏，它说明最糟的地方有多糟。",
            "同一批 KLD 的百分位数，线性插值",
        ),
        (
            "median KLD, 99 % KLD",
            "Half of the positions lie below the median; one in a hundred lies above the 99 % figure, which tells how bad the "
            "worst places are.",
            "percentiles of the same KLDs, linear interpolation",
        ),
    ),
    Term(
        "top",
        ("首选相同", "在百分之多少的位置上，两个模型认为最可能的下一个词元是同一个。", "argmax p = argmax q；误差按二项分布"),
        (
            "same top token",
            "In what share of the positions both models think the same token likeliest.",
            "argmax p = argmax q; error of the binomial distribution",
        ),
    ),
    Term(
        "dp",
        ("Δp", "真正的下一个词元的概率变动了多少个百分点（均方根）。", "100 × √((q(词元) − p(词元))² 的平均)"),
        (
            "Δp RMS",
            "By how many percentage points the probability of the true next token moved (root mean square).",
            "100 × √(mean of (q(token) − p(token))²)",
        ),
    ),
    Term(
        "error",
        (
            "±",
            "一个标准误差：文字只是抽样，换一段同类的文字，结果多半落在这个范围里。",
            "计分词元的标准差 / √(n − 1)；假定各位置互相独立，所以略偏小",
        ),
        (
            "±",
            "One standard error: the text is a sample, and on another text of its kind the figure would mostly lie in this "
            "range.",
            "standard deviation of the scored tokens / √(n − 1); positions are taken as independent, so it is somewhat too "
            "small",
        ),
    ),
    Term(
        "speed",
        (
            "读、写速度",
            "每秒读入多少个词元的提示（prefill）、写出多少个词元的回答（decode）；只对这台机器成立。",
            "随机词元，预热后测一次：提示一遍读完，回答从空的上下文起逐个计算，与 llama-bench 的 pp、tg 相同",
        ),
        (
            "prefill, decode",
            "How many tokens of a prompt are read in a second, and how many of an answer written; true of this machine only.",
            "random tokens, one run after a warm-up: one pass for the prompt, single-token steps from an empty context for the "
            "answer, as llama-bench's pp and tg",
        ),
    ),
    Term(
        "ram",
        (
            "内存",
            "运行时占用内存的最高值；上下文更长会更多。",
            "只运行这一个文件的进程的常驻内存峰值：文件的页、上下文、缓冲区、Python",
        ),
        (
            "memory",
            "The most memory in use while it ran; a longer context takes more.",
            "peak resident memory of a process that runs this file alone: pages of the file, context, buffers, Python",
        ),
    ),
    Term(
        "imatrix",
        (
            "重要性矩阵 imatrix",
            "事先让原模型读一些文字，记下每一列权重被用得多强；量化时用得强的列舍入得更小心。类型后面的 -im 表示用了它。",
            "每个矩阵的每个输入在校准文字上的 E[x²]",
        ),
        (
            "importance matrix",
            "The original model reads some text beforehand, and how strongly each column of weights is driven is noted; "
            "columns driven harder are then rounded with more care. -im after a type says that one was used.",
            "E[x²] of each input of each matrix over the calibration text",
        ),
    ),
)

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1c1f; --quiet: #5a6068; --line: #d9dce1; --soft: #f3f5f7;
  --accent: #1f7a8c; --take: #e6f3f1; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e6e9; --quiet: #a3aab3; --line: #363c43;
  --soft: #1d2126; --accent: #5cc8bd; --take: #17332f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 78rem; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
html[data-lang="zh"] body [lang="en"], html[data-lang="en"] body [lang="zh"] { display: none; }
h1 { font-size: 1.7rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 52rem; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: .2em; }
code, .file { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; font-size: .9em;
  overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .75rem 1rem; overflow-x: auto; border-radius: .4rem; font-size: .85rem; }
header { display: flex; gap: 1rem; justify-content: space-between; align-items: start; }
nav { white-space: nowrap; }
nav button { font: inherit; font-size: .9rem; color: inherit; background: none; border: 1px solid var(--line);
  padding: .15rem .7rem; cursor: pointer; border-radius: .3rem; }
nav button[aria-pressed="true"] { background: var(--ink); color: var(--page); }
.quiet { color: var(--quiet); font-size: .9rem; }
.verdict { background: var(--take); border-left: .3rem solid var(--accent); padding: .9rem 1.2rem; margin: 1.25rem 0 .5rem; }
.verdict p { font-size: 1.1rem; max-width: 60rem; }
.verdict .quiet p { font-size: .9rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
thead th { font-weight: 600; vertical-align: bottom; white-space: normal; word-break: keep-all;
  border-bottom: 2px solid var(--line); }
thead a { color: inherit; text-decoration-style: dotted; }
.text, tbody th { text-align: left; }
tbody th { font-weight: 400; white-space: normal; min-width: 8rem; }
td.long { white-space: normal; text-align: left; min-width: 16rem; }
tr.take { background: var(--take); }
tr.take th { font-weight: 700; }
tr.base { color: var(--quiet); }
figure { margin: .5rem 0 1rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 38rem; max-width: 68rem; height: auto; }
figure.plot svg { max-width: 54rem; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: .5rem 0; list-style: none; font-size: .9rem; }
.legend i { display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.2em; border: 1px solid var(--line);
  margin-right: .4em; }
details { margin: .25rem 0; font-size: .9rem; }
summary { cursor: pointer; color: var(--quiet); }
dt { font-weight: 600; margin-top: 1rem; }
dd { margin: 0; max-width: 56rem; }
dd .quiet { display: block; }
@media print { nav { display: none; } body { max-width: none; } }
"""

# Without it both languages stand on the page; with it one, to begin with the reader's own.
SCRIPT = """
(function () {
  var root = document.documentElement, nav = document.querySelector("nav"), buttons = nav.querySelectorAll("button");
  function show(lang) {
    root.dataset.lang = lang;
    root.lang = lang === "zh" ? "zh-CN" : "en";
    buttons.forEach(function (b) { b.setAttribute("aria-pressed", String(b.dataset.to === lang)); });
  }
  buttons.forEach(function (b) { b.addEventListener("click", function () { show(b.dataset.to); }); });
  nav.hidden = false;
  show((navigator.language || "").toLowerCase().indexOf("zh") === 0 ? "zh" : "en");
})();
"""
