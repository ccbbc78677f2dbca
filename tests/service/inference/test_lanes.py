"""Who is next: short requests before long ones, long ones always forward, works in turns."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from service.inference.lanes import AT_A_TIME, SHORT_ROWS, TURNS, Lanes


@dataclass(eq=False)
class Item:
    """A request of some rows."""

    name: str
    n_left: int
    n_rows: int = 0

    def __post_init__(self) -> None:
        self.n_rows = self.n_left

    @property
    def is_short(self) -> bool:
        return self.n_rows <= SHORT_ROWS

    @property
    def has_begun(self) -> bool:
        return self.n_left < self.n_rows


def next_chunk(lanes: Lanes[Item], work: str = "", n_rows: int = 256) -> list[tuple[str, int]]:
    """Take a chunk, and put back what is left over as the batcher does."""
    taken = lanes.take(lambda _: n_rows)
    for item, n_item in taken:
        item.n_left -= n_item
        if item.n_left:
            lanes.add(item.name[:1] if work == "" else work, item)
    return [(item.name, n_item) for item, n_item in taken]


def test_short_before_long() -> None:
    """A short request that came last is in the next chunk, first."""
    lanes: Lanes[Item] = Lanes()
    for number in range(50):
        lanes.add("a", Item(f"a long {number}", 10_000))
    lanes.add("a", Item("a short", 3))

    assert next_chunk(lanes)[0] == ("a short", 3)


def test_long_ones_move_forward() -> None:
    """However many short requests wait, a quarter of each chunk is for long ones."""
    lanes: Lanes[Item] = Lanes()
    lanes.add("a", Item("a long", 1000))
    for number in range(100):
        lanes.add("a", Item(f"a short {number}", SHORT_ROWS))

    for _ in range(5):
        assert sum(n_item for name, n_item in next_chunk(lanes) if name == "a long") >= 256 // TURNS


def test_long_ones_take_turns_a_few_at_a_time() -> None:
    """Of many long requests the first are done long before the last, and those that take turns move forward together."""
    lanes: Lanes[Item] = Lanes()
    for number in range(20):
        lanes.add("a", Item(f"a {number}", 1024))

    order = [name for _ in range(80) for name, _ in next_chunk(lanes)]

    assert order[:8] == [f"a {number}" for number in range(AT_A_TIME)] * 2
    ends = [max(place for place, name in enumerate(order) if name == f"a {number}") for number in range(20)]
    assert ends == sorted(ends)
    assert all(end < 4 * (number + AT_A_TIME) for number, end in enumerate(ends))


def test_a_chunk_is_filled() -> None:
    """What is kept for long requests is given to short ones where long ones do not need it."""
    lanes: Lanes[Item] = Lanes()
    lanes.add("a", Item("a long", SHORT_ROWS + 1))
    for number in range(10):
        lanes.add("a", Item(f"a short {number}", 50))

    assert sum(n_item for _, n_item in next_chunk(lanes)) == 256


def test_a_work_with_short_requests_goes_first() -> None:
    """Works that hold only long requests get every fourth turn while short ones wait elsewhere."""
    lanes: Lanes[Item] = Lanes()
    for work in "abc":
        lanes.add(work, Item(f"{work} long", 10_000))
    for number in range(100):
        lanes.add("z", Item(f"z short {number}", SHORT_ROWS))

    turns = [next_chunk(lanes)[0][0][0] for _ in range(16)]
    assert turns.count("z") == 12
    assert {"a", "b", "c"} < set(turns)


def test_who_left_is_passed_over() -> None:
    """A request that was given up takes no rows, and its work disappears."""
    lanes: Lanes[Item] = Lanes()
    gone = Item("a gone", 5)
    lanes.add("a", gone)
    gone.n_left = 0

    assert lanes.take(lambda _: 256) == []
    assert not lanes


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 700)), min_size=1, max_size=40), st.integers(1, 300))
def test_everybody_is_served_whole(requests: list[tuple[str, int]], n_rows: int) -> None:
    """No row is lost or run twice, no chunk is too large or mixes works."""
    lanes: Lanes[Item] = Lanes()
    items = [Item(f"{work}{number}", size) for number, (work, size) in enumerate(requests)]
    for item in items:
        lanes.add(item.name[0], item)
    served = dict.fromkeys((item.name for item in items), 0)
    while lanes:
        chunk = next_chunk(lanes, n_rows=n_rows)
        assert 0 < sum(n_item for _, n_item in chunk) <= n_rows
        assert len({name[0] for name, _ in chunk}) == 1
        for name, n_item in chunk:
            served[name] += n_item

    assert served == {item.name: item.n_rows for item in items}
