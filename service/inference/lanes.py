"""In which order what waits is run: short requests before long ones, and long ones never left behind.

Only requests of one model, task and options can run together; each such work has a queue of short requests and one of long ones. A chunk
belongs to one work. Works take turns; while short requests wait, three turns of four go to works that have some, and the fourth to
whichever work has waited longest. Within a chunk short requests come first, but a quarter of it is kept for long ones that wait. So a
short request waits for at most a few chunks, and a long one moves forward whatever else arrives.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

SHORT_ROWS = 64
"""A request of at most this many cells is short: someone, or some other service, is waiting for it."""

AT_A_TIME = 4
"""So many long requests of one work take turns; the others wait until one of them is done. If all took turns, all would be done at the
end: then a server that has more to do than it can bear answers everything, and everything too late."""

TURNS = 4
"""Every so many-th turn ignores who is short; one part in so many of a chunk is kept for long requests."""


class Waiting(Protocol):
    """What stands in a queue."""

    @property
    def n_left(self) -> int:
        """Rows that still have to run; 0 for one that was given up."""

    @property
    def is_short(self) -> bool:
        """Whether it goes before long ones."""

    @property
    def has_begun(self) -> bool:
        """Whether some of its rows were taken before."""


Item = TypeVar("Item", bound=Waiting)


class Lanes(Generic[Item]):
    """What waits, by work."""

    def __init__(self) -> None:
        self._works: OrderedDict[Hashable, tuple[deque[Item], deque[Item]]] = OrderedDict()
        self._turn = 0

    def __bool__(self) -> bool:
        return bool(self._works)

    def add(self, work: Hashable, item: Item) -> None:
        """Put an item at the end of its queue; one that has begun, behind those with which it takes turns."""
        short, long = self._works.setdefault(work, (deque(), deque()))
        queue = short if item.is_short else long
        queue.insert(AT_A_TIME - 1 if item.has_begun else len(queue), item)

    def clear(self) -> None:
        """Forget everything."""
        self._works.clear()

    def take(self, rows_of: Callable[[Item], int]) -> list[tuple[Item, int]]:
        """Remove the next chunk: items of one work, and how many rows of each. Empty when nothing waits.

        An item of which not all rows were taken is no longer here: whoever wants the rest adds it again.

        Args:
            rows_of: how many rows of an item's work may run together.
        """
        taken: list[tuple[Item, int]] = []
        while self._works and not taken:
            self._turn += 1
            any_work = self._turn % TURNS == 0
            key = next((key for key, (short, _) in self._works.items() if any_work or short), next(iter(self._works)))
            short, long = self._works.pop(key)
            n_rows = rows_of((short or long)[0])
            kept_for_long = n_rows // TURNS if any(item.n_left for item in long) else 0
            n_free = n_rows
            for queue, n_kept in ((short, kept_for_long), (long, 0), (short, 0)):
                while queue and n_free > n_kept:
                    item = queue.popleft()
                    if n_item := min(n_free - n_kept, item.n_left):  # 0: its client left
                        taken.append((item, n_item))
                        n_free -= n_item
            if short or long:
                self._works[key] = short, long  # behind the others: it has had its turn
        return taken
