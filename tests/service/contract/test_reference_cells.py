"""reference/: what is written is read back, and what is not as documented is refused with the place."""

import io
from typing import Any

import numpy as np
import pytest

from service.contract.manifest import Manifest
from service.contract.reference_cells import NO_LABEL, ReferenceCells, dump_cells
from tests.builders import N_LATENT, N_REFERENCE, parts

DOCUMENT, CONTENTS = parts()
MANIFEST = Manifest.model_validate(DOCUMENT)
TABLE = CONTENTS["reference/cells.tsv"].decode()


def npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def test_round_trip() -> None:
    """Ids, batches and labels by name, arrays bit for bit; a cell without a label has none."""
    cells = ReferenceCells.parse(MANIFEST, CONTENTS)
    assert len(cells) == N_REFERENCE
    assert cells.labels["cell_type"][-1] == NO_LABEL
    classes = (*MANIFEST.labels[0].classes, "")
    again = dump_cells(
        cells.cell_ids,
        tuple(MANIFEST.batch.names[code] for code in cells.batch),
        {"cell_type": tuple(classes[code] for code in cells.labels["cell_type"])},
    )
    assert again == CONTENTS["reference/cells.tsv"]
    assert npy(cells.latent) == CONTENTS["reference/latent.npy"]
    assert npy(cells.umap) == CONTENTS["reference/umap.npy"]


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (TABLE.replace("cell_id", "id", 1), "line 1 must be the header"),
        (TABLE.replace("\tcell_type", "\tcell_type\tcell_type", 1), "each once"),
        (TABLE.replace("cell_type", "tissue", 1), "'tissue', which is no label level"),
        (TABLE.replace("\tcell_type\n", "\n", 1).replace("\tB\n", "\n"), "line"),
        (TABLE.rpartition("set/")[0], "has 22 cells, not 23"),
        (TABLE.replace("set/4\t", "set/3\t", 1), "cell_id twice"),
        (TABLE.replace("\tone\t", "\tthree\t", 1), "'three' is no batch or class"),
        (TABLE.replace("\tNK\n", "\tPlatelet\n", 1), "'Platelet' is no batch or class"),
        (TABLE.replace("set/4\t", "\t", 1), "line 6 must have 3"),
        (TABLE.replace("set/4\t", "set/4", 1), "line 6 must have 3"),
    ],
)
def test_tables_that_are_wrong(table: str, found: str) -> None:
    """With the file and the line or the name."""
    with pytest.raises(ValueError, match=found) as refused:
        ReferenceCells.parse(MANIFEST, {**CONTENTS, "reference/cells.tsv": table.encode()})
    assert "reference/cells.tsv" in str(refused.value)


def test_a_level_that_votes_must_be_there() -> None:
    """A vote without labels could not be made."""
    table = "cell_id\tbatch\n" + "".join(f"{number}\tone\n" for number in range(N_REFERENCE))
    with pytest.raises(ValueError, match="no column 'cell_type' to vote with"):
        ReferenceCells.parse(MANIFEST, {**CONTENTS, "reference/cells.tsv": table.encode()})


GOOD = np.zeros((N_REFERENCE, N_LATENT), np.float32)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (npy(GOOD.astype(np.float64)), "not float32"),
        (npy(GOOD[1:]), r"of shape \(23, 5\)"),
        (npy(np.where(GOOD == 0, np.nan, GOOD).astype(np.float32)), "not finite"),
        (npy(np.array([{"a": 1}] * N_REFERENCE)), "no npy file"),
        (b"", "no npy file"),
        (npy(GOOD)[:-5], "no npy file"),
    ],
)
def test_latents_that_are_wrong(content: bytes, found: str) -> None:
    """Another type or shape, NaN, a pickle, a cut."""
    with pytest.raises(ValueError, match=found):
        ReferenceCells.parse(MANIFEST, {**CONTENTS, "reference/latent.npy": content})


def test_names_that_would_break_the_table() -> None:
    """They are refused when it is written."""
    with pytest.raises(ValueError, match="separates names"):
        dump_cells(("a\tb",), ("one",), {})
