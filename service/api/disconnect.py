"""A client that leaves cancels its work, which nobody else looks for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.requests import ClientDisconnect, Request

PATIENCE_SECONDS = 0.01
"""What is done sooner is not watched: a task that watches takes a tenth of the time that one cell does."""


@asynccontextmanager
async def cancelled_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the block as soon as the client is gone. To be entered when the body has been read.

    Raises:
        ClientDisconnect: the client left.
    """
    this = asyncio.current_task()
    assert this is not None
    has_left = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        this.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    patience = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, begin)
    try:
        yield
    except asyncio.CancelledError:
        if has_left:
            this.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        patience.cancel()
        if watcher is not None:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
