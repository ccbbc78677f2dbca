"""What an export says of the reference's own cells."""

from pathlib import Path

import numpy as np
import pytest

from service.contract import artifact
from service.contract.manifest import QUANTILES
from service.inference import model as serving
from service.inference.session import Runtime
from training import profile as module
from training.profile import distribution, profile
from training.run import Run


def test_an_export_describes_its_reference(family_run: tuple[Run, Path], exported: Path) -> None:
    """Library sizes and labels are those of the training cells; confidence and entropy are probabilities of every held-out cell."""
    run: Run = family_run[0]
    found = artifact.read(exported).manifest.profile
    library_size = np.asarray(run.prepared.train.counts.sum(axis=1)).ravel()

    assert found.n_cells == len(library_size)
    assert found.library_size.mean == pytest.approx(library_size.mean())
    assert found.library_size.quantiles["0.5"] == pytest.approx(np.median(library_size))
    for i, level in enumerate(run.config.labels):
        if "classify" not in run.family.graphs():
            assert found.labels == {}
            continue
        known, labels = found.labels[level.name], run.prepared.train.labels[:, i]
        assert sum(known.shares.values()) == pytest.approx(1)
        for number, name in enumerate(level.classes):
            assert known.shares.get(name, 0) == pytest.approx((labels[labels >= 0] == number).mean())
        n_classes = len(level.classes)
        assert 1 / n_classes <= known.conf_score.quantiles["0.05"] <= known.conf_score.quantiles["0.95"] <= 1
        assert 0 <= known.entropy.quantiles["0.05"] <= known.entropy.quantiles["0.95"] <= 1
        assert known.n_held_out == len(run.split.positions(run.reference, "test", "validation"))


def test_some_of_many_cells(family_run: tuple[Run, Path], exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large reference some cells stand for all, and the pieces in which they run make no difference."""
    run: Run = family_run[0]
    model = serving.load(artifact.read(exported), Runtime())
    whole = profile(run, model)
    monkeypatch.setattr(module, "ROWS", 7)
    assert profile(run, model) == whole
    monkeypatch.setattr(module, "MAX_CELLS", 10)
    assert profile(run, model).n_cells == whole.n_cells
    assert all(level.n_held_out <= 10 for level in profile(run, model).labels.values())


def test_a_distribution() -> None:
    """Mean and five quantiles, as numpy has them."""
    found = distribution(np.arange(101, dtype=np.float32))

    assert found.mean == 50
    assert found.quantiles == {quantile: float(quantile) * 100 for quantile in QUANTILES}
