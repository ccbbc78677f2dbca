"""The CellTypist side of annotation.py; runs in an environment of its own (celltypist, scikit-learn < 1.7) and knows nothing of this project.

Arguments: cells.h5ad answers.npz. Counts in X; `obs` has label and part ("reference" or "query"). Trains on all genes that it is given, without
a second selection. Answers: `probabilities` (n_query, n_classes), normalised, since CellTypist's are one class against the rest; `classes`.
"""

import logging
import sys
import warnings

import anndata as ad
import celltypist
import numpy as np
import scipy.sparse as sp


def log_normalised(adata: ad.AnnData) -> ad.AnnData:
    """A copy with ln(1 + counts per 10,000), which CellTypist wants."""
    counts = sp.csr_matrix(adata.X, dtype=np.float64)
    scale = sp.diags(1e4 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0))
    return ad.AnnData(sp.csr_matrix(scale @ counts).log1p(), obs=adata.obs.copy(), var=adata.var.copy())


def main(path: str, output: str) -> None:
    """Train, annotate and write."""
    adata = log_normalised(ad.read_h5ad(path))
    reference = adata[(adata.obs["part"] == "reference").to_numpy()].copy()
    query = adata[(adata.obs["part"] == "query").to_numpy()].copy()
    model = celltypist.train(reference, labels="label", check_expression=False, feature_selection=False, n_jobs=1)
    found = celltypist.annotate(query, model=model, majority_voting=False).probability_matrix
    probabilities = found.to_numpy()
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    np.savez(output, probabilities=probabilities, classes=found.columns.to_numpy().astype(str))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    main(*sys.argv[1:])
