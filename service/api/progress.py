"""GET /v1/requests/{request_id}: how far a long request is."""

import contextlib
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from service.api import request_id
from service.cells.columns import Columns, n_cells
from service.errors import RequestNotFound
from service.inference.lanes import SHORT_ROWS
from service.inference.work import Work

KEPT_SECONDS = 60.0
"""How long the end of a request is known."""

MAX_ENDED = 1_000
"""How many ends are known, the latest ones."""


@dataclass(eq=False)
class Watched:
    """One request."""

    request_id: str
    model: str
    task: str
    n_cells: int | None
    """In all; None while a stream has not ended."""

    began: float
    n_received: int = 0
    n_answered: int = 0
    state: str = "running"
    """Or "done", or "failed", which it also is where the client has left."""

    ended: float | None = None

    def as_dict(self, now: float) -> dict[str, Any]:
        """Plain values, for JSON."""
        seconds = (self.ended if self.ended is not None else now) - self.began
        return {
            "request_id": self.request_id,
            "model": self.model,
            "task": self.task,
            "state": self.state,
            "n_cells": self.n_cells,
            "n_received": self.n_received,
            "n_answered": self.n_answered,
            "seconds": round(seconds, 3),
            "cells_per_second": round(self.n_answered / seconds, 1) if seconds > 0 else None,
        }


class Progress:
    """Requests that are being answered, and those that ended a short time ago. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without any request; `clock` gives seconds that only go forward."""
        self._clock = clock
        # Weak: who answers a request holds it, so whatever way a request ends, nothing of it stays.
        self._running: weakref.WeakValueDictionary[str, Watched] = weakref.WeakValueDictionary()
        self._ended: OrderedDict[str, Watched] = OrderedDict()

    def begin(self, work: Work, n_rows: int | None = None) -> Watched:
        """Watch the current request for as long as what is returned is held; `n_rows` cells are all there already."""
        watched = Watched(
            request_id=request_id.current.get() or "",
            model=work.model.id,
            task=work.task.name,
            n_cells=n_rows,
            began=self._clock(),
            n_received=n_rows or 0,
        )
        self._running[watched.request_id] = watched
        return watched

    def follow(self, work: Work, n_rows: int, chunks: AsyncGenerator[Columns]) -> AsyncGenerator[Columns]:
        """The same chunks, counted; not those of a short request, which is answered before anybody could ask."""
        return chunks if n_rows <= SHORT_ROWS else self._counted(self.begin(work, n_rows), chunks)

    async def until_end(self, watched: Watched, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """The same pieces of an answer; it is done when they end."""
        with self._ending(watched):
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield piece
            self._end(watched, "done")

    async def _counted(self, watched: Watched, chunks: AsyncGenerator[Columns]) -> AsyncGenerator[Columns]:
        with self._ending(watched):
            async with contextlib.aclosing(chunks):
                async for columns in chunks:
                    watched.n_answered += n_cells(columns)
                    if watched.n_answered == watched.n_cells:
                        self._end(watched, "done")  # nobody asks for what comes after the last one
                    yield columns

    @contextlib.contextmanager
    def _ending(self, watched: Watched) -> Iterator[None]:
        try:
            yield
        finally:
            if watched.ended is None:
                self._end(watched, "failed")

    def of(self, request_id: str) -> dict[str, Any]:
        """How far a request is.

        Raises:
            RequestNotFound: there is none, or it ended too long ago.
        """
        self._forget()
        watched = self._running.get(request_id) or self._ended.get(request_id)
        if watched is None:
            raise RequestNotFound(kept_seconds=KEPT_SECONDS, n_cells=SHORT_ROWS)
        return watched.as_dict(self._clock())

    def _end(self, watched: Watched, state: str) -> None:
        watched.state, watched.ended = state, self._clock()
        if state == "done":
            watched.n_cells = watched.n_received
        if self._running.get(watched.request_id) is watched:  # else a later request bears the same id
            del self._running[watched.request_id]
        self._ended.pop(watched.request_id, None)
        self._ended[watched.request_id] = watched
        self._forget()

    def _forget(self) -> None:
        while self._ended:
            oldest = next(iter(self._ended.values()))
            assert oldest.ended is not None
            if len(self._ended) <= MAX_ENDED and self._clock() - oldest.ended <= KEPT_SECONDS:
                return
            self._ended.popitem(last=False)
