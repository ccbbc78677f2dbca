"""An Arrow stream cut into pieces as it arrives, each a whole small stream, so that no request has to be held whole."""

import struct

from service.cells.formats.arrow_limits import END, next_message
from service.errors import BodyTooLarge, MalformedBody


class Pieces:
    """Takes bytes as they come and gives record batches, each behind the schema and before an end-of-stream marker."""

    def __init__(self, max_piece_bytes: int) -> None:
        """Wait for a schema; no message may be longer than `max_piece_bytes`."""
        self._max_piece_bytes = max_piece_bytes
        self._held = bytearray()
        self._n_needed = 0
        """Bytes that the next message has, as far as its beginning tells."""
        self._schema = b""
        self.is_ended = False

    @property
    def n_held(self) -> int:
        """Bytes that are kept until their message is whole."""
        return len(self._held)

    def feed(self, arrived: bytes) -> list[bytes]:
        """The pieces that `arrived` completes; often none.

        Raises:
            MalformedBody: the bytes are no Arrow stream.
            BodyTooLarge: one message is longer than is allowed.
        """
        self._held += arrived
        pieces = []
        try:
            while not self.is_ended and len(self._held) >= self._n_needed:
                start = bytes(self._held[: self._n_needed])
                message = next_message(memoryview(start), 0)
                if isinstance(message, int):
                    self._n_needed = message
                    if message > self._max_piece_bytes:
                        raise BodyTooLarge(limit_bytes=self._max_piece_bytes)
                    continue
                del self._held[: self._n_needed]
                self._n_needed = 0
                if message.is_end:
                    self.is_ended = True
                elif not self._schema:
                    self._schema = start
                elif message.is_record_batch:
                    pieces.append(self._schema + start + END)
                else:
                    raise MalformedBody(problem="A stream of cells has a schema and record batches, and nothing else.")
        except struct.error as error:
            raise MalformedBody(problem=f"The body is not an Arrow IPC stream: {error}.") from None
        if self.is_ended and self._held:
            raise MalformedBody(problem="Bytes follow the end of the Arrow stream.")
        return pieces

    def end(self) -> None:
        """To be called when no more bytes come.

        Raises:
            MalformedBody: the stream is cut off.
        """
        if not self.is_ended:
            raise MalformedBody(problem="The Arrow stream is cut off: its end-of-stream marker has not arrived.")
