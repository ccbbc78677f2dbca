"""Cells in minibatches: counts stay sparse until a minibatch has reached the device, and the order follows from a seed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Minibatch:
    """Some cells, sparse: count `values[i]` belongs to cell `rows[i]` and gene `columns[i]`."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]
    batch: torch.Tensor
    """Technical batch, int64 (n_cells,)."""

    labels: torch.Tensor
    """Class per label level, -1 for none, int64 (n_cells, n_levels)."""

    names: NDArray[np.object_] | None = None
    """Of the cells, for what has to be said of them."""

    obsm: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What else a family is fitted to, float32 (n_cells, n_columns), NaN where unknown."""

    def to(self, device: torch.device) -> "Minibatch":
        """The same cells on a device."""
        tensors = (self.rows, self.columns, self.values)
        rows, columns, values = (tensor.to(device) for tensor in tensors)
        batch, labels = self.batch.to(device), self.labels.to(device)
        obsm = {key: tensor.to(device) for key, tensor in self.obsm.items()}
        return Minibatch(rows, columns, values, self.shape, batch, labels, self.names, obsm)

    def counts(self) -> torch.Tensor:
        """Raw counts, dense float32 (n_cells, n_genes)."""
        counts = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        counts[self.rows, self.columns] = self.values
        return counts


@dataclass(frozen=True)
class Cells:
    """Cells with what a model is fitted to; rows agree between the fields."""

    counts: sp.csr_matrix
    batch: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: NDArray[np.object_] | None = None
    obsm: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def take(self, positions: NDArray[np.int64]) -> "Cells":
        """The cells at `positions`, in that order."""
        names = None if self.names is None else self.names[positions]
        obsm = {key: values[positions] for key, values in self.obsm.items()}
        return Cells(self.counts[positions], self.batch[positions], self.labels[positions], names, obsm)

    def minibatch(self) -> Minibatch:
        """All cells as one minibatch."""
        coordinates = self.counts.tocoo()
        return Minibatch(
            rows=torch.from_numpy(coordinates.row.astype(np.int64)),
            columns=torch.from_numpy(coordinates.col.astype(np.int64)),
            values=torch.from_numpy(coordinates.data.astype(np.float32)),
            shape=self.counts.shape,
            batch=torch.from_numpy(self.batch),
            labels=torch.from_numpy(self.labels),
            names=self.names,
            obsm={key: torch.from_numpy(values) for key, values in self.obsm.items()},
        )


class DeviceCells:
    """Cells that lie on the device as a sparse matrix, so that a minibatch is gathered where it is used and nothing is copied."""

    def __init__(self, cells: Cells, device: torch.device) -> None:
        """Copy all of `cells` to `device`."""
        self._start = torch.from_numpy(cells.counts.indptr.astype(np.int64)).to(device)
        self._columns = torch.from_numpy(cells.counts.indices.astype(np.int32)).to(device)
        self._values = torch.from_numpy(cells.counts.data.astype(np.float32)).to(device)
        self._batch, self._labels = torch.from_numpy(cells.batch).to(device), torch.from_numpy(cells.labels).to(device)
        self._obsm = {key: torch.from_numpy(values).to(device) for key, values in cells.obsm.items()}
        self._cells, self._device = cells, device

    @staticmethod
    def n_bytes(cells: Cells) -> int:
        """Memory that `cells` need on the device."""
        obsm = sum(values.nbytes for values in cells.obsm.values())
        return cells.counts.nnz * 8 + len(cells) * 8 * (2 + cells.labels.shape[1]) + obsm

    def minibatch(self, positions: NDArray[np.int64]) -> Minibatch:
        """The cells at `positions`, in that order."""
        chosen = torch.from_numpy(positions).to(self._device)
        n_values = self._start[chosen + 1] - self._start[chosen]
        rows = torch.repeat_interleave(torch.arange(len(positions), device=self._device), n_values)
        before = torch.cumsum(n_values, 0) - n_values
        place = torch.arange(len(rows), device=self._device) + (self._start[chosen] - before)[rows]
        names = None if self._cells.names is None else self._cells.names[positions]
        shape = (len(positions), self._cells.counts.shape[1])
        columns, values = self._columns[place].long(), self._values[place]
        obsm = {key: held[chosen] for key, held in self._obsm.items()}
        return Minibatch(rows, columns, values, shape, self._batch[chosen], self._labels[chosen], names, obsm)


class Minibatches:
    """An epoch of minibatches. The order of epoch e depends on the seed and e alone, so a resumed run meets the same cells."""

    def __init__(
        self,
        cells: Cells,
        rows: int,
        seed: int,
        epoch: Callable[[], int] | None = None,
        balance: float = 0.0,
        device: torch.device | None = None,
        share: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        """Prepare to iterate.

        Args:
            cells: all of them.
            rows: cells per minibatch.
            seed: of the order.
            epoch: gives the number of the epoch that begins; None keeps the cells in their own order.
            balance: 0 draws each cell once; 1 draws every pair of batch and class equally often, with replacement.
            device: keep all counts there; None: each minibatch is copied when it is drawn.
            share: gives the number of this process and of all processes that share each minibatch; None for one process.
        """
        self._on_device = None if device is None else DeviceCells(cells, device)
        self._share = share
        self.cells, self.rows, self.seed, self.epoch = cells, rows, seed, epoch
        first = cells.labels[:, 0] if cells.labels.shape[1] else np.full(len(cells), -1)
        _, group, size = np.unique(np.stack([cells.batch, first]), axis=1, return_inverse=True, return_counts=True)
        weight = 1.0 / size[group.ravel()] ** balance
        self._probability = weight / weight.sum() if balance else None

    def __len__(self) -> int:
        return max(1, len(self.cells) // self.rows if self.epoch else -(-len(self.cells) // self.rows))

    def order(self) -> NDArray[np.int64]:
        """Positions of the cells in the order of this epoch."""
        n_cells = len(self.cells)
        if self.epoch is None:
            return np.arange(n_cells)
        generator = np.random.default_rng((self.seed, self.epoch()))
        if self._probability is None:
            return generator.permutation(n_cells)
        return generator.choice(n_cells, size=n_cells, p=self._probability)

    def __iter__(self) -> Iterator[Minibatch]:
        order = self.order()
        rank, n_processes = self._share() if self._share else (0, 1)
        # While training, a small remainder is left to the next epoch's order: its noisy step would weigh as much as a full one.
        for i in range(len(self)):
            positions = order[i * self.rows : (i + 1) * self.rows][rank::n_processes]
            yield self._on_device.minibatch(positions) if self._on_device else self.cells.take(positions).minibatch()
