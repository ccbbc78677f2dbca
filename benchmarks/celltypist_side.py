"""CellTypist for annotation.py and concurrent_clients.py; runs in an environment of its own and knows nothing of this project.

    annotate cells.h5ad answers.npz           arrays `probabilities` (n_query, n_classes), normalised, since CellTypist's are one
                                              class against the rest, and `classes`
    concurrent cells.h5ad genes.json rounds   prints JSON: how many answers there were of one model asked by a thread for each
                                              choice of genes, how many differ from that of a thread that is alone, how many
                                              calls failed

Counts in X; `obs` has label and part ("reference" or "query"). Trains on all genes that it is given, without a second selection.
"""

import json
import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import celltypist
import numpy as np
import scipy.sparse as sp


def log_normalised(adata: ad.AnnData) -> ad.AnnData:
    """A copy with ln(1 + counts per 10,000), which CellTypist wants."""
    counts = sp.csr_matrix(adata.X, dtype=np.float64)
    scale = sp.diags(1e4 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0))
    return ad.AnnData(sp.csr_matrix(scale @ counts).log1p(), obs=adata.obs.copy(), var=adata.var.copy())


def learn(path: str) -> tuple[celltypist.models.Model, ad.AnnData]:
    """A model of the reference, and the query."""
    adata = log_normalised(ad.read_h5ad(path))
    reference, query = (adata[(adata.obs["part"] == part).to_numpy()].copy() for part in ("reference", "query"))
    model = celltypist.train(reference, labels="label", check_expression=False, feature_selection=False, n_jobs=1)
    return model, query


def ask(model: celltypist.models.Model, query: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, one class against the rest, and classes."""
    found = celltypist.annotate(query, model=model, majority_voting=False).probability_matrix
    return found.to_numpy(), found.columns.to_numpy().astype(str)


def annotate(path: str, output: str) -> None:
    """Train, annotate and write."""
    probabilities, classes = ask(*learn(path))
    np.savez(output, probabilities=probabilities / probabilities.sum(axis=1, keepdims=True), classes=classes)


def concurrent(path: str, genes: str, n_rounds: str) -> None:
    """Ask alone, then with a thread for each choice of genes."""
    model, query = learn(path)
    queries = [query[:, chosen].copy() for chosen in json.loads(Path(genes).read_text())]
    alone = [ask(model, one)[0] for one in queries]

    def answer(i: int) -> str:
        try:
            found = ask(model, queries[i])[0]
        except (ValueError, KeyError, IndexError):
            return "failed"
        return "same" if found.tobytes() == alone[i].tobytes() else "differ"

    with ThreadPoolExecutor(len(queries)) as threads:
        outcomes = list(threads.map(answer, list(range(len(queries))) * int(n_rounds)))
    print(
        json.dumps({"answers": len(outcomes), "differ": outcomes.count("differ"), "failed": outcomes.count("failed")})
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    {"annotate": annotate, "concurrent": concurrent}[sys.argv[1]](*sys.argv[2:])
