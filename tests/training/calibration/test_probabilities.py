"""Maps of probabilities: they find what was done to them, the least log-loss wins, and children stay below their parents."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss

from service.contract.annotation import LabelLevel
from training.calibration import probabilities as fitting
from training.calibration import sets
from training.calibration.probabilities import METHODS, Map

BROAD = LabelLevel(name="broad", classes=("T", "B"), ontology_ids=(None, None))
FINE = LabelLevel(
    name="fine",
    classes=("B", "CD4 T", "CD8 T"),
    ontology_ids=(None, None, None),
    parent="broad",
    parents=("B", "T", "T"),
)
ONE = np.zeros(4, np.int64)


def drawn(n_cells: int, weight: float = 1.0, bias: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of `n_cells` such that weight · ln p + bias on the first class are the true logits."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.full(4, 0.5), n_cells) + 1e-12
    logits = weight * np.log(p)
    logits[:, 0] += bias
    true = np.exp(logits - logits.max(axis=1, keepdims=True))
    true /= true.sum(axis=1, keepdims=True)
    return p / p.sum(axis=1, keepdims=True), np.array([random.choice(4, p=row) for row in true])


def cross_fit(method: str, p: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Probabilities of all cells, each by the map that was fitted without its part."""
    return fitting.cross_fitted(fitting.fit_without(method, p, labels, ONE, fold), p, ONE, fold)


def test_how_sure_a_network_is() -> None:
    """The median margin of the true class before the others of its group, in nats; cells without a label and classes alone do not count."""
    p = np.array(
        [[0.8, 0.1, 0.1, 0.9], [0.2, 0.4, 0.4, 0.9], [0.6, 0.3, 0.1, 0.9], [0.1, 0.8, 0.1, 0.9], [0.3, 0.3, 0.4, 0.9]]
    )
    group = np.array([0, 0, 0, 1])
    assert fitting.sureness(p, np.array([0, 0, 0, -1, 3]), group) == pytest.approx(np.log(2))
    assert fitting.sureness(p, np.array([0, -1, -1, -1, 3]), group) == pytest.approx(np.log(8))
    assert fitting.sureness(p, np.array([3, -1, -1, -1, -1]), group) == 0
    assert fitting.sureness(p**2, np.array([0, 0, 0, -1, 3]), group) == pytest.approx(2 * np.log(2))


def test_a_temperature_is_found() -> None:
    """Of probabilities that were twice too sure, and nothing of those that were right."""
    p, labels = drawn(5000, weight=0.5)
    found = fitting.fit_map("temperature", p, labels, ONE)
    np.testing.assert_allclose(found.weight, 0.5 * np.eye(4), atol=0.03)
    assert not found.bias.any()
    p, labels = drawn(5000)
    np.testing.assert_allclose(fitting.fit_map("temperature", p, labels, ONE).weight, np.eye(4), atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_was_always_right_is_not_taken_to_be_infallible(method: str) -> None:
    """A hundred right cells and more make it surer, and still leave about one such cell that may be wrong, as the rule of succession does."""
    p, _ = drawn(200)
    p = p[p.max(axis=1) > 0.5]
    labels = p.argmax(axis=1)
    served = fitting.apply_map(fitting.fit_map(method, p, labels, ONE), p, ONE)
    assert fitting.log_loss(served, labels) <= fitting.log_loss(p, labels)
    assert (1 - served.max(axis=1)).sum() > 0.5


def test_a_shifted_class_is_found_by_vector_scaling() -> None:
    """The difference of biases is what was shifted; temperature cannot do it."""
    p, labels = drawn(5000, bias=-2.0)
    found = fitting.fit_map("vector", p, labels, ONE)
    assert found.bias[0] - found.bias[1:].mean() == pytest.approx(-2.0, abs=0.3)
    fold = fitting.folds(labels, 0)
    losses = {method: fitting.log_loss(cross_fit(method, p, labels, fold), labels) for method in METHODS}
    assert losses["vector"] < losses["temperature"] - 0.05
    assert losses["vector"] < losses["none"] - 0.05


def test_a_dirichlet_map_is_multinomial_regression_on_logarithms() -> None:
    """Its log-loss is that of scikit-learn's regression, which penalises other things, within a hundredth."""
    p, labels = drawn(3000, weight=0.7, bias=1.0)
    ours = fitting.apply_map(fitting.fit_map("dirichlet", p, labels, ONE), p, ONE)
    theirs = LogisticRegression(C=100, max_iter=2000).fit(np.log(p), labels).predict_proba(np.log(p))
    assert fitting.log_loss(ours, labels) == pytest.approx(sklearn_log_loss(labels, theirs), abs=0.01)


def test_cross_fitting_never_fits_a_cell_with_itself() -> None:
    """A label that is wrong on purpose changes the probabilities of other parts only."""
    p, labels = drawn(200)
    fold = fitting.folds(labels, 0)
    before = cross_fit("vector", p, labels, fold)
    changed = np.where(np.arange(200) == 7, (labels + 1) % 4, labels)
    after = cross_fit("vector", p, changed, fold)
    assert (before[fold == fold[7]] == after[fold == fold[7]]).all()
    assert (before[fold != fold[7]] != after[fold != fold[7]]).any()


def test_parts_hold_all_classes() -> None:
    """Each class is spread over the parts as evenly as its number allows."""
    labels = np.repeat([0, 1, -1], [50, 5, 20])
    fold = fitting.folds(labels, 3)
    assert np.bincount(fold[:50]).tolist() == [10] * 5
    assert sorted(fold[50:55].tolist()) == [0, 1, 2, 3, 4]


def test_children_add_up_to_their_parent() -> None:
    """Whatever the maps are."""
    random = np.random.default_rng(0)
    raw = {"broad": random.dirichlet(np.ones(2), 50), "fine": random.dirichlet(np.ones(3), 50)}
    group = fitting.groups((BROAD, FINE))
    assert group["fine"].tolist() == [1, 0, 0]
    maps = {
        "broad": Map(np.eye(2) * 2, np.array([0.5, 0])),
        "fine": Map(random.normal(size=(3, 3)), random.normal(size=3)),
    }
    found = fitting.compose(
        (BROAD, FINE), {name: fitting.apply_map(maps[name], raw[name], group[name]) for name in raw}
    )
    np.testing.assert_allclose(found["fine"][:, 0], found["broad"][:, 1])
    np.testing.assert_allclose(found["fine"][:, 1:].sum(axis=1), found["broad"][:, 0])
    np.testing.assert_allclose(found["broad"].sum(axis=1), 1)


def test_a_child_without_siblings_is_certain_within_its_parent() -> None:
    """And fitting the level leaves its weight alone."""
    found = fitting.within(torch.zeros((1, 3), dtype=torch.float64), torch.tensor([1, 0, 0]))
    assert found.tolist() == [[1.0, 0.5, 0.5]]


def test_reliability() -> None:
    """Four cells by hand: two of confidence 0.95 with one right, two of 0.55 with both right; a cell without a label counts nothing."""
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.45, 0.55], [0.5, 0.5]])
    found = fitting.reliability(p, np.array([0, 1, 0, 1, -1]))
    assert found.expected_calibration_error == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert found.log_loss == pytest.approx(-np.log([0.95, 0.05, 0.55, 0.55]).mean())
    assert [(one.n_cells, one.accuracy) for one in found.bins] == [(2, 1.0), (2, 0.5)]


def test_scores_of_sets() -> None:
    """By hand: what is likelier than a class and itself (aps), with a penalty from the third class on (raps)."""
    p = np.array([[0.2, 0.5, 0.1, 0.2]])
    np.testing.assert_allclose(sets.score("lac", p), [[0.8, 0.5, 0.9, 0.8]])
    np.testing.assert_allclose(sets.score("aps", p), [[0.7, 0.5, 1.0, 0.9]])
    np.testing.assert_allclose(sets.score("raps", p), [[0.7, 0.5, 1.02, 0.91]])


def test_sizes_hold_what_was_asked() -> None:
    """Coverage of cross-validated sets is within three standard errors for each kind that can be as small as that."""
    p, labels = drawn(3000)
    fold = fitting.folds(labels, 0)
    found = {(one.score, one.asked): one for one in sets.sizes("broad", dict.fromkeys(range(5), p), labels, fold)}
    assert len(found) == 9
    for asked in sets.COVERAGES:
        assert found["lac", asked].coverage == pytest.approx(asked, abs=3 * np.sqrt(asked * (1 - asked) / 3000) + 1e-3)
        assert found["lac", asked].mean_size <= found["aps", asked].mean_size


def test_sizes_of_a_part_are_by_the_map_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is the limit, which is the quantile of what that map says of the others; by hand."""
    monkeypatch.setattr(sets, "MIN_CLASS", 1000)
    p, labels = drawn(400)
    fold = fitting.folds(labels, 0, 2)
    other = fitting.apply_map(Map(np.diag([3.0, 1, 1, 1]), np.array([1.0, 0, 0, 0])), p, ONE)
    n_held = 0
    for number, judged in enumerate((p, other)):
        scores = (1 - judged)[np.arange(400), labels]
        rest = np.sort(scores[fold != number])
        n_held += int((scores[fold == number] <= rest[int(np.ceil(201 * 0.8)) - 1]).sum())
    found = {(one.score, one.asked): one for one in sets.sizes("broad", {0: p, 1: other}, labels, fold)}
    same = {(one.score, one.asked): one for one in sets.sizes("broad", {0: p, 1: p}, labels, fold)}
    assert found["lac", 0.8].coverage == n_held / 400 != same["lac", 0.8].coverage
