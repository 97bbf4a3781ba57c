"""How long a context a chat gets: by training, by wish, by memory."""

import pytest

from cnq import context, machine
from cnq.context import cache_bytes, choose_context
from cnq.errors import NoSpace
from cnq.gguf_file import GgufFile

MB = 1 << 20


@pytest.fixture
def long_file(gguf):
    return GgufFile(gguf(max_position_embeddings=8192))


def test_the_cache_is_as_large_as_llama_cpp_makes_it(gguf, tmp_path):
    """A state is the cache of its tokens and little else: tokens, positions, a few sizes."""
    from cnq.engine.model import Model

    path = gguf(vocab="spm-added")
    with Model(path, n_ctx=512) as model:
        model.read(list(range(3, 403)))
        ours = 400 * cache_bytes(GgufFile(path))
        assert 0 <= model.state_bytes - ours - 400 * (4 + 12) < 500


def test_a_model_gets_what_it_was_trained_with_but_not_more_than_the_default(gguf, long_file):
    assert choose_context(GgufFile(gguf()), free=1 << 40) == context.Context(512)
    assert choose_context(long_file, free=1 << 40) == context.Context(context.MAX_CTX)
    assert choose_context(long_file, 6000, free=1 << 40) == context.Context(6000)


def test_little_memory_means_a_shorter_context_and_it_is_said(long_file):
    file = long_file
    room = file.path.stat().st_size + context._buffers(file)
    found = choose_context(file, free=room + 1000 * cache_bytes(file))
    assert found.n_ctx == 768  # 1000, as llama.cpp rounds it
    assert "768 tokens instead of 4096" in found.notes[0] and "--ctx" in found.notes[0]
    found = choose_context(file, free=room - 1)
    assert found.n_ctx == context.MIN_CTX
    assert "it will be slow" in found.notes[0] and "512 tokens instead" in found.notes[1]


def test_a_wish_that_does_not_fit_is_refused_with_one_that_does(long_file):
    free = context._buffers(long_file) + 1000 * cache_bytes(long_file)
    with pytest.raises(NoSpace, match=r"a context of 4096 tokens takes .* Try --ctx 768\."):
        choose_context(long_file, 4096, free)
    assert choose_context(long_file, 768, free).n_ctx == 768
    with pytest.raises(NoSpace, match="smaller model"):
        choose_context(long_file, 4096, 1)


def test_a_wish_beyond_the_training_is_granted_with_a_warning(gguf):
    found = choose_context(GgufFile(gguf()), 1024, free=1 << 40)
    assert found.n_ctx == 1024 and "trained with 512 tokens" in found.notes[0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0),
        ({"llama.attention.head_count": "x"}, 0),
        ({"llama.attention.head_count": 4, "llama.embedding_length": 64, "llama.block_count": 2}, 2 * 2 * 4 * 32),
        ({"llama.attention.head_count": 4, "llama.embedding_length": 64, "llama.block_count": 2,
          "llama.attention.head_count_kv": [1, 2]}, 2 * 32 * 3),
        ({"llama.attention.head_count": 4, "llama.embedding_length": 64, "llama.block_count": 2,
          "llama.attention.head_count_kv": ["a", None], "llama.attention.key_length": []}, 0),
    ],
)  # fmt: skip
def test_odd_metadata_do_not_stop_it(fields, expected):
    file = GgufFile.__new__(GgufFile)
    file.fields = {"general.architecture": "llama", **fields}
    assert cache_bytes(file) == expected


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.free_memory() > 100 * MB
    for name, text in {"max": f"{50 * MB}\n", "current": f"{30 * MB}\n", "stat": f"anon 5\ninactive_file {10 * MB}\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.free_memory() == 30 * MB
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 100 * MB


def test_what_memory_leaves_for_the_weights(long_file):
    context_bytes = 2000 * cache_bytes(long_file) + context._buffers(long_file)
    assert context.room_for_weights(long_file, 2000, 1 << 30) == (1 << 30) - context_bytes
    own = context.room_for_weights(long_file, None, 1 << 30)
    assert own == (1 << 30) - context.MAX_CTX * cache_bytes(long_file) - context._buffers(long_file)
    assert choose_context(long_file, free=1 << 40).n_ctx == context.MAX_CTX, "as a chat chooses it"
    with pytest.raises(NoSpace, match="smaller --ctx"):
        context.room_for_weights(long_file, 2000, context_bytes)
