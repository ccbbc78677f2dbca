"""scvi-tools' get_latent_representation in its own process, for embed_servers.py; knows nothing of this project.

Arguments: cells.h5ad folder accelerator. Reads lines "minibatch-size seconds", answers each with cells per second; "end" ends it.
"""

import logging
import sys
import time
import warnings

import anndata as ad
import scvi


def main(cells: str, folder: str, accelerator: str) -> None:
    """Answer until the end."""
    adata = ad.read_h5ad(cells)
    model = scvi.model.SCVI.load(folder, adata=adata, accelerator=accelerator)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            return
        size, seconds = line.split()
        n_cells, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < float(seconds):
            model.get_latent_representation(batch_size=int(size))
            n_cells += adata.n_obs
        print(n_cells / spent, flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    scvi.settings.verbosity = 40
    main(*sys.argv[1:])
