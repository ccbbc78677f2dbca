"""The scvi-tools side of training_speed.py; runs in an environment of its own (requirements/benchmark.txt) and knows nothing of this project.

Arguments: cells.h5ad n_epochs likelihood device n_threads precision. Prints cells per second by epoch and the peak of memory as its last line.
"""

import json
import logging
import resource
import sys
import warnings

import anndata as ad
import scvi
from training_clock import Clock


def main(path: str, n_epochs: str, likelihood: str, device: str, n_threads: str, precision: str) -> None:
    """Train and print."""
    scvi.settings.num_threads = int(n_threads)
    scvi.settings.seed = 0
    adata = ad.read_h5ad(path)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(
        adata, n_hidden=128, n_layers=1, n_latent=10, gene_likelihood=likelihood, dispersion="gene", dropout_rate=0.1
    )
    clock = Clock()
    model.train(
        max_epochs=int(n_epochs),
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        batch_size=128,
        precision=precision,
        train_size=0.9,
        callbacks=[clock],
        enable_progress_bar=False,
        logger=False,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(json.dumps(clock.summary() | {"peak_gib": peak}))  # the answer to training_speed.py


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    main(*sys.argv[1:])
