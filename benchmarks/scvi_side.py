"""The scvi-tools side of embed_http.py; runs in an environment of its own (requirements/benchmark.txt) and knows nothing of this project.

Arguments: cells.npz n_hidden n_latent seconds rounds minibatch-size… Prints {"size": [cells per second, …]} as its last line.
"""

import json
import logging
import sys
import time
import warnings

import anndata as ad
import scipy.sparse as sp
import scvi


def main(path: str, n_hidden: str, n_latent: str, seconds: str, rounds: str, *sizes: str) -> None:
    """Measure and print."""
    adata = ad.AnnData(sp.load_npz(path))
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_hidden=int(n_hidden), n_latent=int(n_latent), n_layers=1)
    # One epoch: the speed of inference does not depend on how good the weights are, but the model must count as trained.
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
    measured: dict[str, list[float]] = {size: [] for size in sizes}
    for _ in range(int(rounds)):
        for size in sizes:
            n_cells, started = 0, time.perf_counter()
            while (spent := time.perf_counter() - started) < float(seconds):
                model.get_latent_representation(batch_size=int(size))
                n_cells += adata.n_obs
            measured[size].append(n_cells / spent)
    print(json.dumps(measured))  # the answer to embed_http.py


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    main(*sys.argv[1:])
