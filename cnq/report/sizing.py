"""The part of a report's page that tells how files were made to fit a size, and whether they beat the stock mixture."""

from ..files import decimal
from .compensation import ratio
from .data import NONE, Report, Sizing, number
from .pieces import both, e, section, table


def sizings(report: Report) -> list[str]:
    """Nothing for a report without such files."""
    found = [s.sizing for s in report.by_size if s.sizing]
    if not found:
        return []
    return [
        section("sizes", "按大小选类型", "Types chosen for a size"),
        both(
            "这些文件的每个张量各用哪一种类型，是按测得的敏感度在大小限制内求出的最优组合。判断用的文字与校准和敏感度的都不同类："
            "比值是它与大小最接近的 llama.cpp 现成搭配（同一个重要性矩阵，普通舍入）的平均 KLD 之比，小于 1 就是损失更小；"
            "括号里是 95 % 区间。两者中较好的一个被留下。",
            "Each tensor of these files has the type that a search within the size found, from measured sensitivities. They "
            "were judged on texts unlike those of calibration: the ratio is that of mean KLD to llama.cpp's own mixture "
            "nearest in size (with the same importance matrix, rounded plainly), below 1 less was lost; in brackets 95 % "
            "intervals. The better of the two was kept.",
            "p",
        ),
        _compared(found),
        *(_details(s) for s in found),
    ]


_COLUMNS = (
    ("大小上限", "budget"),
    ("实际字节", "bytes"),
    ("平均 KLD", "mean KLD"),
    ("KLD 之比", "ratio of KLD"),
    ("中位数之比", "ratio of medians"),
    ("首选相同 %", "same top %"),
    ("预测的 KLD", "predicted KLD"),
    ("首尾所占字节 %", "embedding and output, % of bytes"),
)


def _compared(found: list[Sizing]) -> str:
    head = [f'<th class="text">{both(zh, en)}</th>' for zh, en in (("文件", "file"), ("留下的", "kept"))]
    head += [f"<th>{both(zh, en)}</th>" for zh, en in _COLUMNS]
    rows = []
    for s in found:
        p = s.compared
        cells = (
            f"{s.budget:,}",
            f"{s.contenders[0].nbytes:,}",
            f"{number(p.plain)} → {number(p.mine)}" if p else NONE,
            ratio(p.kld) if p else NONE,
            ratio(p.median) if p else NONE,
            f"{p.top_plain:.1f} → {p.top_mine:.1f}" if p else NONE,
            number(s.predicted),
            f"{100 * s.ends:.0f}",
        )
        kept = both("搭配所得", "the search's") if s.kept == "allocation" else e(s.kept)
        name = f'<span class="file">{e(s.path.name)}</span>'
        row = "".join(f"<td>{e(text)}</td>" for text in cells)
        rows.append(f'<tr><th scope="row">{name}</th><td class="text">{kept}</td>{row}</tr>')
    return table(head, rows)


def _details(s: Sizing) -> str:
    """All that was measured, folded up."""
    lines = []
    for c in s.contenders:
        if c.kld is not None:
            figures = f"KLD {number(c.kld)} ± {number(c.error, 2)}, median {number(c.median)}, top {number(c.top)} %"
            lines.append(f"<p>{e(c.name)}, {e(c.rounding)}: {decimal(c.nbytes)}, {e(figures)}</p>")
    texts = ", ".join(f"{u.name}: {u.chunks}" for u in s.held_out)
    took = ", ".join(f"{stage} {number(seconds)} s" for stage, seconds in s.seconds.items())
    lines.append(f"<p>{e(texts)}</p><p>{e(took)}</p>" if texts else f"<p>{e(took)}</p>")
    title = both("比较过的文件与用时", "what was compared, and how long it took")
    return f"<details><summary>{e(s.path.name)}: {title}</summary>{''.join(lines)}</details>"
