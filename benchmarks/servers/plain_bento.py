"""The same graph as a BentoML user would serve it, in two ways.

A batchable endpoint of arrays in JSON, after the first page of its documentation; and one that takes the bytes of numpy's own format,
which stands in no documentation but works.
"""

import io
import os
from typing import Annotated, Any

import bentoml
import numpy as np
import onnxruntime as ort
from bentoml.validators import ContentType
from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema


def load_npy(content: Any) -> np.ndarray:
    """The array that a body holds; arrays, as other workers hand them on, are passed through."""
    return content if isinstance(content, np.ndarray) else np.load(io.BytesIO(content), allow_pickle=False)


def dump_npy(array: np.ndarray) -> bytes:
    """A body that holds an array."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


Npy = Annotated[
    Any,
    ContentType("application/x-npy"),
    BeforeValidator(load_npy),
    PlainSerializer(dump_npy),
    WithJsonSchema({"type": "string", "format": "binary"}),
]


@bentoml.service(workers=1)
class Plain:
    """Two batchable endpoints."""

    def __init__(self) -> None:
        self._session = ort.InferenceSession(
            os.environ["BENCHMARK_GRAPH"], providers=[os.environ["BENCHMARK_PROVIDER"]]
        )

    @bentoml.api(batchable=True, max_batch_size=2048, max_latency_ms=60_000)
    def encode(self, counts: np.ndarray) -> np.ndarray:
        """Dense counts to latent, in JSON."""
        return self._run(counts)

    @bentoml.api(batchable=True, max_batch_size=2048, max_latency_ms=60_000)
    def encode_npy(self, counts: Npy, /) -> Npy:
        """Dense counts to latent, in .npy."""
        return self._run(counts)

    def _run(self, counts: np.ndarray) -> np.ndarray:
        latent: np.ndarray = self._session.run(["latent"], {"counts": counts.astype(np.float32, copy=False)})[0]
        return latent
