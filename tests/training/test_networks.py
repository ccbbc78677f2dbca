"""The input's transform against scanpy, and class weights."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch

from training.networks import Binarise, InputTransform, LogCounts, LogNormalise, RawCounts, class_weights


def counts() -> torch.Tensor:
    """Seeded counts without a zero."""
    return torch.poisson(torch.full((8, 20), 1.5), generator=torch.Generator().manual_seed(0)) + 1


def test_the_transform_is_scanpys() -> None:
    """normalize_total and log1p; within 1e-5, float32 against float32."""
    table = ad.AnnData(counts().numpy().copy())
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    found = LogNormalise(1e4, None, None, None)(counts())
    np.testing.assert_allclose(found.numpy(), table.X, rtol=1e-5)


def test_expected_counts_undo_the_transform() -> None:
    """Transformed counts with their library give the counts back, scaled or not."""
    mean, std = torch.linspace(0, 2, 20), torch.linspace(0.2, 1, 20)
    for scaling in ((None, None), (mean, std)):
        transform = LogNormalise(1e4, *scaling, None)
        found = transform.expected_counts(transform(counts()), counts().sum(dim=1))
        torch.testing.assert_close(found, counts(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [
        LogNormalise(1e4, torch.linspace(0, 2, 20), torch.linspace(0.2, 1, 20), 3.0),
        LogCounts(2.0),
        RawCounts(3.0),
        Binarise(),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_a_transform_has_two_steps(transform: InputTransform) -> None:
    """The first leaves zero at zero and looks at one count and its library; both together are the transform."""
    found = counts() * (torch.rand((8, 20), generator=torch.Generator().manual_seed(1)) < 0.3)
    library = found.sum(dim=1, keepdim=True)
    values = transform.value(found, library)

    assert (values[found == 0] == 0).all()
    assert transform.value(found[3, 4:9], library[3].expand(5)).equal(values[3, 4:9])
    assert transform.finish(values).equal(transform(found))


def test_clip_bounds_the_transform() -> None:
    """On both sides."""
    transform = LogNormalise(1e4, torch.full((20,), 6.0), torch.full((20,), 0.01), 3.0)
    assert float(transform(counts()).abs().max()) <= 3.0


def test_class_weights() -> None:
    """Power 0 weighs cells alike, power 1 classes alike; an absent class weighs nothing."""
    n_cells = torch.tensor([60.0, 20.0, 10.0, 0.0])
    torch.testing.assert_close(class_weights(n_cells, 0.0), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(class_weights(n_cells, 1.0) * n_cells, torch.tensor([30.0, 30.0, 30.0, 0.0]))
