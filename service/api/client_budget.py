"""How much computing each client may use: a bucket of seconds that fills at a steady rate and is emptied by what its cells have cost.

A request is admitted while something is left, and what it costs is known afterwards only, so a bucket may be overdrawn; the client then
waits until that is paid back. In the long run nobody gets more than the rate. A client is known by the digest of its key; the key itself is
neither kept nor written anywhere.
"""

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.requests import Request

from service import metrics
from service.errors import ClientBudgetSpent

HEADER = "X-Client-Key"
_current: ContextVar[bytes] = ContextVar("cellserve_client", default=b"")


@dataclass
class Bucket:
    """Seconds of computing."""

    seconds: float
    """Left at `at`; below 0 when overdrawn."""

    at: float


class ClientBudgets:
    """The buckets of all clients. Belongs to one event loop."""

    def __init__(
        self,
        seconds_per_second: float,
        burst_seconds: float,
        max_keys: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without any client.

        Args:
            seconds_per_second: of computing that each client is given per second.
            burst_seconds: what it can have saved up at most, and begins with.
            max_keys: clients that are kept; who was not seen for longest is forgotten first, and begins anew.
            clock: seconds that only go forward.
        """
        self._rate, self._burst, self._max_keys, self._clock = seconds_per_second, burst_seconds, max_keys, clock
        self._buckets: OrderedDict[bytes, Bucket] = OrderedDict()

    def admit(self, request: Request) -> None:
        """Let a request in, and have what is computed for it charged to its client.

        Raises:
            ClientBudgetSpent: the client has to wait, and how long.
        """
        client = client_of(request)
        _current.set(client)
        if self._bucket(client).seconds < 0:
            metrics.CLIENT_BUDGET.labels("refused").inc()
            raise self._refusal(client)
        metrics.CLIENT_BUDGET.labels("admitted").inc()

    async def wait(self, limit_seconds: float) -> None:
        """Until the client of the current request has paid back: what slows a stream down once it has begun.

        Raises:
            ClientBudgetSpent: that would take longer than the limit.
        """
        client, until = _current.get(), self._clock() + limit_seconds
        if self._bucket(client).seconds < 0:
            metrics.CLIENT_BUDGET.labels("slowed").inc()
        while (seconds := self._bucket(client).seconds) < 0:
            if self._clock() - seconds / self._rate > until:
                raise self._refusal(client)
            await asyncio.sleep(-seconds / self._rate)

    def _refusal(self, client: bytes) -> ClientBudgetSpent:
        overdrawn = -self._bucket(client).seconds
        return ClientBudgetSpent(
            overdrawn_seconds=overdrawn,
            seconds_per_second=self._rate,
            retry_after_seconds=max(1, math.ceil(overdrawn / self._rate)),
        )

    def charge_to_current(self) -> Callable[[float], None]:
        """What takes seconds from the client of the current request, wherever it is called."""
        client = _current.get()

        def charge(seconds: float) -> None:
            self._bucket(client).seconds -= seconds

        return charge

    def _bucket(self, client: bytes) -> Bucket:
        now = self._clock()
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = Bucket(self._burst, now)
            if len(self._buckets) > self._max_keys:
                self._buckets.popitem(last=False)
            metrics.CLIENT_KEYS.set(len(self._buckets))
        self._buckets.move_to_end(client)
        bucket.seconds = min(self._burst, bucket.seconds + (now - bucket.at) * self._rate)
        bucket.at = now
        return bucket


def client_of(request: Request) -> bytes:
    """Who sends a request: the digest of X-Client-Key, or else of Authorization; all who send neither are one client."""
    for header in (HEADER, "Authorization"):
        key = request.headers.get(header)
        if key:
            return hashlib.blake2b(f"{header}:{key}".encode(), digest_size=16).digest()
    return b""
