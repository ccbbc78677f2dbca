"""The model card: figures of held-out cells with intervals, who is taken for whom, and the page with its plots."""

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from service.contract import artifact
from service.inference import model as serving
from service.inference.session import Runtime
from training import card, card_page, held_out, run
from training.data.splits import PUBLISHED, TEST

FamilyRun = tuple[run.Run, Path]


@pytest.fixture(scope="session")
def served(exported: Path) -> serving.Model:
    """Each family's tiny run, exported and loaded."""
    return serving.load(artifact.read(exported), Runtime())


def test_held_out_cells(family_run: FamilyRun, served: serving.Model) -> None:
    """The confusion matrix is that of the served model's answers, and the card has its numbers."""
    made = family_run[0]
    found = held_out.measure(made, served)
    assert found is not None
    cells = made.reference[made.split.positions(made.reference, TEST, PUBLISHED), made.prepared.var.index]
    answers = served.classify(cells.X.tocsr().astype(np.float32))["cell_type"].argmax(axis=1)
    classes = list(made.config.labels[0].classes)
    truth = cells.obs["cell_type"].astype(str)
    is_labelled = truth.isin(classes).to_numpy()
    expected = confusion_matrix(truth[is_labelled], np.array(classes)[answers[is_labelled]], labels=classes)

    assert found.annotations["cell_type"].confusion.tolist() == expected.tolist()
    assert sum(one.n_cells for one in found.figures) == is_labelled.sum()
    for one in found.figures:
        assert f"| {one.cells} | {one.n_cells} | {one.accuracy} | {one.macro_f1} |" in served.card
        assert one.accuracy.low <= one.accuracy.value <= one.accuracy.high


def test_the_page_says_what_the_card_says(family_run: FamilyRun, served: serving.Model) -> None:
    """Every section, with two plots per level and without a script."""
    headings = re.findall(r"^## (.+)$", served.card, re.MULTILINE)
    assert headings[-1] == "How to cite"
    assert re.findall(r"<h2>(.+)</h2>", served.page) == ["Model", *headings]
    assert served.page.count("<img ") == 2 * len(family_run[0].config.labels)
    assert "<table>" in served.page
    assert "<script" not in served.page


def test_what_a_user_wrote_is_text(family_run: FamilyRun, served: serving.Model) -> None:
    """HTML in a limit or a citation is shown, and not obeyed."""
    made = family_run[0]
    evil = "<script>alert(1)</script>"
    config = made.config.model_copy(update={"limits": (evil,), "cite": (evil,)})
    text = card.write(served.manifest, run.Run(**{**vars(made), "config": config}), None)
    assert text.count(evil) == 2
    page = card_page.write(text, None)
    assert evil not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


def test_intervals() -> None:
    """They hold the figure, narrow with more cells, and vanish where every answer is right."""
    truth = np.arange(400) % 4
    wrong = np.where(np.arange(400) < 80, (truth + 1) % 4, truth)
    accuracy, macro_f1 = held_out.intervals(truth, wrong)
    assert accuracy.value == 0.8
    assert 0.75 < accuracy.low < 0.8 < accuracy.high < 0.85
    assert macro_f1.low < macro_f1.value < macro_f1.high
    few, _ = held_out.intervals(truth[40:120], wrong[40:120])
    assert few.high - few.low > accuracy.high - accuracy.low
    assert held_out.intervals(truth, truth)[0] == held_out.Interval(1.0, 1.0, 1.0)


def test_macro_f1_is_scikit_learns() -> None:
    """Also for classes that no cell has, or that are never answered."""
    generator = np.random.default_rng(0)
    for n_cells, n_true, n_said in ((1, 1, 3), (40, 3, 7), (40, 7, 3), (500, 12, 12)):
        truth, answers = generator.integers(n_true, size=n_cells), generator.integers(n_said, size=n_cells)
        expected = f1_score(truth, answers, average="macro", labels=np.unique(truth), zero_division=0.0)
        assert held_out.macro_f1(truth, answers) == pytest.approx(expected)
