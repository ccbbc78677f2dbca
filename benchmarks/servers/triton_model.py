"""The model.py of a Triton Python backend: the same graph, dense counts in, latent out. Runs in Triton's process."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph with ONNX Runtime's own threads."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = ort.InferenceSession(str(folder / "encode.onnx"), providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what Triton's dynamic batcher has put together."""
        counts = [pb_utils.get_input_tensor_by_name(request, "counts").as_numpy() for request in requests]
        together = counts[0] if len(counts) == 1 else np.concatenate(counts)
        latent = self._session.run(["latent"], {"counts": together})[0]
        parts = np.split(latent, np.cumsum([len(part) for part in counts])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("latent", part)]) for part in parts]
