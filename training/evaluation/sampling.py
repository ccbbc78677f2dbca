"""Cells drawn from a trained generative model."""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData

from training.evaluation.abilities import draw_latent, has_likelihood
from training.evaluation.cells import minibatches
from training.evaluation.molecules import library_sizes
from training.run import Run

BLOCK = 8_192
"""Training cells whose library sizes are read at a time."""


class CannotSample(Exception):
    """The family has no prior or no likelihood, or does not know the batch."""


def sample(run: Run, n_cells: int, seed: int, batch: str | None = None) -> AnnData:
    """Draw cells: the latent from the prior, library size and batch together from a training cell, values from the likelihood.

    Args:
        run: a finished run of a family with a prior and a likelihood.
        n_cells: to draw.
        seed: of everything that is drawn.
        batch: technical batch that all cells are to be of; None: as they occur among the training cells.

    Returns:
        X: CSR float32 of what the likelihood explains, which is raw counts unless uns["sample"]["values"] says otherwise. obs: batch and
        library_size; var: the model's genes; obsm["X_<model>"]: the latent.

    Raises:
        CannotSample: with what is lacking.
    """
    family, prepared = run.family.eval(), run.prepared
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latent = draw_latent(family, n_cells, generator)
    if latent is None or not has_likelihood(family):
        raise CannotSample(
            f"The family {run.config.family} has no {'prior' if latent is None else 'likelihood'} to draw cells from. Train one of the "
            "variational families, for example vae."
        )
    if batch is not None and batch not in prepared.batches:
        raise CannotSample(f"The model does not know the batch '{batch}'. It knows {', '.join(prepared.batches)}.")
    draws = np.random.default_rng(seed)
    train = prepared.train
    usable = np.arange(len(train))
    if batch is not None:
        usable = np.flatnonzero(train.batch == prepared.batches.index(batch))
    if not len(usable):
        raise CannotSample(f"No training cell is of the batch '{batch}', so that there is no library size to draw.")
    # Counts may lie on disk: library sizes are read block by block, and only of the cells that were drawn.
    chosen = draws.choice(usable, n_cells)
    cells, place = np.unique(chosen, return_inverse=True)
    read = [library_sizes(train.take(cells[i : i + BLOCK]).counts) for i in range(0, len(cells), BLOCK)]
    library = np.concatenate(read)[place]
    codes = train.batch[chosen]
    blocks = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # torch's distributions draw from the global generator. With `seed` itself it would repeat the numbers that made the latent.
        torch.manual_seed(int(draws.integers(2**63)))
        for rows in minibatches(n_cells):
            known = family.distribution(latent[rows], torch.from_numpy(library[rows]), torch.from_numpy(codes[rows]))
            blocks.append(sp.csr_matrix(known.sample().numpy().astype(np.float32)))
    is_counts = _explains_counts(run)
    drawn = AnnData(
        sp.vstack(blocks, format="csr"),
        obs=pd.DataFrame(
            {"batch": np.array(prepared.batches, dtype=object)[codes], "library_size": library},
            index=[f"sample-{i}" for i in range(n_cells)],
        ),
        var=prepared.var.set_index(pd.Index(prepared.var.index.astype(str))),
        obsm={f"X_{run.config.name}": latent.numpy().astype(np.float32)},
    )
    drawn.uns["sample"] = _provenance(run, n_cells, seed, batch, is_counts)
    return drawn


def _explains_counts(run: Run) -> bool:
    """Whether what the likelihood explains are the raw counts themselves, seen on some training cells."""
    counts = torch.from_numpy(run.prepared.train.take(np.arange(min(16, len(run.prepared.train)))).counts.toarray())
    return bool(torch.equal(run.family.observed(counts).to(counts), counts))


def _provenance(run: Run, n_cells: int, seed: int, batch: str | None, is_counts: bool) -> dict[str, Any]:
    """What the cells are, for whoever finds the file; values that .h5ad can hold."""
    return {
        "model": run.config.name,
        "family": run.config.family,
        "n_cells": n_cells,
        "seed": seed,
        "batch": batch or "as in the training cells",
        "values": "raw counts" if is_counts else "values that the likelihood explains, not counts",
        "run_created": str(run.provenance.get("created", "")),
        "code_commit": str(run.provenance.get("code_commit", "")),
        "torch": str(torch.__version__),
    }
