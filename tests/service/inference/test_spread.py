"""reconstruct: the likelihood's spread, and the genes that are asked for."""

from pathlib import Path

import numpy as np
import pytest

from service.contract import artifact
from service.errors import InvalidOption
from service.inference import TASKS
from service.inference.model import Model, load
from service.inference.reconstruct import ReconstructOptions
from service.inference.session import Runtime
from tests.builders import counts, write_artifact

RUN = TASKS["reconstruct"].run


def test_spread_is_the_root_of_the_variance(tiny: Model) -> None:
    """On request, for the same genes as the expression; the tiny model's counts are Poisson. Expression has the bits that it has without."""
    with_spread = RUN(tiny, counts(70), ReconstructOptions(spread=True, batch="one"))
    without = RUN(tiny, counts(70), ReconstructOptions(batch="one"))
    assert list(without) == ["expression", "is_empty"]
    assert with_spread["expression"].values.tobytes() == without["expression"].values.tobytes()
    assert with_spread["expression_sd"].values.tobytes() == np.sqrt(without["expression"].values).tobytes()
    assert with_spread["expression_sd"].names == with_spread["expression"].names


def test_spread_of_the_average_is_that_of_the_mixture(tiny: Model) -> None:
    """The law of total variance over the batches: it is wider than either where their means differ."""
    one, two, average = (
        RUN(tiny, counts(5), ReconstructOptions(spread=True, batch=batch)) for batch in ("one", "two", "average")
    )
    means = np.stack([one["expression"].values, two["expression"].values]).astype(np.float64)
    variances = np.stack([one["expression_sd"].values, two["expression_sd"].values]).astype(np.float64) ** 2
    expected = np.sqrt(variances.mean(axis=0) + means.var(axis=0))
    np.testing.assert_allclose(average["expression_sd"].values, expected, rtol=1e-5, atol=1e-6)


def test_named_genes_are_columns_of_the_whole(tiny: Model) -> None:
    """Expression and spread, alone and among others, at several pieces of rows."""
    options = ReconstructOptions(spread=True, genes="G9,G2")
    whole, some = RUN(tiny, counts(130), ReconstructOptions(spread=True)), RUN(tiny, counts(130), options)
    alone = RUN(tiny, counts(130)[70], options)
    for name in ("expression", "expression_sd"):
        assert some[name].names == ("G9", "G2")
        assert some[name].values.tobytes() == np.ascontiguousarray(whole[name].values[:, [9, 2]]).tobytes()
        assert alone[name].values[0].tobytes() == some[name].values[70].tobytes()


def test_genes_that_are_not_asked_for_are_not_kept(tiny: Model) -> None:
    """What comes out of the runtime for them is dropped with its piece: the answer owns no more memory than it has numbers."""
    found = tiny.decode_all(tiny.encode(counts(200)), np.ones(200, np.float32), "one", np.array([3]))["expression"]
    base = found if found.base is None else found.base
    assert (found.shape, base.size) == ((200, 1), 200)


def test_a_model_without_spread(tmp_path: Path) -> None:
    """It is refused where it is asked for, and why."""
    model = load(artifact.read(write_artifact(tmp_path, has_reference=False)), Runtime())
    with pytest.raises(InvalidOption, match="no likelihood of counts") as refused:
        TASKS["reconstruct"].read_options({"spread": "true"}, model)
    assert refused.value.name == "spread"
    assert "expression_sd" not in RUN(model, counts(2), ReconstructOptions())
