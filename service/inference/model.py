"""A loaded model: its sessions, its genes, and the arithmetic that tasks share."""

import zipfile
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.genes import GeneIndex
from service.contract.artifact import Artifact
from service.contract.impact import ImpactTable
from service.contract.manifest import Manifest
from service.errors import GoldenMismatch, InvalidArtifact
from service.inference import encoding
from service.inference.conformal import PredictionSets, read_sets
from service.inference.nearest import Nearest
from service.inference.session import Runtime, Session

VARIANCE = "expression_variance"
"""Output of `decode` of a model whose likelihood is one of counts."""


@dataclass(frozen=True)
class Model:
    """One version, ready to answer. Knows nothing of its family: it runs the graphs that the manifest names."""

    manifest: Manifest
    genes: GeneIndex
    sessions: dict[str, Session]
    runtime: Runtime
    card: str
    page: str
    """The card as HTML; empty where the artifact has none."""

    golden_counts: sp.csr_matrix
    """Counts of the golden cells that are not empty: real cells, held out from training."""

    reference: Nearest | None = None
    """The reference cells, where the artifact carries them."""

    prediction_sets: PredictionSets | None = None
    """Of models whose calibration scores travel with them."""
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
        return encoding.encode(self.sessions, counts)

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
        outputs = encoding.run_counts(self.sessions["explain"], counts, more)
        return outputs["attribution"], outputs["value"]

    def decode(
        self, latent: NDArray[np.float32], library_size: NDArray[np.float32], batch: str | None = None
    ) -> NDArray[np.float32]:
        """Expected counts, float32 of shape (n_cells, n_genes). Arguments as of `decode_all`."""
        return self.decode_all(latent, library_size, batch)["expression"]

    def decode_all(
        self,
        latent: NDArray[np.float32],
        library_size: NDArray[np.float32],
        batch: str | None = None,
        genes: NDArray[np.intp] | None = None,
        has_variance: bool = False,
    ) -> dict[str, NDArray[np.float32]]:
        """Everything that the decoder gives.

        Args:
            latent: shape (n_cells, n_latent).
            library_size: counts per cell, over the model's genes, shape (n_cells,).
            batch: a batch of the reference, or "average" over all; None for the manifest's default.
            genes: positions of the genes to give, all by default. The others are computed, since a share is one of all genes, and dropped
                piece by piece.
            has_variance: give `expression_variance` too; the graph must have it.

        Returns:
            By name, float32: `expression`, expected counts of shape (n_cells, n_genes); `expression_variance` if asked for, in counts²,
            likewise, over the batches too where it is an average over them; and the manifest's modalities.
        """
        chosen = self._batch_indices(batch or self.manifest.batch.decode_default)
        per_gene = ("expression", VARIANCE)
        keep = {
            name: genes if name in per_gene else None
            for name in self.sessions["decode"].outputs
            if has_variance or name != VARIANCE
        }
        total: dict[str, NDArray[np.float32]] = {}
        for index in chosen:
            codes = np.full(len(latent), index, dtype=np.int64)
            found = self.sessions["decode"].run({"latent": latent, "library": library_size, "batch": codes}, keep)
            if has_variance and len(chosen) > 1:
                # The law of total variance: of a mixture of batches, the mean of variance plus squared mean, less the squared mean of all.
                found[VARIANCE] += np.square(found["expression"])
            total = {name: total[name] + array for name, array in found.items()} if total else found
        assert total, "a manifest names at least one batch where it has a decoder"
        if len(chosen) > 1:
            total = {name: array / np.float32(len(chosen)) for name, array in total.items()}
            if has_variance:
                total[VARIANCE] = np.maximum(total[VARIANCE] - np.square(total["expression"]), np.float32(0))
        return total

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
        session = self.sessions[graph]
        more = {"latent": self.encode(counts) if latent is None else latent} if "latent" in session.inputs else {}
        return encoding.run_counts(session, counts, more) if "counts" in session.inputs else session.run(more)

    def project(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """Coordinates in the reference's UMAP, float32 (n_cells, 2), of latents (n_cells, n_latent); the artifact must hold `project`."""
        if not len(latent):
            return np.zeros((0, 2), dtype=np.float32)
        return self.sessions["project"].run({"latent": latent})["umap"]


def _filled(counts: NDArray[np.float32]) -> sp.csr_matrix:
    return sp.csr_matrix(counts[counts.sum(axis=1) > 0])


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
    sessions: dict[str, Session] = {}

    def prove(key: str, values: NDArray[np.float32]) -> None:
        # NaN compares as unequal to everything, so it must not pass as "not larger than".
        difference = float(np.abs(values.astype(np.float64) - golden[key]).max())
        tolerance = manifest.golden.tolerance[key]
        if not difference <= tolerance:
            raise GoldenMismatch(model=manifest.id, output=key, difference=difference, tolerance=tolerance)

    for name, graph in manifest.graphs.items():
        session = Session(artifact.graph(name), graph, runtime, str(artifact.path / graph.file))
        cells = {tensor.name: golden[f"{name}/{tensor.name}"] for tensor in graph.inputs}
        outputs = session.prove_shapes(cells, is_quiet)
        for tensor, values in outputs.items():
            prove(f"{name}/{tensor}", values)
        sessions[str(name)] = session
    model = Model(
        manifest=manifest,
        genes=GeneIndex(
            artifact.genes,
            manifest.id,
            manifest.genes.min_gene_overlap,
            manifest.genes.species,
            artifact.ambiguous_names,
            manifest.missing_genes,
        ),
        sessions=sessions,
        runtime=runtime,
        card=artifact.card,
        page=artifact.page,
        golden_counts=_filled(golden["encode/counts"]),
        reference=Nearest(artifact.reference) if artifact.reference is not None else None,
        prediction_sets=read_sets(artifact),
        impact=_impact(artifact),
    )
    if "transform" in sessions:
        zero = sessions["transform"].run_flat(
            {tensor.name: np.zeros(1, np.float32) for tensor in manifest.graphs["transform"].inputs}
        )
        if zero[0]:
            raise InvalidArtifact(
                path=str(artifact.path / manifest.graphs["transform"].file), problem=f"makes {zero[0]} of 0, not 0"
            )
    # The way that requests go, which for an encoder in two steps is no graph of its own.
    counts = sp.csr_matrix(golden["encode/counts"])
    prove("encode/latent", model.encode(counts))
    return model


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
