"""Minibatches: sparse until densified, each cell once, in an order that a seed and an epoch decide."""

import numpy as np
import scipy.sparse as sp
import torch

from training.data.minibatches import Cells, Minibatches


def cells(n_cells: int = 50) -> Cells:
    """Cell i has i + 1 counts of gene 0, so that it can be recognised."""
    generator = np.random.default_rng(0)
    dense = generator.poisson(0.5, (n_cells, 7)).astype(np.float32)
    dense[:, 0] = np.arange(n_cells) + 1
    label = (np.arange(n_cells) < 5).astype(np.int64)[:, None]
    return Cells(sp.csr_matrix(dense), np.arange(n_cells, dtype=np.int64) % 2, label)


def drawn(minibatches: Minibatches) -> list[int]:
    """Cells in the order in which they come."""
    return [int(value) - 1 for minibatch in minibatches for value in minibatch.counts()[:, 0]]


def test_dense_counts_are_those_of_the_sparse_matrix() -> None:
    """Nothing is lost on the way, and batch and labels stay with their cell."""
    everything = cells()
    minibatch = next(iter(Minibatches(everything, rows=50, seed=0)))
    np.testing.assert_array_equal(minibatch.counts().numpy(), everything.counts.toarray())
    np.testing.assert_array_equal(minibatch.batch, everything.batch)
    np.testing.assert_array_equal(minibatch.labels, everything.labels)


def test_an_epoch_draws_no_cell_twice() -> None:
    """And leaves out fewer than a minibatch."""
    found = drawn(Minibatches(cells(), rows=8, seed=0, epoch=lambda: 0))
    assert len(found) == len(set(found)) == 48


def test_without_epochs_all_cells_come_in_their_order() -> None:
    """Validation meets every cell."""
    assert drawn(Minibatches(cells(), rows=8, seed=0)) == list(range(50))


def test_seed_and_epoch_decide_the_order() -> None:
    """Not how often or when one iterates: a resumed run meets the same cells."""
    epoch = 0
    minibatches = Minibatches(cells(), rows=8, seed=0, epoch=lambda: epoch)
    first = drawn(minibatches)
    assert drawn(minibatches) == first
    epoch = 1
    second = drawn(minibatches)
    assert second != first
    assert drawn(Minibatches(cells(), rows=8, seed=0, epoch=lambda: 1)) == second
    assert drawn(Minibatches(cells(), rows=8, seed=1, epoch=lambda: 1)) != second


def test_balance_draws_rare_classes_as_often() -> None:
    """Five of fifty cells are of the rare class; balanced, they are half of what is drawn."""
    found = [c for epoch in range(20) for c in drawn(Minibatches(cells(), 8, 0, lambda e=epoch: e, balance=1.0))]
    assert 0.4 < np.mean(np.array(found) < 5) < 0.6


def test_cells_on_the_device_are_the_same_cells() -> None:
    """Gathered from a sparse matrix there, in any order, empty cells and repeated ones too; no GPU is needed to see it."""
    everything = cells()
    dense = everything.counts.toarray()
    dense[3] = 0
    everything = Cells(sp.csr_matrix(dense), everything.batch, everything.labels)
    here = Minibatches(everything, 8, 0, lambda: 3, balance=1.0)
    there = Minibatches(everything, 8, 0, lambda: 3, balance=1.0, device=torch.device("cpu"))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.counts(), other.counts())
        assert torch.equal(one.batch, other.batch)
        assert torch.equal(one.labels, other.labels)
    all_of_them = next(iter(Minibatches(everything, 50, 0, device=torch.device("cpu"))))
    np.testing.assert_array_equal(all_of_them.counts().numpy(), everything.counts.toarray())


def test_processes_share_a_minibatch() -> None:
    """Together they draw what one would, each its part."""
    whole = drawn(Minibatches(cells(), 8, 0, lambda: 0))
    parts = [drawn(Minibatches(cells(), 8, 0, lambda: 0, share=lambda r=rank: (r, 2))) for rank in (0, 1)]
    assert parts[0] != parts[1]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert len(parts[0]) == len(parts[1])
