"""Train and save an SCVI for workload.py; runs in an environment of its own (requirements/benchmark.txt) and knows nothing of this project.

Arguments: cells.h5ad folder n_hidden n_latent.
"""

import sys

import anndata as ad
import scvi


def main(cells: str, folder: str, n_hidden: str, n_latent: str) -> None:
    """Train for one epoch and save."""
    scvi.settings.seed = 0
    adata = ad.read_h5ad(cells)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_hidden=int(n_hidden), n_latent=int(n_latent))
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
    model.save(folder, overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
