"""What surrounds every endpoint: the request's id, what it counts for, one metric and one log line, and a problem for whatever is raised.

One layer, though these are several duties: each layer more is a coroutine more around every step of a request and a call more around every
message of its answer, and a refusal, or one cell, spends longer in those than in its endpoint.
"""

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors, metrics
from service.api import access, problems, request_id
from service.api.drain import PROBES
from service.api.state import State

logger = logging.getLogger("cellserve.api")


class AnswerBrokeOff(Exception):
    """What the server hears, and logs, in place of an error of ours: the code, without what the client sent."""


class Exchange:
    """A request that is being served, and what has been sent to its client."""

    def __init__(self, request_id: str, send: Send, state: State) -> None:
        self.request_id = request_id
        self.status = 0
        """Stays so where the client left before there was one."""

        self.has_left = True
        """Until the last of the answer has been sent, or it broke off."""

        self.sending_seconds = 0.0
        self._send, self._state = send, state

    async def send(self, message: Message) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            # Another list: who answers may keep its own for the next request.
            headers = [*message.get("headers", ()), (request_id.HEADER_NAME, self.request_id.encode())]
            message = {**message, "headers": headers}
            if self._state.is_draining:  # no connection lives on then
                MutableHeaders(scope=message)["Connection"] = "close"
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.has_left = False
        waits = time.perf_counter()
        await self._send(message)
        self.sending_seconds += time.perf_counter() - waits


class Front:
    """The outermost layer, but for that of traces."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = time.perf_counter()
        # Probes ask until the end, and a process that drains would wait for them.
        is_work = scope["path"] not in PROBES
        exchange = Exchange(request_id.of(scope), send, self._state)
        scope[request_id.SCOPE_KEY] = exchange.request_id
        token = request_id.current.set(exchange.request_id)
        self._state.n_in_flight += is_work
        metrics.REQUESTS_IN_FLIGHT.inc()
        try:
            await self._app(scope, receive, exchange.send)
        except ClientDisconnect:
            pass
        except Exception as error:
            await self._fail(error, exchange, scope, receive)
        finally:
            self._state.n_in_flight -= is_work
            metrics.REQUESTS_IN_FLIGHT.dec()
            if exchange.has_left:
                metrics.CANCELLED.inc()
            access.note(scope, exchange.status, time.perf_counter() - started, exchange.sending_seconds)
            request_id.current.reset(token)

    async def _fail(self, error: Exception, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        if not exchange.status:
            await problems.answer_to(error, scope)(scope, receive, exchange.send)
            return
        # The status is out. Breaking the connection is the one way left to say that the answer is not whole.
        exchange.has_left = False
        if isinstance(error, errors.CellserveError):
            logger.error("an answer broke off", extra={"code": error.code})  # its sentence may name a gene
            raise AnswerBrokeOff(error.code) from None
        logger.error("an answer broke off", exc_info=error)
        raise error
