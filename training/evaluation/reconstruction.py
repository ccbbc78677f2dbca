"""What the likelihood says of cells, and how much of their spread the latent explains."""

from typing import Any

import numpy as np
import torch

from training.data.minibatches import Cells
from training.evaluation.abilities import Observing
from training.evaluation.cells import dense, encode, known_batches, minibatches
from training.evaluation.molecules import library_sizes

QUANTILES = {"minimum": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "maximum": 1.0}


def reconstruction(family: Observing, cells: Cells, n_batches: int) -> dict[str, Any]:
    """Log-likelihood of each cell's observed values at its own latent and library size, and standard deviations by the law of total variance.

    Over cells c, with z_c the latent of each, a gene's values x vary by

        total² = E_c[Var(x | z_c)] + Var_c(E[x | z_c])        explained² = Var_c(E[x | z_c])

    of which the first is what the model foretells and the second what it foretells by telling cells apart (scVAE reports both; Grønbech
    et al. 2020, doi:10.1093/bioinformatics/btaa293). `observed` is the deviation of the values themselves.

    Args:
        family: one with a likelihood.
        cells: any number above 0.
        n_batches: that the model knows.

    Returns:
        `log_likelihood`: mean, standard deviation and quantiles over cells, in nats per cell. `standard_deviation`: means over genes of
        total, explained and observed, in the units of the observed values. `explained_share`: of the total variance, summed over genes.
    """
    latent, library = encode(family, cells.counts), torch.from_numpy(library_sizes(cells.counts))
    per_cell, n_cells = [], len(cells)
    # Per gene: sums of E[x|z], of its square, of Var(x|z), of x and of its square.
    sums = torch.zeros(5, cells.counts.shape[1], dtype=torch.float64)
    shift = torch.zeros(cells.counts.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for number, rows in enumerate(minibatches(n_cells)):
            values = family.observed(dense(cells.counts[rows]))
            known = known_batches(family, cells.batch[rows], n_batches)
            found = [family.distribution(latent[rows], library[rows], batch) for batch in known]
            per_cell.append(torch.stack([one.log_prob(values).sum(dim=1) for one in found]).mean(dim=0))
            mean = torch.stack([one.mean.double() for one in found]).mean(dim=0)
            variance = torch.stack([one.variance.double().expand_as(values) for one in found]).mean(dim=0)
            values = values.double()
            if number == 0:
                shift = values.mean(dim=0)  # differences of squares lose digits far from zero
            off, seen = mean - shift, values - shift
            sums += torch.stack([off.sum(0), off.square().sum(0), variance.sum(0), seen.sum(0), seen.square().sum(0)])
    mean, square, within, seen_mean, seen_square = sums / n_cells
    explained, observed = (square - mean**2).clamp(min=0), (seen_square - seen_mean**2).clamp(min=0)
    total = explained + within
    log_likelihood = torch.cat(per_cell).double().numpy()
    deviations = {"total": total, "explained": explained, "observed": observed}
    return {
        "n_cells": n_cells,
        "log_likelihood": {
            "mean": float(log_likelihood.mean()),
            "standard_deviation": float(log_likelihood.std()),
            **{name: float(np.quantile(log_likelihood, share)) for name, share in QUANTILES.items()},
        },
        "standard_deviation": {name: float(variance.sqrt().mean()) for name, variance in deviations.items()},
        "explained_share": float(explained.sum() / total.sum()) if bool(total.sum() > 0) else None,
    }
