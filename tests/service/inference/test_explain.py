"""explain: exact gradients, complete sums, and a cell's genes whatever its company."""

import numpy as np
import pytest
import scipy.sparse as sp

from service.cells.columns import LabelLists, Labels
from service.errors import InvalidOption
from service.inference import TASKS
from service.inference.model import Model
from tests.builders import CLASSES, N_GENES, N_LATENT, counts

TASK = TASKS["explain"]


def answer(tiny: Model, matrix: sp.csr_matrix, **options: str):
    """The columns for options as a person writes them."""
    return TASK.run(tiny, matrix, TASK.read_options(options, tiny))


def test_a_unit_by_its_weights(tiny: Model) -> None:
    """The tiny encoder is linear in ln(1 + counts), so what a gene adds to a unit is its weight times its value: found by counting it."""
    cell = counts(1)
    found = answer(tiny, cell, unit="2", top="all", method="input_x_gradient")["attribution"]
    without = cell.toarray().repeat(N_GENES, axis=0)
    np.fill_diagonal(without, 0)
    difference = tiny.encode(cell)[0, 2] - tiny.encode(sp.csr_matrix(without))[:, 2]

    assert found.names[1] == "G1"
    np.testing.assert_allclose(found.values[0], difference, atol=1e-5)


@pytest.mark.parametrize("baseline", ["empty", "mean"])
@pytest.mark.parametrize("target", [{}, {"label": "NK"}, {"unit": "4"}, {"direction": "1,0,-2,0.5,0"}])
def test_integrated_gradients_add_up(tiny: Model, target: dict[str, str], baseline: str) -> None:
    """The sum over all genes is what the cell differs by from the baseline, within 1 %, and so it is said."""
    columns = answer(tiny, counts(20), top="all", baseline=baseline, **target)
    change = columns["value"].values - columns["baseline_value"].values
    total = columns["attribution"].values.sum(axis=1)
    size = np.maximum(np.abs(change), 0.1 * np.abs(columns["attribution"].values).sum(axis=1))

    assert columns["completeness_error"].values.max() < 0.01
    np.testing.assert_allclose(columns["completeness_error"].values, np.abs(total - change) / size, atol=1e-5)


def test_a_label_by_finite_differences(tiny: Model) -> None:
    """The value is the log-odds of annotate's probability, and its gradient is what moving a gene a little changes of it."""
    cell = counts(1).toarray().astype(np.float64)
    columns = answer(tiny, sp.csr_matrix(cell, dtype=np.float32), label="T", top="all", method="input_x_gradient")
    p = float(tiny.classify(sp.csr_matrix(cell, dtype=np.float32))["cell_type"][0, 1])

    assert columns["value"].values[0] == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
    for gene in (0, 5, 11):
        step = 0.05
        moved = [cell.copy(), cell.copy()]
        for one, sign in zip(moved, (-1, 1), strict=True):
            one[0, gene] = np.expm1(np.log1p(cell[0, gene]) * (1 + sign * step))
        values = [
            answer(tiny, sp.csr_matrix(one, dtype=np.float32), label="T")["value"].values[0].astype(float)
            for one in moved
        ]
        difference = (values[1] - values[0]) / (2 * step)
        assert columns["attribution"].values[0, gene] == pytest.approx(difference, abs=2e-3)


def test_by_default_each_cell_is_explained_for_its_own_label(tiny: Model) -> None:
    """The most probable class, the one that annotate gives; the numbers are those of asking for it by name."""
    matrix = counts(30)
    columns = answer(tiny, matrix)
    labels = TASKS["annotate"].run(tiny, matrix, TASKS["annotate"].options())["predicted_labels"]

    assert isinstance(columns["explained"], Labels)
    assert columns["explained"].codes.tolist() == labels.codes.tolist()
    assert len(set(labels.codes.tolist())) > 1
    for code in set(labels.codes.tolist()):
        cells = labels.codes == code
        asked = answer(tiny, matrix[np.flatnonzero(cells)], label=CLASSES[code])
        assert asked["top_attributions"].values.tobytes() == columns["top_attributions"].values[cells].tobytes()


def test_top_genes_are_the_largest_by_size(tiny: Model) -> None:
    """In order, negative ones among them, and as many as asked for; more than there are gives all."""
    every = answer(tiny, counts(6), unit="0", top="all")["attribution"].values
    few = answer(tiny, counts(6), unit="0", top="7")
    names = few["top_genes"]

    assert isinstance(names, LabelLists)
    assert names.codes.shape == (6, 7)
    for row in range(6):
        order = np.argsort(-np.abs(every[row]), kind="stable")[:7]
        assert [names.words[code] for code in names.codes[row]] == [tiny.genes.display(at) for at in order]
        assert few["top_attributions"].values[row].tolist() == every[row, order].tolist()
    assert (few["top_attributions"].values < 0).any()
    assert answer(tiny, counts(2), top="999")["top_genes"].codes.shape == (2, N_GENES)


def test_bits_do_not_depend_on_company_even_where_steps_differ(tiny: Model) -> None:
    """With one step some cells are refined and others are not: each as if it were alone."""
    matrix = counts(150, seed=4)
    together = answer(tiny, matrix, steps="1", top="all")
    n_steps = together["n_steps"].values

    assert len(set(n_steps.tolist())) > 1
    for row in range(0, 150, 7):
        alone = answer(tiny, matrix[row], steps="1", top="all")
        assert alone["attribution"].values.tobytes() == together["attribution"].values[row].tobytes()
        assert alone["n_steps"].values[0] == n_steps[row]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"label": "Q"}, "'Q' is not one of: B, T, NK"),
        ({"level": "tissue"}, "'tissue' is not one of: cell_type"),
        ({"unit": "1", "level": "cell_type"}, "it belongs to a label"),
        ({"unit": "5"}, "5 is not one of 0 to 4"),
        ({"unit": "-1"}, "greater than or equal to 0"),
        ({"unit": "1", "label": "B"}, "one thing can be explained"),
        ({"direction": "1,2"}, "it must be 5 finite numbers"),
        ({"direction": "0,0,0,0,0"}, "not all of them zero"),
        ({"direction": "1,2,3,4,nan"}, "it must be 5 finite numbers"),
        ({"direction": "a,b"}, "numbers separated by commas"),
        ({"top": "0"}, "greater than or equal to 1"),
        ({"steps": "257"}, "less than or equal to 256"),
        ({"method": "magic"}, "input_x_gradient"),
    ],
)
def test_what_cannot_be_explained(tiny: Model, options: dict[str, str], problem: str) -> None:
    """The option is named, and what is allowed."""
    with pytest.raises(InvalidOption, match=problem):
        TASK.read_options(options, tiny)


def test_the_head_says_what_the_numbers_are_of(tiny: Model) -> None:
    """Method, baseline, what is explained and in which unit."""
    about = [TASK.read_options(options, tiny).about(tiny)["explanation"] for options in ({}, {"unit": "3"})]

    assert about[0] == {
        "method": "integrated_gradients",
        "baseline": "empty",
        "steps": 32,
        "explained": "predicted label",
        "level": "cell_type",
        "unit_of_value": "log-odds",
    }
    assert (about[1]["explained"], about[1]["unit_of_value"]) == ("unit 3", "latent")


def test_directions_take_one_number_per_unit(tiny: Model) -> None:
    """A direction along one unit is that unit."""
    along = ",".join(str(int(unit == 1)) for unit in range(N_LATENT))
    one, other = answer(tiny, counts(3), direction=along), answer(tiny, counts(3), unit="1")

    assert one["top_attributions"].values.tobytes() == other["top_attributions"].values.tobytes()
