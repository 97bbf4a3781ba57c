"""The whole road: checkpoint → F16 GGUF → importance matrix → quantized GGUFs → Modelfile → report, resumed where it stopped.

Beside each output stands <output>.made.json: what it was made from. A step whose record still holds is skipped.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import catalog
from .allocate.measure import text_of
from .allocate.search import Budget
from .checkpoint.meta_tokenizer import folder_of
from .convert import convert
from .corpus import Used, cutter, peoples_daily
from .engine.quantizer import Outcome
from .evaluate import evaluate
from .files import require_memory, require_space
from .fitting import FRONTIER, Fitting, Progress, fit, frontier_sizes, name_of
from .gguf_file import GgufFile
from .hessian_file import beside, is_complete, manifest_path
from .imatrix import collect
from .machine import this_machine
from .ollama import write_modelfile
from .paired import Paired, compare
from .quantize import ALIASES, quantize
from .report import Compensation, Report, Sizing, Subject, write_report
from .speed import measure_speed
from .steps import Done, files_of, named, record_path, step, versions
from .texts import calibration_texts, unlike_texts
from .to_hf import to_hf

_ROUNDED_ALIKE = ("Q8_0", "F16", "BF16", "F32")  # an importance matrix changes nothing in these
_DOMAIN_SHARE = 4  # of the chunks that a build measures on, each text unlike the calibration's gets a quarter more
N_CTX = 512  # tokens of a chunk, llama-imatrix's and llama-perplexity's own


@dataclass(frozen=True)
class Made:
    """One GGUF of a build. seconds: None when it was there already. compensation: what came of it; empty: rounded plainly.

    sizing: how it was made to fit a size; None: it has the types of llama.cpp's mixture.
    """

    path: Path
    type: str
    bits_per_weight: float
    nbytes: int
    seconds: float | None
    notes: tuple[str, ...]
    compensation: tuple[Outcome, ...] = ()
    sizing: Sizing | None = None


@dataclass(frozen=True)
class Built:
    """report: report.json, with report.html and a model card beside it; None when nothing was measured."""

    model: str
    files: tuple[Made, ...]
    modelfile: Path
    format: str | None
    report: Path | None
    question: str

    @property
    def result(self) -> Path:
        """The last file asked for: what a chat starts with."""
        return self.files[-1].path


def build(
    model: str,
    types: Iterable[str],
    *,
    out: Path | None = None,
    loras: Sequence[str] = (),
    format: str | None = None,
    dtype: str = "f16",
    chunks: int = 100,
    eval_chunks: int = 40,
    rounding: str = "compensated",
    hessian_memory: int = 0,
    budget: Budget | None = None,
    effort: str = "normal",
    frontier: bool = False,
    threads: int = 0,
    progress: Progress,
) -> Built:
    """Take MODEL the whole road and leave everything in `out` (default: models/<name>).

    model: a catalog name, a path or a hub id. loras: adapters to merge into it, paths or hub ids, in this order.
    types: names of llama.cpp's quantizations. format: of the prompt, for a model whose checkpoint has no chat template;
    default: the catalog's. dtype: of the float GGUF. chunks: of 512 tokens of Chinese and English text for the importance
    matrix; 0 = round without one. eval_chunks: of held-out text to measure on; 0 = do not measure. rounding: of quantize;
    but for "plain" second moments are collected with the importance matrix. hessian_memory: bytes for their sums, 0 = what is
    free. budget: a size to find the best types for, with so much effort; the file comes last.
    frontier: do the same for the sizes of five of llama.cpp's mixtures, and make these too.
    Raises what the steps raise, and NoSpace before the first of them.
    """
    entry = catalog.with_loras(catalog.find(model), loras)
    folder = out or Path("models") / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(entry, folder)
    adapters = catalog.fetch_loras(entry, folder / "loras", progress.say)
    source = catalog.fetch(entry, folder / "source", progress.say)
    if source.is_file() and not adapters:  # whether a GGUF is fit to be a base is for the merge to say
        source = _restored(source, folder / "hf", progress)
    float_gguf = folder / f"{entry.title}-{dtype.upper()}.gguf"
    template = format or entry.prompt
    made = [_converted(source, adapters, float_gguf, dtype, entry.title, template, progress)]
    _require_memory(float_gguf)
    calibrated = None
    if chunks:
        imatrix = folder / f"{entry.title}.imatrix.gguf"
        calibrated = _calibrated(float_gguf, imatrix, chunks, rounding, hessian_memory, threads, progress)
    for type in dict.fromkeys([*types, *(FRONTIER if frontier else ())]):
        made.append(_quantized(float_gguf, calibrated, folder, entry.title, type, rounding, threads, progress))
    sizes = frontier_sizes(float_gguf, calibrated.path if calibrated else None, rounding) if frontier else []
    budgets = [*sizes, *([budget] if budget else [])]
    made += _fitted(float_gguf, calibrated, folder, entry.title, budgets, rounding, effort, eval_chunks, threads, progress)
    modelfile = write_modelfile(made[-1].path, folder / "Modelfile", format=format, force=True)
    for note in modelfile.notes:
        progress.say(note)
    written = None
    if eval_chunks:
        written = _reported(entry, made, calibrated, modelfile.format, folder / "report.json", eval_chunks, threads, progress)
    return Built(entry.name, tuple(made), modelfile.path, modelfile.format, written, entry.question)


def _require_room(entry: catalog.Model, folder: Path) -> None:
    """The float GGUF and a Q4_K_M beside the checkpoint; exact sizes are checked again at each step."""
    if entry.path and entry.path.is_dir():
        need = sum(f.stat().st_size for f in entry.path.glob("*") if f.suffix in (".safetensors", ".bin", ".pth"))
    else:
        need = 2 * (entry.params or 0)
    done = sum(f.stat().st_size for f in folder.glob("*.gguf"))
    require_space(folder, max(0, int(need * 1.35) - done))


def _require_memory(gguf: Path) -> None:
    """llama.cpp decodes one tensor at a time to float32 while it quantizes."""
    largest = max(t.n_elements for t in GgufFile(gguf).tensors.values())
    require_memory(largest * 6, f"quantize {gguf.name}")


def _restored(gguf: Path, folder: Path, progress: Progress) -> Path:
    def work() -> Done:
        with progress.bar(f"{gguf.name} → {folder.name}/", "bytes") as tick:
            to_hf(gguf, folder, force=True, progress=tick)
        return Done()

    step(folder, named(gguf), {}, work, progress.skipped)
    return folder


def _converted(
    source: Path, loras: Sequence[Path], dst: Path, dtype: str, name: str, format: str | None, progress: Progress
) -> Made:
    def work() -> Done:
        task = f"merging {len(loras)} LoRAs and converting" if loras else "converting"
        with progress.bar(f"{task} to {dtype.upper()}", "bytes") as tick:
            found = convert(source, dst, dtype=dtype, name=name, format=format, loras=loras, force=True, progress=tick)
        return Done(found.notes)

    inputs = files_of(source)
    if folder_of(source) == source.parent:
        inputs |= named(source.parent / "tokenizer.model")
    for number, lora in enumerate(loras, 1):
        inputs |= {f"lora {number}/{name}": file for name, file in files_of(lora).items()}
    seconds, done = step(dst, inputs, {"dtype": dtype, "name": name, "format": format}, work, progress.skipped)
    return Made(dst, dtype.upper(), GgufFile(dst).bits_per_weight, dst.stat().st_size, seconds, done.notes)


@dataclass(frozen=True)
class _Calibrated:
    path: Path
    manifest: tuple[Used, ...]
    seconds: float | None


def _calibrated(src: Path, dst: Path, chunks: int, rounding: str, memory: int, threads: int, progress: Progress) -> _Calibrated:
    """The importance matrix, and beside it second moments, from the calibration half of the default corpus."""
    hessian = rounding != "plain"
    if hessian and not is_complete(beside(dst), text=rounding == "sequential"):
        record_path(dst).unlink(missing_ok=True)  # somebody made room: the matrix alone is not enough

    def work() -> Done:
        with progress.bar("calibrating", "chunks") as tick:
            text = cutter(calibration_texts(), N_CTX, chunks, "calibration")
            found = collect(
                src, text, dst, n_ctx=N_CTX, hessian=hessian, hessian_memory=memory, threads=threads, force=True, progress=tick
            )
        return Done(found.notes, {"manifest": [asdict(u) for u in found.manifest]})

    options = {"chunks": chunks, "n_ctx": N_CTX, "hessian": hessian}
    seconds, done = step(dst, named(src), options, work, progress.skipped)
    return _Calibrated(dst, tuple(Used(**u) for u in done.facts["manifest"]), seconds)


def _reported(
    entry: catalog.Model,
    made: list[Made],
    calibrated: _Calibrated | None,
    format: str | None,
    dst: Path,
    n_chunks: int,
    threads: int,
    progress: Progress,
) -> Path:
    """Measure every quantized file against the float one, time them, and write the report."""
    base, *quantized = made

    def work() -> Done:
        with progress.bar("measuring", "chunks") as tick:
            found = evaluate(
                [m.path for m in quantized],
                cutter([peoples_daily("held-out")], N_CTX, n_chunks, "held-out"),
                base=base.path,
                n_ctx=N_CTX,
                threads=threads,
                progress=tick,
            )
        compensations = _compared(base, quantized, calibrated, n_chunks, threads, progress)
        with progress.bar("timing", "files") as tick:
            speeds = []
            for i, m in enumerate(made, 1):
                speeds.append(measure_speed(m.path, threads=threads))
                tick(i, len(made))
        measured = [found.base, *found.models]
        subjects = [
            Subject(m.path, m.type, m.path.stem.endswith("-im"), measure, speed, m.sizing)
            for m, measure, speed in zip(made, measured, speeds, strict=True)
        ]
        took = {m.path.name: m.seconds for m in made} | {"importance matrix": calibrated and calibrated.seconds}
        write_report(
            Report(
                title=entry.title,
                base=subjects[0],
                subjects=tuple(subjects[1:]),
                n_ctx=found.n_ctx,
                n_chunks=found.n_chunks,
                n_scored=found.n_scored,
                held_out=found.manifest,
                calibration=calibrated.manifest if calibrated else (),
                imatrix=calibrated.path if calibrated else None,
                format=format,
                licence=entry.licence,
                source=_source(entry),
                versions=versions(),
                machine=this_machine(),
                seconds={k: v for k, v in took.items() if v} | {"measuring": found.seconds},
                compensations=compensations,
            ),
            dst.parent,
        )
        return Done()

    inputs = named(*(m.path for m in made), *([calibrated.path] if calibrated else []))
    step(dst, inputs, {"chunks": n_chunks, "n_ctx": N_CTX, "format": format}, work, progress.skipped)
    return dst


def _compared(
    base: Made, made: Sequence[Made], calibrated: _Calibrated | None, n_chunks: int, threads: int, progress: Progress
) -> tuple[Compensation, ...]:
    """The compensated files beside plain ones of the same types, which are made for that and go again."""
    compensated = [m for m in made if m.compensation]
    if not compensated or not calibrated:
        return ()
    n_chunks = max(2, n_chunks // _DOMAIN_SHARE)
    domains: dict[Path, list[tuple[Used, Paired]]] = {m.path: [] for m in compensated}
    with tempfile.TemporaryDirectory(prefix=".cnq-", dir=base.path.parent) as scratch:
        plain = [Path(scratch) / m.path.name for m in compensated]
        with progress.bar("rounding plainly, to compare", "files") as tick:
            for i, (m, path) in enumerate(zip(compensated, plain, strict=True), 1):
                quantize(base.path, path, m.type, imatrix=calibrated.path, rounding="plain", threads=threads)
                tick(i, len(plain))
        for source in unlike_texts():
            with progress.bar(f"comparing on {source.name}", "chunks") as tick:
                paths = [*(m.path for m in compensated), *plain]
                text = cutter([source], N_CTX, n_chunks, "held-out")
                found = evaluate(paths, text, base=base.path, n_ctx=N_CTX, threads=threads, progress=tick)
            half = len(compensated)
            for mine, theirs in zip(found.models[:half], found.models[half:], strict=True):
                domains[mine.path].append((found.manifest[0], compare(theirs, mine, found.n_chunks)))
    return tuple(
        Compensation(m.path, m.compensation, tuple(domains[m.path]), GgufFile(m.path).field("cnq.rounding.method"))
        for m in compensated
    )


def _source(entry: catalog.Model) -> str | None:
    """Base and adapters, for a report that others read: of local ones the name alone."""
    base = entry.hub or entry.wheel or (entry.path.name if entry.path else None)
    loras = [Path(lora).resolve().name if Path(lora).exists() else lora for lora in entry.loras]
    return " + ".join([base, *loras]) if base else None


def _quantized(
    src: Path,
    calibrated: _Calibrated | None,
    folder: Path,
    title: str,
    type: str,
    rounding: str,
    threads: int,
    progress: Progress,
) -> Made:
    type = ALIASES.get(type.upper(), type.upper())
    imatrix = calibrated.path if calibrated and type not in _ROUNDED_ALIKE else None
    rounding = rounding if imatrix else "plain"
    dst = folder / f"{title}-{type}{'-im' if imatrix else ''}.gguf"

    def work() -> Done:
        with progress.bar(f"quantizing to {type}", "tensors") as tick:
            found = quantize(
                src, dst, type, imatrix=imatrix, rounding=rounding, threads=threads, force=True,
                progress=lambda _, i, n: tick(i, n),
            )  # fmt: skip
        return Done(found.notes, {"compensation": [asdict(outcome) for outcome in found.compensation]})

    inputs = named(src, imatrix) if imatrix else named(src)
    if imatrix and rounding != "plain":
        inputs |= {"second moments": manifest_path(beside(imatrix))}
    seconds, done = step(dst, inputs, {"type": type, "rounding": rounding}, work, progress.skipped)
    outcomes = tuple(Outcome(**outcome) for outcome in done.facts["compensation"])
    return Made(dst, type, GgufFile(dst).bits_per_weight, dst.stat().st_size, seconds, done.notes, outcomes)


def _fitted(
    src: Path,
    calibrated: _Calibrated | None,
    folder: Path,
    title: str,
    budgets: Sequence[Budget],
    rounding: str,
    effort: str,
    n_chunks: int,
    threads: int,
    progress: Progress,
) -> list[Made]:
    """A file for each budget, judged on texts unlike the calibration's."""
    imatrix = calibrated.path if calibrated else None
    judged = max(2, n_chunks // 2) if n_chunks else 0
    fitting = Fitting(
        imatrix=imatrix,
        text=text_of(calibration_texts(), sum(u.chunks for u in calibrated.manifest) if calibrated else 0),
        rounding=rounding if imatrix else "plain",
        effort=effort,
        held_out=cutter(unlike_texts(), N_CTX, judged, "held-out") if judged else None,
        judged=judged,
    )
    made = []
    for budget in budgets:
        dst = folder / f"{title}-{name_of(budget)}{'-im' if imatrix else ''}.gguf"
        seconds, done, sizing = fit(src, dst, budget, fitting, threads, progress)
        bits = GgufFile(dst).bits_per_weight
        type = f"{bits:.2f} bpw" if sizing.kept == "allocation" else sizing.kept
        made.append(Made(dst, type, bits, dst.stat().st_size, seconds, done.notes, (), sizing))
    return made
