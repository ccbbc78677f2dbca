"""Beginning with the weights of a finished run: fine-tuning on a query, retraining on other genes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from training.config import Config
from training.data.prepared import Prepared, encode_cells
from training.families.family import Axis, Family, Names

if TYPE_CHECKING:
    from training.run import Run

KEY = "X_start"
"""Key of `obsm` with the embedding of the run that was begun with; NaN for cells that it did not have."""

_ROWS = 4096


class CannotStart(Exception):
    """A run cannot begin with the weights of another."""


def known_batches(config: Config, parent: "Run") -> Config:
    """The configuration with the batches of the run that it begins with.

    Raises:
        CannotStart: the families differ.
    """
    assert config.start is not None
    if config.family != parent.config.family:
        raise CannotStart(
            f"A run of {config.family} cannot begin with {config.start.run}, which is one of {parent.config.family}."
        )
    known = config.start.batches or parent.prepared.batches
    return config.model_copy(update={"start": config.start.model_copy(update={"batches": known})})


def add_latent(reference: AnnData, parent: "Run") -> None:
    """Put the embedding by `parent` of those cells that it was made of into obsm["X_start"]."""
    known = reference.obs_names.intersection(parent.reference.obs_names)
    latent = np.full((reference.n_obs, parent.config.hyperparameters.n_latent), np.nan, dtype=np.float32)
    if len(known):
        cells = parent.reference[known, parent.prepared.var.index]
        counts = encode_cells(parent.config, cells, np.arange(cells.n_vars), parent.prepared.batches).counts
        encode = parent.family.eval().graphs()["encode"].module
        with torch.no_grad():
            pieces = [
                encode(torch.from_numpy(counts[i : i + _ROWS].toarray())) for i in range(0, counts.shape[0], _ROWS)
            ]
        latent[reference.obs_names.get_indexer(known)] = torch.cat(pieces).numpy()
    reference.obsm[KEY] = latent


def add_no_latent(reference: AnnData, config: Config) -> None:
    """The same without values: for a run that is fitted already."""
    reference.obsm[KEY] = np.full((reference.n_obs, config.hyperparameters.n_latent), np.nan, dtype=np.float32)


def begin(family: Family, config: Config, prepared: Prepared, parent: "Run") -> None:
    """Give a family the weights of `parent`, by the names of genes, batches and classes, and freeze what is not to be fitted.

    A new batch begins as the average of those known; a new gene or class with the random weights that it has.

    Raises:
        CannotStart: the family cannot, a tensor has another shape, or no batch is new where only those are fitted.
    """
    assert config.start is not None
    axes = family.axes(_names(config, prepared))
    others = parent.family.axes(_names(parent.config, parent.prepared))
    if axes is None or others is None:
        raise CannotStart(f"The family {config.family} cannot begin with the weights of another run.")
    old = parent.family.state_dict()
    weights = {}
    for name, fresh in family.state_dict().items():
        if name not in old:
            weights[name] = fresh
            continue
        found = old[name]
        for dim, (wanted, known) in enumerate(zip(axes.get(name, ()), others.get(name, ()), strict=True)):
            if wanted is not None and known is not None:
                found = _carried(found, fresh, dim, wanted, known)
        if found.shape != fresh.shape:
            # A tensor that is left out in silence is a model that is wrong in silence.
            raise CannotStart(
                f"{name} has shape {list(found.shape)} in {config.start.run} and {list(fresh.shape)} here. Give the model the "
                "hyper-parameters of that run."
            )
        weights[name] = found
    family.load_state_dict(weights)
    if config.start.train == "batches":
        _freeze(family, axes, config)


def _names(config: Config, prepared: Prepared) -> Names:
    classes = {level.name: tuple(level.classes) for level in config.labels}
    return Names(tuple(map(str, prepared.var.index)), classes)


def _carried(found: Tensor, fresh: Tensor, dim: int, wanted: Axis, known: Axis) -> Tensor:
    """`found` with its rows along `dim` in the order of `wanted`; those not in `known` are averages (batches) or those of `fresh`."""
    assert wanted is not None
    assert known is not None
    position = {name: i for i, name in enumerate(known)}
    parts = []
    for i, name in enumerate(wanted):
        if name in position:
            parts.append(found.select(dim, position[name]))
        elif name[0] == "batch":
            siblings = [at for other, at in position.items() if other[:2] == name[:2]]
            parts.append(found.index_select(dim, torch.tensor(siblings)).mean(dim=dim))
        else:
            parts.append(fresh.select(dim, i))
    return torch.stack(parts, dim=dim)


def _freeze(family: Family, axes: Mapping[str, tuple[Axis, ...]], config: Config) -> None:
    """Fit nothing but the entries of new batches."""
    assert config.start is not None
    is_new = {name: _mask(parameter, axes.get(name, ()), config) for name, parameter in family.named_parameters()}
    if not any(bool(mask.any()) for mask in is_new.values()):
        raise CannotStart(f"All batches of the data are known to {config.start.run}: there is no new code to fit.")
    for name, parameter in family.named_parameters():
        mask = is_new[name]
        parameter.requires_grad_(bool(mask.any()))
        if mask.any():
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))
    family.is_frozen = True


def _mask(parameter: Tensor, axes: tuple[Axis, ...], config: Config) -> Tensor:
    """Which entries of a parameter belong to new batches."""
    assert config.start is not None
    known = set(config.start.batches) | {part for batch in config.start.batches for part in batch.split(" | ")}
    mask = torch.zeros_like(parameter, dtype=torch.bool)
    for dim, axis in enumerate(axes):
        for i, name in enumerate(axis or ()):
            if name[0] == "batch" and name[2] not in known:
                mask.select(dim, i).fill_(True)
    return mask
