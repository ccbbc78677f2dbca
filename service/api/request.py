"""A request as endpoints see it: Starlette's, without looking for the same things again and again."""

from functools import lru_cache

from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.types import Scope

MAX_QUERY_BYTES = 2**10
"""Of a query that is remembered."""


class FirstHeaders(Headers):
    """Headers that are looked up, where Starlette goes through all of them for each that it is asked for."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope=scope)
        self._first = dict(reversed(self._list))

    def __getitem__(self, key: str) -> str:
        """The first header of that name."""
        return self._first[key.lower().encode("latin-1")].decode("latin-1")


class ApiRequest(Request):
    """A request of which each endpoint wants a handful of headers and the query, most often the same as the last."""

    @property
    def headers(self) -> Headers:
        """Its headers."""
        if not hasattr(self, "_headers"):
            self._headers = FirstHeaders(self.scope)
        return self._headers

    @property
    def query_params(self) -> QueryParams:
        """Its query."""
        query: bytes = self.scope["query_string"]
        return _known_query(query) if len(query) <= MAX_QUERY_BYTES else QueryParams(query)


@lru_cache(maxsize=256)
def _known_query(query: bytes) -> QueryParams:
    return QueryParams(query)
