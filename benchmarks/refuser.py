"""A server that refuses every request and does nothing else: what a load costs a machine, whoever has to refuse it.

    python -m benchmarks.refuser PORT

It reads whole requests with a parser in C, as it must where connections are kept, and answers 429 (GET: 200, so that one can wait for
it). No server refuses for much less.
"""

import asyncio
import sys
from typing import cast

import httptools
import uvloop

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
REFUSAL = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class Refuser(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its classes
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._transport.write(READY if self._parser.get_method() == b"GET" else REFUSAL)


async def serve(port: int) -> None:
    """Refuse until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Refuser, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
