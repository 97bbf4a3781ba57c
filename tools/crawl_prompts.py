"""Instructions and answers for training, asked of a model behind any endpoint of OpenAI's protocol: docs/crawl.md.

python tools/crawl_prompts.py instructions.json --endpoint https://api.openai.com/v1 --model gpt-4o-mini --n 10000
"""

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
from crawl.collection import Collection, opened
from crawl.endpoint import Endpoint, EndpointError, GaveUp, Reply, is_local
from crawl.items import Item, prompt, read

from cnq import terminal
from cnq.errors import CnqError, listed
from cnq.options import FILE, JSON, Command

_FAILURES = 5  # requests given up one after the other
_FRUITLESS = 20  # replies one after the other with nothing to keep


@dataclass(frozen=True)
class Crawled:
    """n: records in the file now. before: that were there. counts: by the names of the table, in its order."""

    path: Path
    n: int
    before: int
    counts: dict[str, int]
    seconds: float


class Crawl:
    """Asks until the collection has what is wanted. counts: what came of it, kept up to date."""

    def __init__(self, endpoint: Endpoint, collection: Collection, n_each: int, progress: terminal.Progress):
        self._endpoint, self._collection, self._n_each, self._progress = endpoint, collection, n_each, progress
        self._draw = random.Random()
        self._found: Counter[str] = Counter()
        self._failures = self._fruitless = 0

    @property
    def counts(self) -> dict[str, int]:
        """Of requests, then of what their replies held."""
        first = ("requests", "asked again", "given up", "replies", "replies cut off", "replies without items", "items", "kept",
                 "near-duplicates")  # fmt: skip
        last = ("prompt tokens", "completion tokens")
        found = self._found | Counter({"asked again": self._endpoint.retried})
        reasons = sorted(found.keys() - {*first, *last})
        return {name: found[name] for name in (*first, *reasons, *last)}

    async def until(self, n: int, concurrency: int) -> None:
        """Ask until there are `n` records, or a few more: a reply that is on its way is not thrown away.

        Raises EndpointError when the endpoint does not answer, or when its replies are of no use.
        """
        asking: set[asyncio.Task[Reply]] = set()
        try:
            with self._progress.bar(f"asking for {self._collection.path.name}", "items") as tick:
                while True:
                    tick(min(len(self._collection), n), n)
                    while len(asking) < concurrency and len(self._collection) + len(asking) * self._yield() < n:
                        self._found["requests"] += 1
                        asking.add(asyncio.create_task(self._endpoint.ask(prompt(self._n_each, self._draw))))
                    if not asking:
                        return
                    done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda t: t.exception() is not None):  # keep what came before an error is told
                        self._take(task)
        finally:
            for task in asking:
                task.cancel()

    def _yield(self) -> float:
        """Records that a reply is expected to bring."""
        replies = self._found["replies"]
        return max(1.0, self._found["kept"] / replies) if replies else self._n_each

    def _take(self, task: asyncio.Task[Reply]) -> None:
        try:
            reply = task.result()
        except GaveUp as error:
            self._found["given up"] += 1
            self._failures += 1
            self._progress.say(str(error))
            if self._failures == _FAILURES:
                raise EndpointError(f"{error}. {_FAILURES} requests in a row came to nothing. What there is is kept: run the "
                                    "same command again later, it goes on from there.") from None  # fmt: skip
            return
        self._failures = 0
        kept = self._keep(reply)
        self._fruitless = 0 if kept else self._fruitless + 1
        if self._fruitless == _FRUITLESS:
            problems = [f"{name} {n}" for name, n in self.counts.items() if n]
            raise EndpointError(f"the last {_FRUITLESS} replies held nothing to keep ({listed(problems, 20)}). Take a "
                                "better model, ask it for less at once (--items), or let it finish: --max-tokens.")  # fmt: skip

    def _keep(self, reply: Reply) -> int:
        found = list(read(reply.text))
        items = [item for item in found if isinstance(item, Item)]
        kept = self._collection.add(items)
        self._found.update(item for item in found if isinstance(item, str))
        self._found.update({"replies": 1, "replies cut off": reply.cut, "replies without items": not found, "items": len(found),
                            "kept": kept, "near-duplicates": len(items) - kept, "prompt tokens": reply.prompt_tokens,
                            "completion tokens": reply.completion_tokens})  # fmt: skip
        return kept


@click.command(cls=Command)
@click.argument("out", type=FILE)
@click.option("--endpoint", "url", required=True, help="What /chat/completions follows: http://127.0.0.1:8000/v1.")
@click.option("--model", required=True, help="As the endpoint calls it.")
@click.option("--n", type=click.IntRange(1), default=1000, show_default=True, help="Records that OUT is to have in the end.")
@click.option("--items", "n_each", type=click.IntRange(1, 100), default=20, show_default=True, help="Asked for in one request.")
@click.option("--api-key-env", default="OPENAI_API_KEY", show_default=True, help="The variable that holds the key.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, help="Requests at a time.")
@click.option("--rate", type=click.FloatRange(0), default=60, show_default=True, help="Requests a minute; 0 = no limit.")
@click.option("--timeout", type=click.FloatRange(1), default=600, show_default=True, help="Seconds for one reply.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1, show_default=True, help="Low ones repeat themselves.")
@click.option("--max-tokens", type=click.IntRange(16), help="Of one reply.  [default: the endpoint's]")
@click.option("--similar", type=click.FloatRange(0, 1, min_open=True), default=0.7, show_default=True,
              help="Drop what is so like an earlier record, by ROUGE-2 F1 over characters.")  # fmt: skip
@JSON
def main(
    out: Path, url: str, model: str, n: int, n_each: int, api_key_env: str, concurrency: int, rate: float, timeout: float,
    temperature: float, max_tokens: int | None, similar: float, as_json: bool,
) -> None:  # fmt: skip
    """Have a model write instructions with answers, in Chinese, into the Alpaca json OUT.

    Each request draws ten of 82 topics and ten of 14 kinds of task. Replies are checked, near-duplicates dropped. What OUT
    holds is added to; after Ctrl-C, a kill or an error the same command goes on where it stopped.

    \b
    export OPENAI_API_KEY=...
    python tools/crawl_prompts.py instructions.json --endpoint https://api.openai.com/v1 --model gpt-4o-mini --n 10000
    cnq serve qwen2.5-7b-q4.gguf &
    python tools/crawl_prompts.py instructions.json --endpoint http://127.0.0.1:8000/v1 --model qwen2.5-7b-q4 --concurrency 1
    """
    key = os.environ.get(api_key_env, "").strip() or None
    if key is None and not is_local(url):
        raise EndpointError(
            f"{url} is not on this machine, and {api_key_env} holds no key for it. Set it: export {api_key_env}=…"
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise CnqError(f"{api_key_env} holds characters that no key has. Copy it again.")
    started = time.perf_counter()
    progress = terminal.Progress(quiet=as_json)
    options = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens else {})

    async def run(collection: Collection) -> None:
        async with Endpoint(url, model, key, key_name=api_key_env, rate=rate, timeout=timeout, options=options,
                            say=progress.say) as endpoint:  # fmt: skip
            crawl = Crawl(endpoint, collection, n_each, progress)
            try:
                await crawl.until(n, concurrency)
            finally:
                counts.update(crawl.counts)

    counts: dict[str, int] = {}
    try:
        with opened(out, similar) as collection:
            asyncio.run(run(collection))
    finally:
        if counts:  # also of a crawl that was broken off
            seconds = time.perf_counter() - started
            terminal.emit(Crawled(out, len(collection), collection.before, counts, seconds), as_json, _show)


def _show(result: Crawled) -> None:
    terminal.table(("what", "number"), [(name, f"{n:,}") for name, n in result.counts.items()])
    click.echo(f"{result.path}: {result.n} records, {result.n - result.before} of them new, in {result.seconds:.0f} s")


if __name__ == "__main__":
    main(prog_name="python tools/crawl_prompts.py")
