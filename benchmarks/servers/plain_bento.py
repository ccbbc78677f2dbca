"""The same graph as a BentoML user would serve it after the first page of its documentation: a batchable endpoint of arrays."""

import os

import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service(workers=1)
class Plain:
    """One batchable endpoint."""

    def __init__(self) -> None:
        self._session = ort.InferenceSession(os.environ["ENCODE_GRAPH"], providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=2048, max_latency_ms=60_000)
    def encode(self, counts: np.ndarray) -> np.ndarray:
        """Dense counts to latent."""
        latent: np.ndarray = self._session.run(["latent"], {"counts": counts.astype(np.float32)})[0]
        return latent
