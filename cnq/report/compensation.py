"""The part of a report's page that tells what compensated rounding gained, text by text and layer by layer."""

from ..paired import Interval
from .data import NONE, ROLES, Compensation, Report, number
from .pieces import both, e, section, table
from .plots import error_by_layer


def compensations(report: Report) -> list[str]:
    """Nothing for a report without compensated files."""
    if not report.compensations:
        return []
    out = [
        section("compensation", "误差互补的舍入", "Rounding that compensates"),
        both(
            "这些文件的类型和字节数与普通舍入的完全相同，只是每个编码的选择顾及了前面各列的舍入误差（GPTQ）。"
            "下表把两者在同样的词元上逐段比较，文字与校准用的不是一类；比值小于 1 就是损失更小，"
            "括号里是 95 % 区间（对各段自助抽样）。",
            "These files have the types and the size of plain rounding; only each code was chosen so that it makes up for the "
            "errors of the columns before it (GPTQ). The table compares both on the same tokens of texts unlike those of "
            "calibration; a ratio below 1 means that less was lost. In brackets: 95 % intervals, from a bootstrap over chunks.",
            "p",
        ),
    ]
    if any(c.domains for c in report.compensations):
        out.append(_compared(report))
    for c in report.compensations:
        kept = sum(o.kept for o in c.outcomes)
        out.append(f'<h3><span class="file">{e(c.path.name)}</span></h3>')
        if c.method == "sequential":
            out.append(
                both(
                    "逐层舍入：每一层还弥补前面各层已经造成的误差；下面的误差包含随输入带来的那一部分（词嵌入与专家除外），"
                    "attn_output 与 ffn_down 的误差以隐藏状态的均方为单位。",
                    "Rounded layer by layer: each layer also makes up for what the layers before it got wrong. The errors "
                    "below hold what comes with the input (but those of a tied embedding and of experts); of attn_output and "
                    "ffn_down they are in shares of the hidden states' mean square.",
                    "p",
                )
            )
        out.append(
            both(
                f"{len(c.outcomes)} 个矩阵里有 {kept} 个采用了互补的编码；"
                "其余的在留出的输入上没有变好，或者不能这样舍入，保持普通编码。",
                f"{kept} of {len(c.outcomes)} matrices have compensated codes; the others were no better on inputs held back, "
                "or cannot be rounded so, and kept plain ones.",
                "p",
            )
        )
        out += [*_plain(c), *_picture(c)]
    return out


_COLUMNS = (
    ("KLD 普通 → 互补", "KLD plain → compensated"),
    ("KLD 之比", "ratio of KLD"),
    ("KLD 中位数之比", "ratio of median KLD"),
    ("首选相同 % 普通 → 互补", "same top % plain → compensated"),
    ("相差（百分点）", "difference in points"),
    ("变好的段", "chunks better"),
)


def _compared(report: Report) -> str:
    head = [f'<th class="text">{both(zh, en)}</th>' for zh, en in (("文件", "file"), ("文字", "text"))]
    head += [f"<th>{both(zh, en)}</th>" for zh, en in _COLUMNS]
    rows = []
    for c in report.compensations:
        for used, p in c.domains:
            cells = (
                f"{number(p.plain)} → {number(p.mine)}",
                ratio(p.kld),
                ratio(p.median),
                f"{p.top_plain:.1f} → {p.top_mine:.1f}",
                f"{p.top.value:+.1f} [{p.top.low:+.1f}, {p.top.high:+.1f}]",
                f"{p.better} / {p.n_chunks}",
            )
            cell = "".join(f"<td>{text}</td>" for text in cells)
            name = f'<span class="file">{e(c.path.name)}</span>'
            rows.append(f'<tr><th scope="row">{name}</th><td class="text">{e(used.name)}</td>{cell}</tr>')
    return table(head, rows)


def ratio(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _plain(c: Compensation) -> list[str]:
    """Which matrices stayed plain, folded up."""
    names: dict[str, list[str]] = {}
    for o in c.outcomes:
        if not o.kept:
            name = o.name.removesuffix(".weight") + ("" if o.expert is None else f" {o.expert}")
            names.setdefault(o.reason or "", []).append(name)
    if not names:
        return []
    lines = "".join(f"<p>{e(reason) or NONE}: <code>{e(', '.join(found))}</code></p>" for reason, found in names.items())
    return [f"<details><summary>{both('保持普通编码的矩阵', 'matrices that stayed plain')}</summary>{lines}</details>"]


def _picture(c: Compensation) -> list[str]:
    losses = c.losses()
    if not losses:
        return []
    ordered = {role: losses[role] for role in (*ROLES, *losses) if role in losses}
    return [
        both(
            "每一层输出的均方误差（对留出的输入），空心是普通舍入，实心是互补的舍入；纵轴按对数。",
            "Mean square of the error at each layer's output, over inputs held back: hollow is plain rounding, filled is "
            "compensated; the scale is logarithmic.",
            "p",
        ),
        f"<figure>{error_by_layer(ordered, f'error by layer of {c.path.name}')}</figure>",
    ]
