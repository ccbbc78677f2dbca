"""The cheapest HTTP client that still reads whole answers: requests are bytes made beforehand, answers are parsed in C.

What clients cost is taken from the servers, which share the CPUs with them. So all that speak plain HTTP are asked by this one.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools

_PIECE = 2**18


def request(path: str, content: bytes, media_type: str, **headers: str) -> bytes:
    """A POST as it goes over the wire; `headers` are named with underscores."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: {media_type}",
        f"Content-Length: {len(content)}",
    ]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


@dataclass
class Answer:
    """One answer; filled by the parser."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    is_whole: bool = False


class AnswerParser:
    """Parses one answer after the other from what arrives."""

    def __init__(self, done: Callable[[Answer], None] | None = None) -> None:
        """Make a parser; `done` is called with each whole answer."""
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self.answer = Answer()

    def feed(self, piece: bytes | memoryview) -> None:
        """Take what has arrived."""
        self._parser.feed_data(piece)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self.answer = Answer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self.answer.headers[name.decode().lower()] = value.decode()

    def on_body(self, piece: bytes) -> None:
        """Called by the parser."""
        self.answer.content += piece

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.answer.status = self._parser.get_status_code()
        self.answer.is_whole = True
        if self._done is not None:
            self._done(self.answer)


class Connection:
    """One kept connection to a server on this machine, one request at a time. Blocks."""

    def __init__(self, port: int, timeout: float = 60) -> None:
        """Connect.

        Raises:
            OSError: nobody listens.
        """
        self._socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = AnswerParser()
        self._buffer = memoryview(bytearray(_PIECE))

    def ask(self, content: bytes) -> Answer:
        """Send a request and read its whole answer.

        Raises:
            ConnectionError: the server hung up.
        """
        self._parser.answer = Answer()
        self._socket.sendall(content)
        while not self._parser.answer.is_whole:
            n_bytes = self._socket.recv_into(self._buffer)
            if not n_bytes:
                raise ConnectionError("the server hung up in the middle of an answer")
            self._parser.feed(self._buffer[:n_bytes])
        return self._parser.answer

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def wait_until_ready(port: int, path: str, check: Callable[[], None], seconds: float = 120) -> None:
    """Ask for `path` every 10 ms until it answers 200.

    Args:
        port: on this machine.
        path: of a probe.
        check: called between; raises where the process has ended.
        seconds: to wait at most.

    Raises:
        TimeoutError: it did not become ready in time.
    """
    probe = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        check()
        with contextlib.suppress(OSError):
            connection = Connection(port, timeout=5)
            try:
                if connection.ask(probe).status == 200:
                    return
            finally:
                connection.close()
        time.sleep(0.01)
    raise TimeoutError(f"{path} of port {port} was not ready within {seconds} s")
