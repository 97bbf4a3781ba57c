"""Batches: padding is not seen, and packed examples do not see each other: logits and loss as one by one."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from training.batches import UNLEARNED, Flattened, Packed, Padded  # noqa: E402

ROOM = 24


@pytest.fixture(scope="module")
def rows():
    """Examples of 2 to 24 tokens; of some only the end is learned."""
    random = torch.Generator().manual_seed(0)
    lengths = [5, 24, 2, 9, 13, 8, 3, 17, 7, 4]
    ids = [torch.randint(3, 90, (n,), generator=random).tolist() for n in lengths]
    return datasets.Dataset.from_list(
        [{"input_ids": row, "labels": [UNLEARNED] * (k := 1 + i % 2 * len(row) // 2) + row[k:]} for i, row in enumerate(ids)]
    )


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation=request.param, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def alone(model, row):
    """Logits of an example by itself, and the sum of its losses."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    labels = torch.tensor(row["labels"][1:])
    return logits, torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=UNLEARNED, reduction="sum")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_examples_do_not_see_each_other(model, rows, batch_size):
    packed = Packed(rows, ROOM)
    assert len(packed) == 4  # 92 tokens in rows of 24
    assert sorted(n for row in packed.rows for n in row) == list(range(len(rows)))
    order = [n for row in packed.rows[:batch_size] for n in row]
    assert len(order) > batch_size
    batch = Flattened()([packed[i] for i in range(batch_size)])
    assert batch["input_ids"].shape == (1, sum(len(rows[n]["input_ids"]) for n in order))
    with torch.no_grad():
        out = model(**batch)
    logits, losses = zip(*(alone(model, rows[n]) for n in order), strict=True)
    torch.testing.assert_close(out.logits[0], torch.cat(logits), rtol=0, atol=1e-5)
    learned = sum(label != UNLEARNED for n in order for label in rows[n]["labels"])
    assert out.loss.item() == pytest.approx(sum(losses).item() / learned, abs=1e-5)


def test_that_test_would_see_it(model, rows):
    """With positions that go on, the second example's logits are other ones."""
    batch = Flattened()([Packed(rows, 100)[0]])
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    with torch.no_grad():
        out = model(**batch)
    first, second = (alone(model, rows[n])[0] for n in (0, 1))
    torch.testing.assert_close(out.logits[0, : len(first)], first, rtol=0, atol=1e-5)
    assert (out.logits[0, len(first) : len(first) + len(second)] - second).abs().max() > 0.01


def test_padding_is_neither_seen_nor_learned(model, rows):
    batch = Padded()([rows[i] for i in range(len(rows))])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (len(rows), 24)
    with torch.no_grad():
        out = model(**batch)
    losses = []
    for i, row in enumerate(rows):
        logits, loss = alone(model, row)
        losses.append(loss)
        torch.testing.assert_close(out.logits[i, : len(logits)], logits, rtol=0, atol=1e-5)
    learned = sum(label != UNLEARNED for row in rows for label in row["labels"])
    assert out.loss.item() == pytest.approx(sum(losses).item() / learned, abs=1e-5)


def test_rows_without_labels_are_learned_whole_and_eos_stays():
    batch = Padded(multiple=1)([{"input_ids": [5, 2, 7]}, {"input_ids": [2]}])
    assert batch["labels"].tolist() == [[5, 2, 7], [2, UNLEARNED, UNLEARNED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert Padded()([{"input_ids": [5, 2, 7]}])["input_ids"].shape == (1, 8)


def test_the_first_label_of_each_example_is_none_whatever_the_dataset_says():
    two = datasets.Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}] * 2)
    assert Packed(two, 4)[0] == {"input_ids": [5, 6, 5, 6], "labels": [UNLEARNED, 6] * 2, "position_ids": [0, 1, 0, 1]}


def test_an_example_longer_than_a_row_is_refused(rows):
    with pytest.raises(ValueError, match="example of 24 tokens is longer than the rows of 23"):
        Packed(rows, 23)


@given(st.lists(st.integers(1, 64), max_size=60))
@settings(deadline=None, max_examples=50)
def test_packing_is_complete_and_close_to_the_best(lengths):
    """Best-fit decreasing takes at most 11/9 of the best number of rows, and 1 more (Johnson 1973)."""
    data = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths], "labels": [[0] * n for n in lengths]})
    packed = Packed(data, 64)
    assert sorted(n for row in packed.rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 64 for row in packed.rows)
    assert len(packed) <= 11 / 9 * max(-(-sum(lengths) // 64), sum(n > 32 for n in lengths)) * 1.2 + 1
    if lengths:
        assert packed.filled == pytest.approx(sum(lengths) / 64 / len(packed))


def test_a_selection_of_a_dataset_is_packed_as_itself(rows):
    part = rows.select([3, 1, 0])
    packed = Packed(part, ROOM)
    assert sum(len(packed[i]["input_ids"]) for i in range(len(packed))) == 9 + 24 + 5
