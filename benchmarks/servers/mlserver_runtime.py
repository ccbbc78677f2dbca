"""The same graph as a custom runtime of MLServer. Its REST has no binary tensors: numbers come in JSON, or float32 as base64 in BYTES."""

from typing import Any

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class GraphRuntime(MLModel):
    """Answers in the form in which it was asked."""

    async def load(self) -> bool:
        """Load the graph with ONNX Runtime's own threads."""
        parameters: Any = self.settings.parameters
        self._session = ort.InferenceSession(parameters.uri, providers=[parameters.extra["provider"]])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Dense counts to latent."""
        asked = payload.inputs[0]
        if asked.datatype == "BYTES":
            raw = Base64Codec.decode_input(asked)[0]
            counts = np.frombuffer(raw, np.float32).reshape(-1, self._session.get_inputs()[0].shape[1])
        else:
            counts = NumpyCodec.decode_input(asked).astype(np.float32, copy=False)
        latent = self._session.run(["latent"], {"counts": counts})[0]
        is_binary = asked.datatype == "BYTES"
        output = (
            Base64Codec.encode_output("latent", [latent.tobytes()])
            if is_binary
            else NumpyCodec.encode_output("latent", latent)
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
