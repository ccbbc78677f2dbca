"""A loaded model: its sessions, its genes, and the arithmetic that tasks share."""

import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.genes import GeneIndex, densify
from service.contract.artifact import Artifact
from service.contract.impact import ImpactTable
from service.contract.manifest import Manifest
from service.errors import GoldenMismatch, InvalidArtifact
from service.inference.session import Array, Runtime, Session, padded


@dataclass(frozen=True)
class Model:
    """One version, ready to answer. Knows nothing of its family: it runs the graphs that the manifest names."""

    manifest: Manifest
    genes: GeneIndex
    sessions: dict[str, Session]
    runtime: Runtime
    card: str
    impact: ImpactTable | None = None
    """Of genes on latent units and labels; None for a model without."""

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

    def explain(
        self,
        counts: sp.csr_matrix,
        direction: NDArray[np.float32],
        position: NDArray[np.float32],
        baseline: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Input times gradient at a place on the path from a baseline to each cell, and what is explained there.

        Args:
            counts: raw counts aligned to the model's genes, shape (n_cells, n_genes), at least one cell.
            direction: weights of the latent units and of the log-odds of every class, level by level, (n_cells, n_latent + n_classes).
            position: 0 at the baseline, 1 at the cell, (n_cells,).
            baseline: 0 for an empty cell, 1 for the mean of the reference's, (n_cells,).

        Returns:
            Attribution (n_cells, n_genes) and value (n_cells,), float32.
        """
        more = {"direction": direction, "position": position, "baseline": baseline}
        outputs = self._run_counts("explain", counts, more)
        return outputs["attribution"], outputs["value"]

    def _run_counts(
        self, graph: str, counts: sp.csr_matrix, more: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
    ) -> dict[str, NDArray[np.float32]]:
        """Outputs of a graph that takes counts, and perhaps `more` inputs."""

        def dense(rows: slice, n_rows: int) -> dict[str, Array]:
            # Densified at the padded size into this thread's buffer, so that there is nothing left to copy or to allocate.
            inputs: dict[str, Array] = {"counts": densify(counts, rows, _buffers.take(n_rows, counts.shape[1]))}
            return inputs | {name: padded(array[rows], n_rows) for name, array in more.items()}

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

    def classify(self, counts: sp.csr_matrix) -> dict[str, NDArray[np.float32]]:
        """Class probabilities by label level, each float32 of shape (n_cells, n_classes), of raw counts (n_cells, n_genes).

        The graph says what it is a function of: the latent, or the counts themselves.
        """
        if not counts.shape[0]:
            return {level.name: np.zeros((0, len(level.classes)), dtype=np.float32) for level in self.manifest.labels}
        if any(tensor.name == "counts" for tensor in self.manifest.graphs["classify"].inputs):
            outputs = self._run_counts("classify", counts)
        else:
            outputs = self.sessions["classify"].run({"latent": self.encode(counts)})
        return {level.name: outputs[f"probabilities_{level.name}"] for level in self.manifest.labels}


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
        impact=_impact(artifact),
    )


def _impact(artifact: Artifact) -> ImpactTable | None:
    manifest = artifact.manifest
    if manifest.impact is None:
        return None
    n_classes = sum(len(level.classes) for level in manifest.labels)
    try:
        content = artifact.contents[manifest.impact.file]
        return ImpactTable.parse(content, manifest.n_latent, n_classes, manifest.genes.n_genes)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        path = str(artifact.path / manifest.impact.file)
        raise InvalidArtifact(path=path, problem=f"it is no table of impacts: {error}") from None
