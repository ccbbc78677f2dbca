"""What missing genes do to an embedding: genes are taken away from held-out cells, and their displacement is measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.neighbors import NearestNeighbors

from service.contract.manifest import Graph, MissingGenes
from service.inference.session import Session
from training.data.prepared import encode_cells
from training.run import Run

N_CELLS, N_NEIGHBOURS = 256, 15
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Of the genes, for random sets; of the weight, for the others."""

N_RANDOM = 3
KNOTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Weights of missing genes at which the table has an entry."""


@dataclass(frozen=True)
class Graphs:
    """The exported graphs, as far as they are needed here."""

    sessions: Mapping[str, Session]
    signatures: Mapping[str, Graph]
    level: str | None
    """Name of the first label level; None for a model without labels."""

    def answers(self, counts: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        """Latent of raw counts, and the most probable class of the first level."""
        known = {"counts": counts, **self.sessions["encode"].run({"counts": counts})}
        if self.level is None:
            return known["latent"], None
        inputs = {tensor.name: known[tensor.name] for tensor in self.signatures["classify"].inputs}
        found = self.sessions["classify"].run(inputs)
        return known["latent"], found[f"probabilities_{self.level}"].argmax(axis=1)


def measure(run: Run, graphs: Graphs, weight: NDArray[np.float32]) -> MissingGenes | None:
    """A table from the weight of missing genes to what they do; None where too few cells were held out to have neighbours.

    Args:
        run: whose held-out cells are used, at most 256, spread evenly.
        graphs: as exported.
        weight: share of the encoder's first layer that each gene holds.

    Each set of genes gives the median and the ninth decile of its cells' displacements; over all sets they are made to rise with the
    weight by isotonic regression, and go through 0 where nothing is missing.
    """
    counts = held_out_counts(run)
    if len(counts) <= N_NEIGHBOURS:
        return None
    latent, label = graphs.answers(counts)
    distance = neighbour_distance(latent)
    if not distance > 0:
        return None
    x, median, ninth, changed = [0.0], [0.0], [0.0], [0.0]
    for missing in gene_sets(weight, counts.mean(axis=0), run.config.seed):
        moved, other = displacement(graphs, counts, missing, latent, label, distance)
        x.append(float(weight[missing].sum(dtype=np.float64)))
        median.append(float(np.median(moved)))
        ninth.append(float(np.quantile(moved, 0.9)))
        changed.append(0.0 if other is None else float(other.mean()))
    return MissingGenes(
        n_cells=len(counts),
        n_sets=len(x) - 1,
        neighbour_distance=distance,
        weight=KNOTS,
        displacement_median=_rising(x, median),
        displacement_90=_rising(x, ninth),
        label_changes=_rising(x, changed) if label is not None else None,
    )


def section(table: MissingGenes) -> str:
    """What the model card says of it."""
    header = "| weight of missing genes | median displacement | nine in ten below | labels that change |\n| --- | --- | --- | --- |\n"
    changes = table.label_changes or (None,) * len(table.weight)
    rows = zip(table.weight, table.displacement_median, table.displacement_90, changes, strict=True)
    lines = [
        f"| {weight:.0%} | {median:.2f} | {ninth:.2f} | {'' if changed is None else f'{changed:.1%}'} |"
        for weight, median, ninth, changed in rows
    ]
    return (
        f"## Missing genes\n\nMeasured on {table.n_cells} held-out cells, by taking {table.n_sets} sets of genes away from them. The weight "
        "is the share of the encoder's first layer that the genes hold; displacements are in distances between neighbours "
        f"({table.neighbour_distance:.3g}, the median distance between a cell and its {N_NEIGHBOURS} nearest).\n\n{header}"
        + "\n".join(lines)
    )


def held_out_counts(run: Run) -> NDArray[np.float32]:
    """Raw counts of held-out cells that are not empty, over the model's genes, shape (at most 256, n_genes)."""
    positions = run.held_out
    chosen = positions[np.unique(np.linspace(0, len(positions) - 1, min(N_CELLS, len(positions))).astype(int))]
    cells = run.reference[chosen]
    genes = cells.var_names.get_indexer(run.prepared.var.index)
    counts = encode_cells(run.config, cells, genes, run.prepared.batches).counts.toarray()
    return np.ascontiguousarray(counts[counts.sum(axis=1) > 0], dtype=np.float32)


def neighbour_distance(latent: NDArray[np.float32]) -> float:
    """Median distance between a cell and its 15 nearest other cells."""
    distances, _ = NearestNeighbors(n_neighbors=N_NEIGHBOURS).fit(latent).kneighbors()
    return float(np.median(distances))


def gene_sets(weight: NDArray[np.float32], mean: NDArray[np.float32], seed: int) -> Iterator[NDArray[np.int64]]:
    """Genes to take away: random shares, and by weight the heaviest, the lightest and the most expressed."""
    generator = np.random.default_rng(seed)
    for share in SHARES:
        for _ in range(N_RANDOM):
            yield np.sort(generator.permutation(len(weight))[: max(1, round(share * len(weight)))])
    for order in (
        np.argsort(-weight, kind="stable"),
        np.argsort(weight, kind="stable"),
        np.argsort(-mean, kind="stable"),
    ):
        held = np.cumsum(weight[order], dtype=np.float64)
        for share in SHARES:
            yield np.sort(order[: max(1, int(np.searchsorted(held, share)))])


def displacement(
    graphs: Graphs,
    counts: NDArray[np.float32],
    missing: NDArray[np.int64],
    latent: NDArray[np.float32],
    label: NDArray[np.int64] | None,
    distance: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
    """How far each cell moves without those genes, in distances between neighbours, and whether its label becomes another."""
    less = counts.copy()
    less[:, missing] = 0
    moved_latent, moved_label = graphs.answers(less)
    moved = np.linalg.norm(moved_latent.astype(np.float64) - latent, axis=1) / distance
    return moved, None if label is None or moved_label is None else moved_label != label


def _rising(x: list[float], y: list[float]) -> tuple[float, ...]:
    """The isotonic regression of y on x, through 0, at `KNOTS`."""
    fitted = IsotonicRegression(y_min=0.0, out_of_bounds="clip").fit(x, y, sample_weight=[1e6, *[1.0] * (len(x) - 1)])
    # Decimals beyond the fourth are noise of the draw, and rounding keeps the order.
    return tuple(round(float(value), 4) for value in fitted.predict(np.array(KNOTS)))
