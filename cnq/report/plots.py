"""The pictures of a report as inline SVG: size against loss, and what happens in which layer.

Text takes the page's colour (currentColor), so that one picture serves light and dark; colours of values are viridis, which
colour-blind people can read. Texts inside are ASCII: which fonts a reader has is not known.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _ACCENT = "#0a0b0c", "#0d0e0f"  # stand-ins: become the page's own colours
_STYLE = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
MAX_ROLES, MAX_LAYERS = 32, 256  # rows and columns of a picture: a hostile file may have any number of them
_MAX_NAME = 24  # characters of a row's or a point's name
_LEVELS = 24


@dataclass(frozen=True)
class Point:
    """A file: size in bytes, mean KLD and its standard error in nats. filled: with an imatrix. sized: made to fit one."""

    label: str
    nbytes: int
    kld: float
    error: float
    filled: bool
    sized: bool = False


@dataclass(frozen=True)
class Cell:
    """value: what the colour says. title: what is read when a mouse rests on it."""

    value: float
    title: str


Grid = Mapping[str, Mapping[int, Cell]]  # role -> layer -> cell


def size_against_kld(points: Sequence[Point], bound: float, label: str) -> str:
    """Each file at its size and KLD, with error bars of one standard error, and the bound as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    unit, name = (1e9, "GB") if max(p.nbytes for p in points) >= 1e9 else (1e6, "MB")
    with _style(label):
        figure = Figure(figsize=(8, 4))
        axes = figure.add_axes((0.09, 0.13, 0.89, 0.8))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_INK)
        axes.axhline(bound, color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)))
        for sized in (False, True) if any(p.sized for p in points) else ():
            line = sorted((p.nbytes / unit, p.kld) for p in points if p.sized == sized)
            axes.plot(*zip(*line, strict=True), color=_ACCENT, linewidth=0.8, linestyle="-" if sized else ":")
        for p in points:
            fill = _ACCENT if p.filled else "none"
            axes.errorbar(
                p.nbytes / unit, p.kld, yerr=p.error, fmt="s" if p.sized else "o", color=_ACCENT, markerfacecolor=fill,
                markersize=7, capsize=4,
                elinewidth=1.2,
            )  # fmt: skip
        axes.margins(x=0.15, y=0.15)
        if min(p.kld for p in points) > 0:
            axes.set_yscale("log")
            low, high = min(*(p.kld for p in points), bound), max(*(p.kld + p.error for p in points), bound)
            axes.set_ylim(low / 1.6, high * 1.6)  # an error bar may reach below zero
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(name)
        axes.set_title("KLD", loc="left", fontsize=10)
        _labels(axes, [(p.nbytes / unit, p.kld, _ascii(p.label)[:_MAX_NAME]) for p in points])
        return _svg(figure, label)


def _labels(axes: "Axes", labels: Sequence[tuple[float, float, str]]) -> None:
    """Write each label beside its point, where it covers no other point or label if there is such a place nearby."""
    axes.get_xlim(), axes.get_ylim()  # settles the scales
    figure: Any = axes.figure
    at = [axes.transData.transform((x, y)) * 72 / figure.dpi for x, y, _ in labels]  # in points, 1/72 inch
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]  # left, bottom, right, top
    for (x, y, text), (px, py) in zip(labels, at, strict=True):
        width = 6.2 * len(text)
        places = []
        for dy in (0, 9, -9, 18, -18, 28, -28):
            for dx, left in ((9, px + 9), (-9, px - 9 - width)):
                places.append((dx, dy, (left, py + dy - 6, left + width, py + dy + 6)))
        free = (p for p in places if not any(_overlap(p[2], other) for other in taken))
        dx, dy, box = next(free, places[0])
        taken.append(box)
        axes.annotate(
            text, (x, y), xytext=(dx, dy), textcoords="offset points", horizontalalignment="left" if dx > 0 else "right",
            verticalalignment="center",
        )  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def type_map(grid: Grid, ends: Mapping[str, Cell], colours: Mapping[float, str], label: str) -> str:
    """A cell for each matrix, coloured by its bits per weight; the embedding and the output as bars below."""
    return _map(grid, ends, lambda value: colours[value], label)


def importance_map(grid: Grid, label: str) -> str:
    """A cell for each matrix, coloured by the logarithm of its value, with a scale beside."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_hex

    values = [cell.value for row in grid.values() for cell in row.values() if cell.value > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else low * 10)
    scale = ScalarMappable(norm, colormaps["viridis"].resampled(_LEVELS))  # so few that the scale is drawn as shapes
    return _map(grid, {}, lambda value: to_hex(tuple(scale.to_rgba(value))) if value > 0 else None, label, scale)


def error_by_layer(losses: Mapping[str, Mapping[int, tuple[float, float]]], label: str) -> str:
    """A panel for each role: layer against the error (before, after), hollow and filled, on a logarithmic scale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    roles = list(losses)[:MAX_ROLES]
    across = min(4, len(roles))
    down = math.ceil(len(roles) / across)
    with _style(label):
        figure = Figure(figsize=(10, 2.1 * down + 0.2), layout="constrained")
        for i, role in enumerate(roles):
            layers = sorted(losses[role])[:MAX_LAYERS]
            axes = figure.add_subplot(down, across, i + 1)
            axes.spines[["top", "right"]].set_visible(False)
            for side, fill in ((0, "none"), (1, _ACCENT)):
                values = [losses[role][layer][side] for layer in layers]
                axes.plot(layers, values, color=_ACCENT, linewidth=0.8, marker="o", markersize=4, markerfacecolor=fill)
            if all(min(losses[role][layer]) > 0 for layer in layers):
                axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.tick_params(labelsize=8)
            axes.set_title(_ascii(role)[:_MAX_NAME], loc="left", fontsize=9, fontfamily="monospace")
        return _svg(figure, label)


def bit_colours(bits: Sequence[float]) -> dict[float, str]:
    """A colour for each number of bits per weight, on one logarithmic scale for all pictures of a report."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = math.log2(min(bits)), math.log2(max(bits))
    viridis = colormaps["viridis"]
    return {b: to_hex(viridis((math.log2(b) - low) / (high - low) if high > low else 0.5)) for b in sorted(set(bits))}


def _map(grid: Grid, ends: Mapping[str, Cell], colour: Any, label: str, scale: Any = None) -> str:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    roles = list(grid)[:MAX_ROLES]
    layers = sorted({layer for role in roles for layer in grid[role]})[:MAX_LAYERS]
    height = len(roles) + (0.5 + len(ends) if ends else 0)  # in rows
    names = [_ascii(name)[:_MAX_NAME] for name in (*roles, *ends)]
    row, below, above = 0.26, 0.36, 0.08  # inches
    whole, left = row * height + below + above, 0.15 + 0.078 * max(map(len, names), default=0)
    titles: list[str] = []
    with _style(label):
        figure = Figure(figsize=(9, whole))
        axes = figure.add_axes((left / 9, below / whole, (8.2 if scale else 8.9) / 9 - left / 9, row * height / whole))

        def draw(x: float, y: float, width: float, cell: Cell) -> None:
            if (fill := colour(cell.value)) is None:
                return
            patch = Rectangle((x, y), width, 1, facecolor=fill, edgecolor=_INK, linewidth=0.35, clip_on=False)
            patch.set_gid(f"cell{len(titles)}")
            titles.append(cell.title)
            axes.add_patch(patch)

        for y, role in enumerate(roles):
            for x, layer in enumerate(layers):
                if cell := grid[role].get(layer):
                    draw(x, y, 1, cell)
        for i, cell in enumerate(ends.values()):
            draw(0, len(roles) + 0.5 + i, max(1, len(layers)), cell)
        axes.set_xlim(0, max(1, len(layers)))
        axes.set_ylim(height, 0)
        axes.set_yticks([*(y + 0.5 for y in range(len(roles))), *(len(roles) + 1 + i for i in range(len(ends)))])
        axes.set_yticklabels(names, fontfamily="monospace", fontsize=9)
        step = max(1, math.ceil(len(layers) / 16))
        axes.set_xticks([x + 0.5 for x in range(0, len(layers), step)])
        axes.set_xticklabels([str(layers[x]) for x in range(0, len(layers), step)])
        axes.set_frame_on(False)
        axes.tick_params(length=0)
        if scale:
            _scale(figure, axes, scale)
        return _svg(figure, label, titles)


def _scale(figure: "Figure", axes: "Axes", scale: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    box = axes.get_position()
    bar: Any = figure.colorbar(scale, cax=figure.add_axes((box.x1 + 0.015, box.y0, 0.015, box.height)))
    bar.outline.set_visible(False)
    decades = math.log10(scale.norm.vmax / scale.norm.vmin)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5), numticks=6))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _style(salt: str) -> Any:
    """salt: makes the ids within a picture its own; the same salt gives the same bytes."""
    from matplotlib import rc_context

    style: Any = _STYLE | {"svg.hashsalt": salt}
    return rc_context(style)


def _ascii(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _svg(figure: "Figure", label: str, titles: Sequence[str] = ()) -> str:
    """The figure as an <svg> element for a page: no size of its own, no fonts, no metadata, `titles` on the cells."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="cell(\d+)">', lambda m: f"<g><title>{escape(titles[int(m[1])])}</title>", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every picture of a page
    body = re.sub(r" font-family: [^;]*sans-serif;", "", body)  # the page's
    body = re.sub(r" font-family: [^;]*monospace;", " font-family: monospace;", body)
    body = re.sub(r"\s+", " ", body).replace('xlink:href="#', 'href="#')
    body = body.replace("> <", "><").replace(_INK, "currentColor").replace(_ACCENT, "var(--accent)")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}">{body.strip()}'
