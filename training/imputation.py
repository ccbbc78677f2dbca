"""How well a model imputes what it can also give beside expression, on cells that it was not trained on."""

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.prepared import column, encode_cells
from training.data.splits import TEST, VALIDATION
from training.families.family import Imputed
from training.run import Run

METRIC = (
    "Pearson correlation of imputed and measured ln(1 + value) on {n_cells} held-out cells, imputed from their counts alone; "
    "computed within each technical batch and averaged over its cells"
)


def score(run: Run, imputed: Imputed) -> tuple[str, dict[str, float]]:
    """What was measured, and the figure of each feature; features that do not vary on the cells have none.

    Within batches, because a batch that was sequenced deeper in both modalities would make any model look good.
    """
    positions = run.split.positions(run.reference, TEST)
    if not len(positions):
        positions = run.split.positions(run.reference, VALIDATION)
    cells = run.reference[positions]
    genes = cells.var_names.get_indexer(run.prepared.var.index)
    query = encode_cells(run.config, cells, genes, run.prepared.batches, run.prepared.dimensions.obsm)
    found = impute(run, query.counts.toarray(), query.batch.clip(0), imputed.name)
    names = column(cells, run.config.batch_key).to_numpy()
    figures = correlations(np.log1p(query.obsm[imputed.obsm_key]), np.log1p(found), names)
    quality = {
        name: round(float(value), 4)
        for name, value in zip(imputed.features, figures, strict=True)
        if np.isfinite(value)
    }
    return METRIC.format(n_cells=len(positions)), quality


def impute(run: Run, counts: NDArray[np.float32], batch: NDArray[np.int64], name: str) -> NDArray[np.float32]:
    """The output `name` of decode for raw counts (n_cells, n_genes)."""
    graphs = run.family.eval().graphs()
    tensor = torch.from_numpy(counts)
    with torch.no_grad():
        latent = graphs["encode"].module(tensor)
        decoded = graphs["decode"].module(latent, tensor.sum(dim=1), torch.from_numpy(batch))
    return dict(zip(graphs["decode"].outputs, decoded, strict=True))[name].numpy()


def correlations(
    measured: NDArray[np.float32], imputed: NDArray[np.float32], batch: NDArray[np.object_]
) -> NDArray[np.float64]:
    """Pearson correlation of each column, within each batch and averaged over its cells; NaN where nothing varies.

    Args:
        measured: (n_cells, n_features), NaN where unknown.
        imputed: of the same shape.
        batch: (n_cells,).
    """
    total, weight = np.zeros(measured.shape[1]), np.zeros(measured.shape[1])
    for name in np.unique(batch.astype(str)):
        one, other = (values[batch.astype(str) == name].astype(np.float64) for values in (measured, imputed))
        for i in range(measured.shape[1]):
            known = np.isfinite(one[:, i])
            x, y = one[known, i], other[known, i]
            if len(x) > 2 and x.std() > 0 and y.std() > 0:
                total[i] += len(x) * np.corrcoef(x, y)[0, 1]
                weight[i] += len(x)
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)
