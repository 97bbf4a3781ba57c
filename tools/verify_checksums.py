"""Whether the files of models are those that were published; and digests of their tensors, which re-saving does not change.

python tools/verify_checksums.py llama/7B llama/13B
python tools/verify_checksums.py chinese-alpaca-7b-hf zh-models/7B --content
"""

import hashlib
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from cnq import terminal
from cnq.checkpoint import open_checkpoint
from cnq.checkpoint.digest import overall, tensor_digests
from cnq.errors import CheckpointError
from cnq.options import FILE, Command

KNOWN: dict[str, str] = {
    digest: what
    for part in tomllib.loads(Path(__file__).with_name("known_sha256.toml").read_text(encoding="utf-8")).values()
    for digest, what in part.items()
}
_CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")  # Meta's: md5sum's own lines
_HASHED = (".pth", ".bin", ".safetensors", ".model")
_LINE = re.compile(r"([0-9a-f]{32}) [ *](?:\./)?(.+)")


@dataclass(frozen=True)
class Verdict:
    """known: what the file was published as. listed: whether it is in a checklist. wrong: why it is not what it should be."""

    path: Path
    sha256: str | None
    known: str | None
    listed: bool
    wrong: str | None

    def __str__(self) -> str:
        said = [f"known as {self.known}"] if self.known else []
        said += ["matches the checklist"] if self.listed else []
        digest = f"  sha256 {self.sha256}" if self.sha256 else ""
        return f"{self.path}: {f'WRONG, {self.wrong}' if self.wrong else ', '.join(said) or 'unknown'}{digest}"


def verify(folder: Path) -> list[Verdict]:
    """Look at every file of weights, every tokenizer.model, and whatever a checklist names. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no directory. Give the directories of models.")
    expected = dict(_checklist(folder))
    names = sorted({p.name for p in folder.iterdir() if p.suffix in _HASHED and p.is_file()} | expected.keys())
    if not names:
        raise CheckpointError(
            f"{folder} holds no weights ({', '.join(_HASHED)}) and no checklist.chk. Give a model's directory."
        )
    verdicts = [_verdict(folder / name, expected.get(name)) for name in names]
    return verdicts + [Verdict(folder / what.split(" ")[1], None, None, False, f"{what} is missing, or not as published")
                       for what in _incomplete(verdicts)]  # fmt: skip


def _checklist(folder: Path) -> Iterator[tuple[str, str]]:
    """(file name, md5) of every line of the folder's checklists."""
    for file in (folder / name for name in _CHECKLISTS):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
            found = _LINE.fullmatch(line)
            if not found or Path(found[2]).name != found[2]:
                raise CheckpointError(f"{file}: {line!r} is not the md5 and name of a file beside it. Download it again.")
            yield found[2], found[1]


def _verdict(path: Path, expected: str | None) -> Verdict:
    if not path.is_file():
        return Verdict(path, None, None, True, "it is in the checklist, but not here")
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            md5.update(block)
            sha256.update(block)
    known = KNOWN.get(sha256.hexdigest())
    wrong = None
    if expected is not None and md5.hexdigest() != expected:
        wrong = "it is not the file of the checklist: download it again"
    elif known and path.name.startswith("consolidated.") and not known.endswith(f" {path.name}"):
        wrong = f"by its content it is {known}"
    return Verdict(path, sha256.hexdigest(), known, expected is not None, wrong)


def _incomplete(verdicts: list[Verdict]) -> list[str]:
    """What is missing of the published models that a shard is here of."""
    found = {v.known for v in verdicts if v.known and " consolidated." in v.known}
    models = {what.split(" ")[0] for what in found}
    return [what for what in KNOWN.values() if " consolidated." in what and what.split(" ")[0] in models and what not in found]


@click.command(cls=Command)
@click.argument("folders", nargs=-1, required=True, type=FILE, metavar="DIR...")
@click.option("--content", is_flag=True, help="Print digests of tensors instead, alike for .pth, .bin and safetensors.")
def main(folders: Sequence[Path], content: bool) -> None:
    """Verify models' files by Meta's checklist.chk beside them and the published sha256; exit code 1 if one is wrong.

    With --content, each line is a tensor's sha256, name, type and shape; the last stands for all of them.

    \b
    python tools/verify_checksums.py llama/7B llama/13B
    python tools/verify_checksums.py chinese-alpaca-7b-hf --content
    """
    if content:
        for folder in folders:
            _show_content(folder)
        return
    verdicts = [verdict for folder in folders for verdict in verify(folder)]
    for verdict in verdicts:
        click.echo(terminal.one_line(str(verdict)))
    if any(v.wrong for v in verdicts):
        sys.exit(1)


def _show_content(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.placed()  # no digest of half a model
    with terminal.Progress().bar(f"reading {folder}", "bytes") as progress:
        digests = tensor_digests(checkpoint, progress)
    for name, (kind, digest) in sorted(digests.items()):
        click.echo(f"{digest}  {name}  {kind}")
    click.echo(f"{overall(digests)}  {folder}: all {len(digests)} tensors")


if __name__ == "__main__":
    main(prog_name="python tools/verify_checksums.py")
