"""describe: what annotate, map and explain say, in one answer, with the same bits."""

from typing import Any

import numpy as np
import pytest

from service.cells.columns import Columns, LabelLists, Labels
from service.errors import InvalidOption
from service.inference import TASKS
from service.inference.model import Model
from tests.builders import N_REFERENCE, counts
from tests.service.inference.test_annotate import words

TASK = TASKS["describe"]


def ask(task: str, model: Model, **options: Any) -> Columns:
    """What a task says of twelve cells, the options as a client writes them."""
    asked = TASKS[task].read_options({name: str(value) for name, value in options.items()}, model)
    return TASKS[task].run(model, counts(12), asked)


def bits(column: object) -> bytes:
    """All that a column holds."""
    if isinstance(column, Labels | LabelLists):
        return column.codes.tobytes() + "|".join(column.words).encode()
    return np.ascontiguousarray(column.values).tobytes()


def same(found: Columns, parts: dict[str, Columns]) -> set[str]:
    """The columns, after comparing each with that of the task that it is from."""
    for name, column in found.items():
        own = next(columns[name] for columns in parts.values() if name in columns)
        assert bits(column) == bits(own), name
    return set(found)


def test_the_parts_of_a_model_with_reference_cells(tiny: Model) -> None:
    """Labels, neighbours and genes are those of the three tasks; what only their readers want is left out."""
    parts = {
        "annotate": ask("annotate", tiny, top_k=2),
        "map": ask("map", tiny, k=4),
        "explain": ask("explain", tiny, top=3),
    }
    names = same(ask("describe", tiny, top_k=2, k=4, top=3), parts)
    assert names >= {
        "predicted_labels",
        "conf_score",
        "top_labels",
        "neighbours",
        "voted_labels",
        "is_disagreeing",
        "umap",
    }
    assert names >= {"top_genes", "top_attributions", "completeness_error", "is_empty"}
    assert not names & {"probabilities", "classified_labels", "value", "explained", "n_steps"}


def test_the_parts_of_a_calibrated_model(calibrated: Model) -> None:
    """It has levels, prediction sets and a mapping score, and nothing to explain with."""
    parts = {"annotate": ask("annotate", calibrated, top_k=3, coverage=0.95), "map": ask("map", calibrated, k=5)}
    found = ask("describe", calibrated)
    names = same(found, parts)
    assert names >= {"mapping_score", "prediction_set", "predicted_labels_cell_subtype", "neighbours"}
    assert not [name for name in names if name.startswith("probabilities")]
    assert list(found)[-1] == "is_empty"


def test_coverage_that_nothing_is_known_of(tiny: Model) -> None:
    """By default a model without calibration scores has no sets; asked for, they are refused, as annotate refuses them."""
    assert "prediction_set" not in ask("describe", tiny)
    with pytest.raises(InvalidOption, match="without calibration scores"):
        ask("describe", tiny, coverage=0.9)


def test_more_neighbours_than_there_are(tiny: Model) -> None:
    """Refused as map refuses them."""
    with pytest.raises(InvalidOption, match=f"{N_REFERENCE} reference cells"):
        ask("describe", tiny, k=N_REFERENCE + 1)


def test_the_head_says_what_the_parts_say(calibrated: Model) -> None:
    """Threshold, coverage and the reference."""
    about = TASK.read_options({"unknown_threshold": "0.2"}, calibrated).about(calibrated)
    assert about["unknown_threshold"] == 0.2
    assert about["coverage"] == 0.95
    assert about["reference"]["n_cells"] == N_REFERENCE
    assert words(ask("describe", calibrated, unknown_threshold=1), "predicted_labels") == words(
        ask("annotate", calibrated, unknown_threshold=1), "predicted_labels"
    )
