"""traffic.json of a model: a share of what is asked for by name goes to a second version, and a third only runs beside."""

import hashlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

TRAFFIC = "traffic.json"
MAX_TRAFFIC_BYTES = 2**16
_Target = Annotated[str, Field(min_length=1, max_length=64)]


class Split(BaseModel):
    """Where a share of the requests goes that name the model and nothing more."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    to: _Target
    """Version or alias."""

    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)]


class Traffic(BaseModel):
    """What becomes of requests besides being answered by the default version. Without the file: nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    split: Split | None = None
    shadow: _Target | None = None
    """Version or alias that computes the same answers in the background; only differences are reported."""

    def targets(self) -> tuple[str, ...]:
        """Versions and aliases that are named."""
        named = (self.split.to if self.split else None, self.shadow)
        return tuple(target for target in named if target is not None)


NO_TRAFFIC = Traffic()
"""Of a model without the file."""


def parse(document: Any) -> Traffic:
    """The content of traffic.json.

    Raises:
        ValueError: says what is wrong, and where.
    """
    try:
        return Traffic.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}") from None


def position(name: str, request_id: str) -> float:
    """Where a request stands between 0 and 1: the same for the same id, on any machine; uniform over ids.

    Whoever is below a share stays below a larger one: raising it sends nobody back.
    """
    digest = hashlib.blake2b(f"{name}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
