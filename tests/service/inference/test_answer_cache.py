"""The answer cache: what it holds, what goes first, what it weighs, and what becomes of a model that leaves."""

import asyncio
import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from service.cells.columns import Columns, Labels, Values, Vectors, arrays
from service.contract import artifact
from service.inference.answer_cache import AnswerCache, Layout, Question
from service.inference.embed import TASK
from service.inference.model import Model, load
from service.inference.session import Runtime
from service.inference.task import Options
from service.inference.work import Work

WORDS = ("B", "T", "NK")


def columns(n_cells: int, seed: int = 0, width: int = 5) -> Columns:
    """Columns of every kind; the numbers have bits that a calculation might change."""
    random = np.random.default_rng(seed)
    latent = random.integers(0, 2**32, (n_cells, width), dtype=np.uint32).view(np.float32)  # NaN with payloads, -0.0, …
    return {
        "latent": Vectors(latent),
        "probabilities": Vectors(random.random((n_cells, 3), dtype=np.float32), WORDS),
        "predicted_labels": Labels(random.integers(0, 3, n_cells, dtype=np.int32), WORDS),
        "is_empty": Values(random.random(n_cells) < 0.5),
    }


def put(cache: AnswerCache, question: Question, names: list[str], seed: int = 0, width: int = 5) -> Columns:
    """Keep cells under made-up keys; their answer."""
    answer = columns(len(names), seed, width)
    layout = Layout.of(answer)
    cache.put(question, layout, [key(question, name) for name in names], layout.pack(answer))
    return answer


def key(question: Question, name: str) -> bytes:
    return question.layout_key[:8] + name.encode().ljust(32)


def held(cache: AnswerCache, question: Question, names: str) -> str:
    """Those of the names that are known, without using them."""
    return "".join(name for name in names if key(question, name) in cache._entries)


@pytest.fixture
async def question(tiny: Model) -> Question:
    return AnswerCache(2**20).question(Work(tiny, TASK, Options()))


def test_records_keep_every_bit() -> None:
    """Unpacking what was packed, in any order, gives the bytes of each column, its kind, words and names."""
    answer = columns(9)
    layout = Layout.of(answer)
    records = layout.pack(answer)
    order = [4, 0, 8, 8]
    again = layout.unpack([records[row] for row in order])

    assert layout.is_of(again)
    assert list(again) == list(answer)
    for name, array in arrays(answer).items():
        assert arrays(again)[name].dtype == array.dtype
        assert arrays(again)[name].tobytes() == array[order].tobytes()


def test_a_layout_knows_other_columns() -> None:
    """Another name, width or word is another layout."""
    layout = Layout.of(columns(3))
    other = columns(3)

    assert layout.is_of(columns(5, seed=1))
    assert not layout.is_of(columns(3, width=6))
    assert not layout.is_of({name: column for name, column in other.items() if name != "latent"})
    assert not layout.is_of({**other, "probabilities": Vectors(arrays(other)["probabilities"], ("B", "T", "?"))})


async def test_the_least_recently_used_goes_first(question: Question) -> None:
    """What was asked for again stays, and the layout stays with the last of its cells."""
    cache = AnswerCache(2**20)
    put(cache, question, [*"abcd"], width=1000)
    cache._max_bytes = cache.n_bytes + 1000  # room for the table that finds them to grow
    layout, found = cache.find(question, [key(question, "a")])
    assert layout is not None
    assert found[0] is not None
    put(cache, question, ["e"], width=1000)
    assert held(cache, question, "abcde") == "acde"
    put(cache, question, ["f", "g"], width=1000)
    assert held(cache, question, "abcdefg") == "aefg"

    assert cache.find(question, [key(question, "a")])[0] is not None
    assert cache.n_bytes <= cache._max_bytes


async def test_what_is_put_twice_is_held_once(question: Question) -> None:
    cache = AnswerCache(2**20)
    put(cache, question, [*"abc"])
    before = cache.n_bytes, len(cache)
    put(cache, question, [*"cab"])

    assert (cache.n_bytes, len(cache)) == before


async def test_an_answer_that_does_not_fit(question: Question) -> None:
    """A cell larger than the whole cache is not kept."""
    cache = AnswerCache(10_000)
    put(cache, question, ["a"], width=10_000)

    assert cache.find(question, [key(question, "a")])[1] == [None]
    assert cache.n_bytes < 3_000


async def test_bytes_are_counted_truthfully(question: Question) -> None:
    """What is said to be held is what Python has taken for it, full and after much has come and gone."""
    cache = AnswerCache(3_000_000)
    tracemalloc.start()
    try:
        for number in range(24):
            put(cache, question, [f"{number}-{row}" for row in range(1000)], seed=number)
            if number % 8 not in (0, 7):
                continue
            taken = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/inference/answer_cache.py")])
            real = sum(statistic.size for statistic in taken.statistics("filename"))
            # Keys are made elsewhere, in the test.
            keys = sum(map(len, cache._entries)) + 33 * len(cache)
            assert cache.n_bytes == pytest.approx(real + keys, rel=0.1)
            assert cache.n_bytes <= 3_000_000
    finally:
        tracemalloc.stop()
    assert len(cache) > 5_000


async def test_a_model_takes_its_answers_along(tiny_path: Path, tiny: Model) -> None:
    """When the last who holds a model lets it go, its answers go; another's stay. Loaded again it begins anew."""
    cache = AnswerCache(2**20)
    stays = cache.question(Work(tiny, TASK, Options()))
    put(cache, stays, [*"ab"])
    model = load(artifact.read(tiny_path / "tiny/1"), Runtime())
    leaves = cache.question(Work(model, TASK, Options()))
    put(cache, leaves, [*"abc"])
    assert cache.question(Work(model, TASK, Options())).layout_key == leaves.layout_key
    before = cache.n_bytes
    del model
    gc.collect()
    await asyncio.sleep(0)

    assert held(cache, leaves, "abc") == ""
    assert held(cache, stays, "ab") == "ab"
    assert cache.n_bytes < before
    again = load(artifact.read(tiny_path / "tiny/1"), Runtime())
    assert cache.find(cache.question(Work(again, TASK, Options())), [key(leaves, "a")])[0] is None
    assert len(cache._models) == 2
