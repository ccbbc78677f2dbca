"""The model.py of a Triton Python backend: the same graph, dense counts in, latent out. Runs in Triton's process."""

import json
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
        provider = json.loads(args["model_config"])["parameters"]["provider"]["string_value"]
        self._session = ort.InferenceSession(str(folder / "encode.onnx"), providers=[provider])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what Triton's dynamic batcher has put together.

        By DLPack both ways, since the backend was built for numpy 1: with numpy 2 `as_numpy` repeats the first number, and a Tensor made of
        an array is empty, both without a word.
        """
        counts = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "counts")) for request in requests]
        together = counts[0] if len(counts) == 1 else np.concatenate(counts)
        latent = self._session.run(["latent"], {"counts": together})[0]
        parts = np.split(latent, np.cumsum([len(part) for part in counts])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("latent", part)]) for part in parts]
