"""The counts of the real files: LLaMA-2's tokenizer, Chinese-LLaMA's 20,000 pieces, Chinese-LLaMA-2's tokenizer.

They are other people's, and not part of the project; without the folder beside the repository the tests are skipped.
"""

from pathlib import Path

import pytest
import spm

from cnq.corpus import peoples_daily
from cnq.vocab.vocab import Kind
from training.efficiency import efficiency
from training.hf_tokenizer import cut_otherwise
from training.pieces import read_base, read_model
from training.reachability import intermediates, unproduced, without_split
from training.vocabulary import merge

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "llama2-tokenizer.model").is_file(), reason=f"no {DATA}")


@pytest.fixture(scope="module")
def llama():
    return read_base(DATA / "llama2-tokenizer.model")


@pytest.fixture(scope="module")
def chinese():
    return read_model(DATA / "chinese_sp.model")


@pytest.fixture(scope="module")
def llama2_chinese():
    return read_base(DATA / "chinese-llama2-tokenizer.model")


def test_the_sizes_of_the_published_vocabularies(llama, chinese, llama2_chinese):
    model, account = merge(llama, [chinese])
    assert (account.new, len(model.pieces)) == (17_953, 49_953)
    model, _ = merge(llama, [chinese], pad="[PAD]")
    assert (len(model.pieces), model.pieces[49_953].piece) == (49_954, "[PAD]")
    controls = ["<|im_end|>", "<|im_start|>", "<|end-paragraph|>"]
    model, account = merge(llama, [], characters=True, controls=controls)
    assert (account.new, len(model.pieces)) == (20_292, 52_295)
    assert len(llama2_chinese.pieces) == 55_296
    assert all(p.score == 0 and p.type == Kind.NORMAL for p in llama2_chinese.pieces[32_000:])
    assert spm.texts(llama2_chinese)[:32_000] == spm.texts(llama)
    assert len(set(spm.texts(llama2_chinese)[32_000:]) & set(spm.texts(merge(llama, [chinese])[0])[32_000:])) == 16_491


def test_dead_pieces_of_chinese_llama(llama, chinese):
    """338 have no split; that the encoder never produces are 345 with the published scores, and 194 of LLaMA's own go, too."""
    _, zero = merge(llama, [chinese], scores="zero")
    assert (len(zero.unproduced), zero.without_split, len(zero.lost)) == (345, 338, 194)
    assert {"越来越", "意大利", "俱乐部", "中华人民共和国"} <= set(zero.unproduced)
    assert {"▁create", "▁people"} <= set(zero.lost)
    _, after = merge(llama, [chinese])
    assert (len(after.unproduced), after.without_split, len(after.lost)) == (344, 338, 0)


def test_dead_pieces_of_chinese_llama_2(llama2_chinese):
    """654 have no split, of 23,295 new pieces of text. Two of those SentencePiece makes of characters that are no pieces."""
    new = [t for t in spm.texts(llama2_chinese)[32_000:] if t != "<pad>"]
    dead = set(unproduced(llama2_chinese)) & set(new)
    split = set(without_split(llama2_chinese, new))
    assert (len(new), len(split), len(dead), len(split - dead), len(dead - split)) == (23_295, 654, 656, 2, 4)
    assert {"<pad>", "________________"} == set(unproduced(llama2_chinese)) - dead


def test_added_pieces_save_all_dead_ones(llama, chinese):
    text = [peoples_daily("held-out")]
    kept, _ = merge(llama, [chinese])
    grown, account = merge(llama, [chinese], unreachable="add")
    assert unproduced(grown) == [] and len(account.added) == 327
    smaller, dropped = merge(llama, [chinese], unreachable="drop")
    assert (len(dropped.dropped), len(smaller.pieces)) == (344, 49_953 - 344)
    before, after, same = (efficiency(text, llama, model)[0] for model in (kept, grown, smaller))
    assert before.before.bytes_per_token == pytest.approx(1.9362, abs=1e-4)
    assert before.after.bytes_per_token == pytest.approx(3.9134, abs=1e-4)
    assert after.after.bytes_per_token == pytest.approx(3.9541, abs=1e-4)
    assert same.after == before.after


def test_the_fewest_pieces_in_between(llama, chinese):
    """A dead piece of three parts is saved by one of two pieces, so the fewest are a smallest vertex cover."""
    networkx = pytest.importorskip("networkx")  # torch brings it
    model, _ = merge(llama, [chinese])
    exact = spm.encoder(model)
    parts = {t: exact.encode(f"\ue000{t}\ue000".replace("▁", " "), out_type=str)[4:-3] for t in unproduced(model)}
    three = {t: p for t, p in parts.items() if len(p) == 3}
    graph = networkx.Graph((a + b, b + c) for a, b, c in three.values())
    fewest = sum(cover(graph.subgraph(nodes)) for nodes in networkx.connected_components(graph))
    assert len(intermediates(model, list(three))) == fewest == 276


def cover(graph) -> int:
    """The size of the smallest vertex cover: a node is in it, or all its neighbours are; a leaf's neighbour may be."""
    node, degree = max(graph.degree, key=lambda pair: pair[1], default=(None, 0))
    if not degree:
        return 0
    leaf = next((n for n, d in graph.degree if d == 1), None)
    taken = node if leaf is None else next(graph.neighbors(leaf))
    with_it = 1 + cover(graph.subgraph(set(graph) - {taken}))
    if leaf is not None or graph.has_edge(taken, taken):
        return with_it
    neighbours = set(graph.neighbors(taken))
    return min(with_it, len(neighbours) + cover(graph.subgraph(set(graph) - neighbours)))


@pytest.mark.parametrize("unreachable", ["keep", "add"])
def test_transformers_cuts_the_held_out_text_as_sentencepiece_does(unreachable, llama, chinese):
    pytest.importorskip("tokenizers")
    model, _ = merge(llama, [chinese], unreachable=unreachable)
    lines = [line for d in peoples_daily("held-out").documents for line in d.splitlines()]
    assert len(lines) > 4000 and cut_otherwise(model, lines) == 0
