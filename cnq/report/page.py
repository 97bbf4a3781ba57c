"""A report as one HTML page that needs nothing else: no network, no other file, no font. Chinese and English.

Whatever comes from a file goes through `_e` on its way into the page; the page's policy lets no script run but its own.
"""

import base64
import hashlib
from math import isfinite

import numpy as np

from ..allocate.groups import ENDS, place
from ..files import decimal
from ..imatrix_file import Importance
from .compensation import compensations
from .data import (
    KLD_BOUND,
    NONE,
    ROLES,
    Choice,
    Report,
    Subject,
    clean,
    number,
    with_error,
)
from .pieces import both, e, section, table
from .plots import (
    MAX_LAYERS,
    MAX_ROLES,
    Cell,
    Grid,
    Point,
    bit_colours,
    importance_map,
    size_against_kld,
    type_map,
)
from .sizing import sizings
from .words import SCRIPT, STYLE, TERMS


def page(report: Report, choice: Choice | None, importance: Importance | None) -> str:
    """The page's text. importance: the content of report.imatrix. The same arguments give the same bytes."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = e(report.title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="zh-CN">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="cnq">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>',
            f'<header><h1>{title}</h1><nav hidden><button type="button" data-to="zh" lang="zh-CN">中文</button>',
            '<button type="button" data-to="en">English</button></nav></header>',
            _subtitle(report),
            _verdict(report, choice),
            section("files", "各个文件", "The files"),
            _files(report, choice),
            *_plot(report),
            *sizings(report),
            *compensations(report),
            *_types(report, choice),
            *_importance(report, importance),
            section("terms", "名词", "The terms"),
            _terms(),
            section("how", "每个数字的来历", "How every figure was made"),
            *_how(report),
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


# Pieces


def _file(subject: Subject) -> str:
    return f'<span class="file">{e(subject.path.name)}</span>'


def _subtitle(report: Report) -> str:
    parts = []
    if report.source:
        parts.append(both("来源", "from") + f" <code>{e(report.source)}</code>")
    if report.licence:
        parts.append(both("许可", "licence") + f" {e(report.licence)}")
    if report.format:
        parts.append(both("提示格式", "prompt format") + f" {e(report.format)}")
    return f'<p class="quiet">{" · ".join(parts)}</p>' if parts else ""


def _verdict(report: Report, choice: Choice | None) -> str:
    """Which file to take and why, and the rule that said so."""
    if choice is None:
        zh = "没有与原模型比较过，所以说不出该取哪一个文件。请运行 <code>cnq evaluate … --against …</code>。"
        en = "Nothing was compared with the original, so no file can be advised. Run <code>cnq evaluate … --against …</code>."
        return f'<div class="verdict">{both(zh, en, "p")}</div>'
    s = choice.subject
    name, size, kld = _file(s), decimal(s.nbytes), with_error(choice.kld)
    if choice.within:
        zh = f"请取 <b>{name}</b>（{size}）：它是与原模型几乎没有差别的文件里最小的一个，平均 KLD 为 {kld}。"
        en = (
            f"Take <b>{name}</b> ({size}): it is the smallest file that hardly differs from the original, with a mean KLD "
            f"of {kld}."
        )
    else:
        zh = (
            f"没有一个文件的平均 KLD 在 {KLD_BOUND} 以内。与原模型最接近的是 <b>{name}</b>（{size}），为 {kld}；"
            "若内存够用，请再量化一个更大的类型。"
        )
        en = (
            f"No file has a mean KLD within {KLD_BOUND}. The closest to the original is <b>{name}</b> ({size}), with {kld}; if "
            "there is memory for it, quantize to a larger type."
        )
    share = number(100 * s.nbytes / max(1, report.base.nbytes), 2)
    zh += f"它的大小是原模型的 {share} %"
    en += f" Its size is {share} % of the original's"
    if s.measured and s.measured.against:
        same = number(s.measured.against.same_top.value)
        zh += f"，最可能的下一个词元在 {same} % 的位置上与原模型相同"
        en += f", and its likeliest next token is the same in {same} % of the positions"
    if s.speed:
        zh += f"，运行约需 {decimal(s.speed.ram)} 内存"
        en += f"; running it takes about {decimal(s.speed.ram)} of memory"
    rule_zh = (
        f"规则：平均 KLD 加两倍标准误差不超过 {KLD_BOUND} 的最小文件；没有这样的文件，就取 KLD 最小的。"
        "界限的由来：llama.cpp 测 Llama 3 8B 的表里，4 比特的 K 量化都在 0.05 以下，3 比特的都在以上。"
    )
    rule_en = (
        f"The rule: the smallest file whose mean KLD, with twice its standard error added, is at most {KLD_BOUND}; failing "
        "that, the one of the least KLD. Where the bound comes from: in llama.cpp's table for Llama 3 8B the 4-bit K-quants "
        "lie below 0.05 and the 3-bit ones above."
    )
    notes = ""
    if names := report.measured_on_calibration:
        listed = "、".join(e(n) for n in names)
        notes = both(
            f"注意：重要性矩阵与这些数字出自同一段文字（{listed}），所以数字会比实际好看一些。",
            f"Note: importance matrix and figures come from the same text ({listed}), which flatters the figures.",
            "p",
        )
    rule = f'<div class="quiet">{both(rule_zh, rule_en, "p")}</div>'
    return f'<div class="verdict">{both(zh + "。", en + ".", "p")}{notes}{rule}</div>'


_COLUMNS = (  # anchor of the term, zh, en (HTML)
    (None, "大小", "size"),
    ("bpw", "每权重<br>比特", "bits/<wbr>weight"),
    ("ppl", "PPL", "PPL"),
    ("ratio", "PPL 比", "PPL ratio"),
    ("bpb", "每字节<br>比特", "bits/<wbr>byte"),
    ("kld", "平均 KLD", "mean KLD"),
    ("percentiles", "KLD<br>中位数", "median KLD"),
    ("percentiles", "99 % KLD", "99 % KLD"),
    ("top", "首选<br>相同 %", "same top %"),
    ("dp", "Δp %", "Δp RMS %"),
    ("speed", "写<br>词元/秒", "decode tok/s"),
    ("speed", "读<br>词元/秒", "prefill tok/s"),
    ("ram", "内存", "memory"),
)


def _files(report: Report, choice: Choice | None) -> str:
    head = [f'<th class="text">{both("文件", "file")}</th>', f'<th class="text">{both("类型", "type")}</th>']
    for anchor, zh, en in _COLUMNS:
        name = zh if zh == en else both(zh, en)
        head.append(f'<th><a href="#{anchor}">{name}</a></th>' if anchor else f"<th>{name}</th>")
    rows = []
    for s in (*report.by_size, report.base):
        kind = ' class="base"' if s is report.base else ' class="take"' if choice and s is choice.subject else ""
        cells = "".join(f"<td>{e(cell).replace(' ±', '<br>±')}</td>" for cell in figures(s))
        rows.append(f'<tr{kind}><th scope="row">{_file(s)}</th><td class="text">{e(s.label)}</td>{cells}</tr>')
    return table(head, rows) + both(
        "灰色一行是原模型；底色一行是上面推荐的文件。点列名看解释。",
        "The grey row is the original; the shaded one is the file advised above. A column's name leads to its explanation.",
        "p",
        "quiet",
    )


def figures(s: Subject) -> list[str]:
    """A subject's figures, in the order of the columns."""
    m, speed = s.measured, s.speed
    a = m.against if m else None
    return [
        decimal(s.nbytes),
        f"{s.bits_per_weight:.2f}",
        with_error(m.ppl if m else None),
        with_error(a.ratio if a else None),
        number(m.bits_per_byte if m else None, 4),
        with_error(a.kld if a else None),
        number(a.kld_percentiles[50] if a else None),
        number(a.kld_percentiles[99] if a else None),
        with_error(a.same_top if a else None),
        with_error(a.dp_rms if a else None),
        number(speed.decode if speed else None),
        number(speed.prefill if speed else None),
        decimal(speed.ram) if speed else NONE,
    ]


def _plot(report: Report) -> list[str]:
    points = [
        Point(s.label, s.nbytes, s.kld.value, s.kld.error, s.imatrix, bool(s.sizing))
        for s in report.by_size
        if s.kld and isfinite(s.kld.value)
    ]
    if not points:
        return []
    lines = ""
    if any(p.sized for p in points):
        lines = both(
            "方块是按大小选类型的文件，圆点是 llama.cpp 现成的搭配；线把同类的连起来。",
            "Squares are files whose types were chosen for a size, circles llama.cpp's own mixtures; lines join each kind.",
            "p",
        )
    return [
        section("plot", "大小与损失", "Size against loss"),
        both(
            f"横轴是文件大小，纵轴是平均 KLD；越靠左越小，越靠下越接近原模型。竖线是一个标准误差，虚线是 {KLD_BOUND} 的界限；"
            "实心点用了重要性矩阵，空心点没有。",
            f"Across: the file's size. Up: mean KLD. Left is smaller, down is closer to the original. Bars are one standard "
            f"error, the dashed line is the bound of {KLD_BOUND}; filled points were made with an importance matrix, hollow "
            "ones without.",
            "p",
        ),
        lines,
        f"<figure class=plot>{size_against_kld(points, KLD_BOUND, 'size against mean KLD')}</figure>",
    ]


def _types(report: Report, choice: Choice | None) -> list[str]:
    """A picture for each file; the one advised comes first."""
    grids: list[tuple[Subject, Grid, dict[str, Cell]]] = []
    bits: dict[float, set[str]] = {}
    for s in sorted(report.by_size, key=lambda s: not (choice and s is choice.subject)):
        rows: dict[str, dict[int, Cell]] = {}
        ends: dict[str, Cell] = {}
        for t in s.file.tensors.values():
            if where := place(t):
                role, layer = where
                cell = Cell(t.type.bits, clean(f"{t.name}: {t.type.name}, {t.type.bits:g} bits"))
                bits.setdefault(t.type.bits, set()).add(t.type.name)
                if layer is None:
                    ends[role] = cell
                else:
                    rows.setdefault(role, {})[layer] = cell
        if rows:
            grids.append((s, _ordered(rows), {name: ends[name] for name in ENDS if name in ends}))
    if not grids:
        return []
    colours = bit_colours(list(bits))
    legend = "".join(
        f'<li><i style="background:{colours[b]}"></i>{e(", ".join(sorted(bits[b])))} <span class="quiet">{b:g}</span></li>'
        for b in sorted(bits)
    )
    out = [
        section("types", "哪一层用了什么类型", "Which layer got which type"),
        both(
            "每一格是一个权重矩阵：行是它在一层里的角色，列是层号，颜色是每权重比特，越亮越精细；下面的长条是词嵌入与输出矩阵。"
            "把鼠标停在格子上可以看到张量的名字。",
            "Each cell is a matrix of weights: rows are its role within a layer, columns the layer, the colour its bits per "
            "weight, brighter is finer; the bars below are the token embedding and the output. Rest the mouse on a cell for "
            "its name.",
            "p",
        ),
        f'<ul class="legend">{legend}</ul>',
    ]
    for i, (s, grid, ends) in enumerate(grids):
        exact = "; ".join(f"{n} × {e(name)} ({decimal(nbytes)})" for name, (n, nbytes) in s.tensor_types.items())
        picture = type_map(grid, ends, colours, f"{i + 1}: tensor types of {s.label}")
        out.append(f'<h3>{_file(s)}</h3><figure>{picture}</figure><p class="quiet">{exact}</p>{_cut(grid)}')
    return out


def _ordered(rows: dict[str, dict[int, Cell]]) -> Grid:
    known = [role for role in ROLES if role in rows]
    return {role: rows[role] for role in (*known, *(r for r in rows if r not in known))}


def _cut(grid: Grid) -> str:
    n_layers = len({layer for row in grid.values() for layer in row})
    if len(grid) <= MAX_ROLES and n_layers <= MAX_LAYERS:
        return ""
    return both(
        f"图里只画了 {len(grid)} 行中的前 {MAX_ROLES} 行、{n_layers} 层中的前 {MAX_LAYERS} 层。",
        f"Drawn are the first {MAX_ROLES} of {len(grid)} rows and the first {MAX_LAYERS} of {n_layers} layers.",
        "p",
    )


def _importance(report: Report, importance: Importance | None) -> list[str]:
    if importance is None or report.imatrix is None:
        return []
    rows: dict[str, dict[int, Cell]] = {}
    means = importance.means()
    for t in report.base.file.tensors.values():
        where = place(t)
        if where and where[1] is not None and t.name in means:
            value = float(np.mean(means[t.name], dtype=np.float64))
            rows.setdefault(where[0], {})[where[1]] = Cell(value, clean(f"{t.name}: {value:.4g}"))
    if not rows:
        return []
    grid = _ordered(rows)
    return [
        section("importance", "哪一层的输入有多强", "How strongly each layer is driven"),
        both(
            "每一格是进入一个矩阵的数的均方（E[x²] 对各列的平均），取自重要性矩阵，颜色按对数。"
            "量化时用的不是这个平均值，而是每一列各自的值；attn_q、attn_k、attn_v 的输入相同，ffn_gate 与 ffn_up 也相同。",
            "Each cell is the mean square of the numbers that enter a matrix (E[x²], averaged over its columns), from the "
            "importance matrix; colours are logarithmic. Quantizing uses each column's own value, not this mean. attn_q, "
            "attn_k and attn_v have the same input, and so have ffn_gate and ffn_up.",
            "p",
        ),
        f"<figure>{importance_map(grid, 'mean of E[x^2] by role and layer')}</figure>{_cut(grid)}",
    ]


def _terms() -> str:
    items = []
    for t in TERMS:
        items.append(f'<dt id="{t.id}">{both(e(t.zh[0]), e(t.en[0]))}</dt>')
        items.append(f"<dd>{both(e(t.zh[1]), e(t.en[1]))} {both(e(t.zh[2]), e(t.en[2]), 'span', 'quiet')}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _how(report: Report) -> list[str]:
    out = []
    if report.n_chunks:
        out.append(
            both(
                f"文字切成 {report.n_chunks} 段，每段 {report.n_ctx} 个词元（词表要求时以 BOS 开头）；每段的后一半计分，共 "
                f"{report.n_scored:,} 个词元。原模型与量化后的模型读同样的词元。定义与 llama.cpp 的 llama-perplexity 相同。",
                f"The text is cut into {report.n_chunks} chunks of {report.n_ctx} tokens, beginning with BOS where the "
                f"vocabulary asks for it; the second half of each is scored, {report.n_scored:,} tokens in all. The original "
                "and the quantized models read the same tokens. The definitions are those of llama.cpp's llama-perplexity.",
                "p",
            )
        )
    uses = [(both("测量", "measuring"), u) for u in report.held_out]
    uses += [(both("重要性矩阵", "importance matrix"), u) for u in report.calibration]
    if uses:
        heads = (("文字", "text"), ("用于", "used for"), ("部分", "part"))
        head = [f'<th class="text">{both(*h)}</th>' for h in heads]
        counts = (("文档", "documents"), ("字符", "characters"), ("词元", "tokens"), ("段", "chunks"))
        head += [f"<th>{both(*h)}</th>" for h in counts] + ['<th class="text">sha256</th>']
        rows = [
            f'<tr><th scope="row">{e(u.name)}</th><td class="text">{use}</td><td class="text">{e(u.split or NONE)}</td>'
            f"<td>{u.documents:,}</td><td>{u.characters:,}</td><td>{u.tokens:,}</td><td>{u.chunks:,}</td>"
            f'<td class="text"><code>{e(u.sha256)}</code></td></tr>'
            for use, u in uses
        ]
        out.append(table(head, rows))
    speeds = [s.speed for s in (*report.subjects, report.base) if s.speed]
    facts = [
        (
            both("机器", "machine"),
            f"{e(report.machine.cpu)}, {report.machine.cores} {both('核', 'cores')}, {decimal(report.machine.memory)}",
        ),
        *(
            [
                (
                    both("速度的条件", "speed measured with"),
                    f"{speeds[0].n_prompt} + {speeds[0].n_gen} {both('词元', 'tokens')}, "
                    f"{speeds[0].threads} {both('线程', 'threads')}",
                )
            ]
            if speeds
            else []
        ),
        (both("版本", "versions"), e(", ".join(f"{k} {v}" for k, v in report.versions.items())) or NONE),
        (both("用时", "time taken"), e(", ".join(f"{k} {number(v)} s" for k, v in report.seconds.items())) or NONE),
    ]
    if report.imatrix:
        facts.append((both("重要性矩阵", "importance matrix"), f"<code>{e(report.imatrix.name)}</code>"))
    out.append(
        f'<div class="scroll"><table>{"".join(f"<tr><th>{k}</th><td class=long>{v}</td></tr>" for k, v in facts)}</table></div>'
    )
    if report.commands:
        out.append(both("用过的命令，依次是：", "What was typed, in order:", "p"))
        out.append(f"<pre>{chr(10).join(e(c) for c in report.commands)}</pre>")
    out.append(
        both(
            "同样的数字，连同全部百分位数，在 <a href='report.json'>report.json</a> 里。",
            "The same figures, with all percentiles, are in <a href='report.json'>report.json</a>.",
            "p",
        )
    )
    return out
