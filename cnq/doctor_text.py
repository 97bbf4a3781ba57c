"""What a person reads of `cnq doctor`, in Chinese and English, 80 columns wide."""

from collections.abc import Iterable
from itertools import groupby

import click

from .doctor import Checkup, Fit
from .terminal import one_line, size

_WIDTH = 80
_UNKNOWN = "这里看不到 cannot be told here"


def show(found: Checkup) -> None:
    _lines("机器 machine", _machine(found))
    _lines("llama.cpp", _build(found))
    _fits(found)
    _lines("其他 besides", _besides(found))
    for advice in found.advice:
        click.echo()
        _wrapped("! ", advice.zh)
        _wrapped("  ", advice.en)
        if advice.command:
            click.echo(f"  {advice.command}")  # in one piece, to be pasted


def _machine(found: Checkup) -> Iterable[tuple[str, str]]:
    m = found.machine
    yield "处理器 CPU", one_line(m.cpu)
    yield "核 cores", f"{m.cores} 个物理核 physical, {found.threads} 个线程 threads"
    yield "指令 instructions", _UNKNOWN if found.instructions is None else " ".join(found.instructions)
    yield "内存 memory", f"{size(m.memory)}, 空闲 free {size(found.free_memory)}"
    if found.rates:
        how = f"llama.cpp, F16, {found.read_bytes >> 20} MiB × {m.cores} threads, 中位数 median of 7"
        yield "带宽 bandwidth", f"{found.rates['F16'] / 1e9:.1f} GB/s 读 read ({how})"


def _build(found: Checkup) -> Iterable[tuple[str, str]]:
    yield "版本 version", f"llama-cpp-python {found.bindings}, ggml {found.build.get('ggml', '?')}"
    flags = [name if value == "1" else f"{name}={value}" for name, value in found.build.items() if name != "ggml"]
    yield "编译 compiled for", " ".join(flags) or "—"


def _fits(found: Checkup) -> None:
    """A line for each model: how fast to expect it as each type; and the sizes and contexts of Q4_K_M."""
    if not found.fits:
        return
    types = list(dict.fromkeys(fit.type for fit in found.fits))
    head = ["MODEL", *types, "文件 file", "上下文 context"]
    rows = []
    for model, group in groupby(found.fits, lambda fit: fit.model):
        fits = {fit.type: fit for fit in group}
        q4 = fits["Q4_K_M"]
        rows.append([model, *(_speed(fits[type]) for type in types), size(q4.nbytes), str(q4.n_ctx or "—")])
    click.echo()
    click.echo(click.style("模型 models", bold=True) + "  预计每秒词元数 tokens a second to expect")
    _grid([head, *rows], right=True)
    click.echo("文件和上下文以 Q4_K_M 计 file and context: as Q4_K_M")
    click.echo("— 内存不够 too little memory    * 先关掉别的程序 close other programs first")
    click.echo("实测 to measure: cnq bench M.gguf")


def _speed(fit: Fit) -> str:
    if not fit.n_ctx:
        return "—"
    return f"{fit.speed:.{0 if fit.speed >= 20 else 1}f}{'' if fit.now else '*'}"


def _besides(found: Checkup) -> Iterable[tuple[str, str]]:
    o = found.ollama
    state = f"在应答 answers at {o.server}" if o.answers else f"没有应答 no answer at {o.server}"
    program = f"{o.version or ''} {o.program or ''}".strip() or "没有安装 not installed"
    yield "Ollama", one_line(f"{program}; {state}")
    yield "磁盘 disk", f"{found.folder}/ 空闲 free {size(found.free_disk)}"
    yield "Python", f"{found.python}, {found.venv or '不在虚拟环境里 no virtual environment'}"
    for name, value in found.environment.items():
        yield name, one_line(value)
    for name, trouble in (found.online or {}).items():
        label = {"hub": "模型 hub", "index": "包 index"}[name]
        yield label, one_line(trouble) if trouble else "可用 answers"


def _lines(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    click.echo()
    click.echo(click.style(title, bold=True))
    _grid([[f"  {label}", text] for label, text in pairs])


def _grid(rows: list[list[str]], right: bool = False) -> None:
    """Columns side by side, wide characters counted as two; the last one wraps. right: all but the first flush right."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    for i in range(len(rows[0])):
        grid.add_column(justify="right" if right and i else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*row)
    _print(grid)


def _wrapped(mark: str, text: str) -> None:
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(mark, text)
    _print(grid)


def _print(what: object) -> None:
    from rich.console import Console

    Console(highlight=False, markup=False, width=_WIDTH).print(what)
