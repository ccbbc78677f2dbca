"""A loaded model: its sessions, its genes, and the arithmetic that tasks share."""

import threading
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.genes import GeneIndex, densify
from service.contract.artifact import Artifact
from service.contract.manifest import Manifest
from service.errors import GoldenMismatch
from service.inference.conformal import PredictionSets, read_sets
from service.inference.session import Array, Runtime, Session, padded


@dataclass(frozen=True)
class Model:
    """One version, ready to answer. Knows nothing of its family: it runs the graphs that the manifest names."""

    manifest: Manifest
    genes: GeneIndex
    sessions: dict[str, Session]
    runtime: Runtime
    card: str
    prediction_sets: PredictionSets | None = None
    """Of models whose calibration scores travel with them."""

    @property
    def id(self) -> str:
        """name@version."""
        return self.manifest.id

    def encode(self, counts: sp.csr_matrix) -> NDArray[np.float32]:
        """Latent of aligned counts.

        Args:
            counts: raw counts aligned to the model's genes, shape (n_cells, n_genes).

        Returns:
            Latent, float32 of shape (n_cells, n_latent). Each row has the same bits whatever the other rows are.
        """
        if not counts.shape[0]:
            return np.zeros((0, self.manifest.n_latent), dtype=np.float32)
        return self._run_counts("encode", counts)["latent"]

    def _run_counts(self, graph: str, counts: sp.csr_matrix, **others: Array) -> dict[str, NDArray[np.float32]]:
        """Outputs of a graph that takes counts, and perhaps other tensors with one row per cell."""

        def dense(rows: slice, n_rows: int) -> dict[str, Array]:
            # Densified at the padded size into this thread's buffer, so that there is nothing left to copy or to allocate.
            more = {name: padded(array[rows], n_rows) for name, array in others.items()}
            return {"counts": densify(counts, rows, _buffers.take(n_rows, counts.shape[1])), **more}

        return self.sessions[graph].run_rows(counts.shape[0], dense)

    def decode(
        self, latent: NDArray[np.float32], library_size: NDArray[np.float32], batch: str | None = None
    ) -> NDArray[np.float32]:
        """Expected counts, float32 of shape (n_cells, n_genes). Arguments as of `decode_all`."""
        return self.decode_all(latent, library_size, batch)["expression"]

    def decode_all(
        self, latent: NDArray[np.float32], library_size: NDArray[np.float32], batch: str | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Everything that the decoder gives.

        Args:
            latent: shape (n_cells, n_latent).
            library_size: counts per cell, over the model's genes, shape (n_cells,).
            batch: a batch of the reference, or "average" over all; None for the manifest's default.

        Returns:
            By name, float32: `expression`, expected counts of shape (n_cells, n_genes), and the manifest's modalities.
        """
        chosen = self._batch_indices(batch or self.manifest.batch.decode_default)
        total: dict[str, NDArray[np.float32]] = {}
        for index in chosen:
            codes = np.full(len(latent), index, dtype=np.int64)
            found = self.sessions["decode"].run({"latent": latent, "library": library_size, "batch": codes})
            total = {name: total[name] + array for name, array in found.items()} if total else found
        assert total, "a manifest names at least one batch where it has a decoder"
        return {name: array / np.float32(len(chosen)) for name, array in total.items()} if len(chosen) > 1 else total

    def _batch_indices(self, batch: str) -> list[int]:
        """What the decoder is run with, and averaged over."""
        policy = self.manifest.batch
        if batch != "average":
            return [policy.names.index(batch)]
        return list(range(len(policy.names))) if policy.average_index is None else [policy.average_index]

    def classify(
        self, counts: sp.csr_matrix, latent: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Class probabilities by label level, each float32 of shape (n_cells, n_classes), of raw counts (n_cells, n_genes).

        The graph says what it is a function of: the latent, or the counts themselves. A latent that is known need not be computed.
        """
        if not counts.shape[0]:
            return {level.name: np.zeros((0, len(level.classes)), dtype=np.float32) for level in self.manifest.labels}
        outputs = self._run_known("classify", counts, latent)
        return {level.name: outputs[f"probabilities_{level.name}"] for level in self.manifest.labels}

    def mapping_score(self, counts: sp.csr_matrix, latent: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """How well cells fit the reference, 0 to 1, float32 (n_cells,); for models with the graph `map_score`."""
        if not counts.shape[0]:
            return np.zeros(0, dtype=np.float32)
        return self._run_known("map_score", counts, latent)["mapping_score"]

    def _run_known(
        self, graph: str, counts: sp.csr_matrix, latent: NDArray[np.float32] | None
    ) -> dict[str, NDArray[np.float32]]:
        """Outputs of a graph on counts, the latent, or both."""
        inputs = {tensor.name for tensor in self.manifest.graphs[graph].inputs}  # type: ignore[index]
        others = {"latent": self.encode(counts) if latent is None else latent} if "latent" in inputs else {}
        if "counts" in inputs:
            return self._run_counts(graph, counts, **others)
        return self.sessions[graph].run(others)


class _Buffers(threading.local):
    """One matrix per thread that runs graphs."""

    def __init__(self) -> None:
        self._held = np.empty((0, 0), dtype=np.float32)

    def take(self, n_rows: int, n_genes: int) -> NDArray[np.float32]:
        """A matrix of that shape with anything in it; it belongs to this thread until the next call."""
        if self._held.shape != (n_rows, n_genes):
            self._held = np.empty((n_rows, n_genes), dtype=np.float32)
        return self._held


_buffers = _Buffers()


def load(artifact: Artifact, runtime: Runtime, is_quiet: bool = False) -> Model:
    """Make sessions of an artifact's graphs and let its golden cells prove them on this machine, which also warms them up.

    Args:
        artifact: read and verified.
        runtime: where it runs.
        is_quiet: prove in the calling thread, so that thousands of golden rows do not stand before requests in the runtime's pool.

    Raises:
        InvalidArtifact: a graph or the golden file is not as the manifest says.
        GoldenMismatch: this machine gives other answers than the manifest tolerates.
    """
    manifest = artifact.manifest
    golden = artifact.golden()
    sessions = {}
    for name, graph in manifest.graphs.items():
        session = Session(artifact.graph(name), graph, runtime, str(artifact.path / graph.file))
        cells = {tensor.name: golden[f"{name}/{tensor.name}"] for tensor in graph.inputs}
        outputs = session.prove_shapes(cells, is_quiet)
        for tensor, values in outputs.items():
            key = f"{name}/{tensor}"
            # NaN compares as unequal to everything, so it must not pass as "not larger than".
            difference = float(np.abs(values.astype(np.float64) - golden[key]).max())
            if not difference <= manifest.golden.tolerance[key]:
                raise GoldenMismatch(
                    model=manifest.id, output=key, difference=difference, tolerance=manifest.golden.tolerance[key]
                )
        sessions[str(name)] = session
    return Model(
        manifest=manifest,
        genes=GeneIndex(artifact.genes, manifest.id, manifest.genes.min_gene_overlap, manifest.genes.species),
        sessions=sessions,
        runtime=runtime,
        card=artifact.card,
        prediction_sets=read_sets(artifact),
    )
