"""What a server is given to serve."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """One model, the same for every server."""

    store: Path
    """A models_store; cellserve serves all of it."""

    name: str
    """Of the model, in the store and in URLs."""

    graph: Path
    """Its encoder: `counts` float32 (n, n_genes) → `latent` float32 (n, n_latent)."""

    n_genes: int
    n_latent: int
    python: Path
    """Interpreter with the other servers (requirements/servers.txt)."""

    provider: str = "cpu"
    """"cpu" or "cuda"."""

    @property
    def onnx_provider(self) -> str:
        """ONNX Runtime's name of the provider."""
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.provider]


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    port: int
    pid: int
    """Of its parent process."""

    ready_seconds: float
    """From the start of the process to the first ready answer, asked for every 10 ms."""
