"""The picture of a reference: a UMAP of its latents, and a network that puts other latents on it.

A UMAP cannot take new cells without its training cells and a search; a network can (parametric UMAP; Sainburg et al. 2021,
doi:10.1162/neco_a_01434). It learns the coordinates that the UMAP gave, so the picture itself stays as it is.
"""

import warnings
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import trustworthiness
from torch import Tensor, nn

from service.contract.reference_cells import ReferenceCells
from service.inference.nearest import Nearest
from training.report.projections import one_thread

N_NEIGHBOURS = 15
_HIDDEN = 128
_EPOCHS = 200
_ROWS = 256
_LEARNING_RATE = 2e-3
_MEASURED = 2000
"""Cells of which the trustworthiness is measured, drawn at random where there are more: it compares all pairs."""


@final
class Projector(nn.Module):
    """latent (n, n_latent) → umap (n, 2)."""

    MIN_CELLS: ClassVar[int] = 4 * N_NEIGHBOURS
    """Fewer have no neighbourhoods that a picture could keep."""

    def __init__(self, latent: Tensor, umap: Tensor) -> None:
        """Random weights; inputs and outputs in the units of these cells."""
        super().__init__()
        self.register_buffer("latent_mean", latent.mean(dim=0))
        self.register_buffer("latent_scale", latent.std(dim=0).clamp(min=1e-6))
        self.register_buffer("umap_mean", umap.mean(dim=0))
        self.register_buffer("umap_scale", umap.std(dim=0).clamp(min=1e-6))
        self.layers = nn.Sequential(
            nn.Linear(latent.shape[1], _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, 2),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Coordinates on the picture."""
        return self.layers((latent - self.latent_mean) / self.latent_scale) * self.umap_scale + self.umap_mean


def fit_projection(latent: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], Projector]:
    """The UMAP of latents, float32 (n_cells, 2), and the network that has learned it; the same for the same latents and seed."""
    with one_thread(), warnings.catch_warnings():
        # umap warns of an absent TensorFlow, and that a seed means one thread.
        warnings.simplefilter("ignore")
        from umap import UMAP  # takes seconds, which other commands need not wait for

        umap = UMAP(n_neighbors=N_NEIGHBOURS, random_state=seed, n_jobs=1).fit_transform(latent).astype(np.float32)
        return umap, _learn(torch.from_numpy(latent), torch.from_numpy(umap), seed)


def measure_projection(
    projector: Projector,
    latent: NDArray[np.float32],
    umap: NDArray[np.float32],
    held_out: NDArray[np.float32],
    seed: int,
) -> dict[str, float]:
    """How well the picture keeps neighbourhoods, of the reference and of cells that it was not made of.

    Args:
        projector: fitted.
        latent: of the reference cells.
        umap: of the reference cells.
        held_out: latents of other cells.
        seed: of the draw where there are many.

    Returns:
        `umap_trustworthiness_…` (Venna & Kaski 2001; 1 at best) of 15 neighbours, and `umap_distance_…`: the median distance of a cell
        from the middle of its 15 nearest reference cells (by latent) on the picture, as a share of the picture's radius (root mean square
        distance from its middle). Both of the reference cells where UMAP put them, and of the held-out cells where the network does.
    """
    generator = np.random.default_rng(seed)
    cells = Nearest(ReferenceCells(("",) * len(latent), np.zeros(len(latent), np.int32), {}, latent))
    radius = float(np.sqrt(np.square(umap - umap.mean(axis=0)).sum(axis=1).mean()))
    figures = {}
    projected = projector(torch.from_numpy(held_out)).detach().numpy()
    for name, points, places, is_held_out in (("reference", latent, umap, 0), ("held_out", held_out, projected, 1)):
        if len(points) < 2 * N_NEIGHBOURS + 1:
            continue
        chosen = np.sort(generator.choice(len(points), min(_MEASURED, len(points)), replace=False))
        figures[f"umap_trustworthiness_{name}"] = float(
            trustworthiness(points[chosen], places[chosen], n_neighbors=N_NEIGHBOURS)
        )
        # A reference cell is its own nearest.
        near = cells.search(points[chosen], N_NEIGHBOURS + 1)[0][:, 1 - is_held_out :][:, :N_NEIGHBOURS]
        middle = np.median(umap[near], axis=1)
        figures[f"umap_distance_{name}"] = float(np.median(np.linalg.norm(places[chosen] - middle, axis=1)) / radius)
    return figures


def _learn(latent: Tensor, umap: Tensor, seed: int) -> Projector:
    """Least squares of the coordinates, by AdamW with a learning rate that falls to nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(latent, umap)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(projector.parameters(), lr=_LEARNING_RATE, weight_decay=1e-3)
        n_steps = _EPOCHS * -(-len(latent) // _ROWS)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=n_steps)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(latent), generator=generator).split(_ROWS):
                loss = ((projector(latent[rows]) - umap[rows]) / projector.umap_scale).square().sum(dim=1).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return projector.eval()
