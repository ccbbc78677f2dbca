"""What missing genes do: a table that rises, starts at nothing, and covers sets of genes that it was not made of."""

from pathlib import Path

import numpy as np
import pytest

from service.contract import artifact
from service.inference import displacement
from service.inference import model as serving
from service.inference.session import Runtime
from training import missing_genes, run

FamilyRun = tuple[run.Run, Path]


@pytest.fixture(scope="session")
def served(exported: Path) -> serving.Model:
    """Each family's tiny run, exported and loaded."""
    return serving.load(artifact.read(exported), Runtime())


def test_the_table_travels(served: serving.Model) -> None:
    """From nothing upwards, with as many entries in each column, and labels change where there are labels."""
    table = served.manifest.missing_genes
    assert table is not None
    assert (table.weight, table.n_sets) == (missing_genes.KNOTS, 54)
    assert (table.displacement_median[0], table.displacement_90[0]) == (0, 0)
    assert table.displacement_90[-1] > 0
    assert all(most >= half for half, most in zip(table.displacement_median, table.displacement_90, strict=True))
    assert table.label_changes is not None
    assert table.label_changes[0] == 0


def test_the_card_has_the_table(served: serving.Model) -> None:
    """One line per weight."""
    table = served.manifest.missing_genes
    assert table is not None
    assert "## Missing genes" in served.card
    assert f"| 50% | {table.displacement_median[9]:.2f} | {table.displacement_90[9]:.2f} |" in served.card


def test_cells_move_as_the_table_says(family_run: FamilyRun, served: serving.Model) -> None:
    """Of random sets of genes that the table was not made of, most cells move less than its ninth decile says, and some do move."""
    made, table = family_run[0], served.manifest.missing_genes
    assert table is not None
    cells = missing_genes.held_out_counts(made)
    random, weight = np.random.default_rng(7), served.genes.table.encoder_weight
    below = []
    for share in (0.1, 0.3, 0.5, 0.7):
        for _ in range(4):
            missing = random.permutation(len(weight))[: round(share * len(weight))]
            less = cells.copy()
            less[:, missing] = 0
            moved = np.linalg.norm(served.encode(_csr(cells)) - served.encode(_csr(less)), axis=1)
            effect = served.genes.missing_effect(float(weight[missing].sum()))
            assert effect is not None
            assert moved.max() > 0
            below.append(float(np.mean(moved / table.neighbour_distance <= effect.displacement_90)))
    # Nine in ten by construction; few cells, few genes and another draw leave a good margin.
    assert np.mean(below) > 0.7


def test_golden_cells_without_genes(served: serving.Model) -> None:
    """Nothing missing moves nothing; everything missing moves all cells to where the empty cell lies."""
    nothing = displacement.measure(served, np.array([], dtype=np.int64))
    everything = displacement.measure(served, np.arange(len(served.genes.table)))
    assert nothing is not None
    assert everything is not None
    assert (nothing["displacement_90"], nothing["label_changes"]) == (0, 0)
    assert everything["displacement_median"] > 0
    assert nothing["n_cells"] == 4


def test_gene_sets() -> None:
    """Each takes about its share of genes or weight; the heaviest genes are among the first."""
    weight = np.arange(1, 101, dtype=np.float32)
    sets = list(missing_genes.gene_sets(weight / weight.sum(), weight[::-1], 0))
    n_shares = len(missing_genes.SHARES)
    assert len(sets) == n_shares * (missing_genes.N_RANDOM + 3)
    assert [len(some) for some in sets[: n_shares * missing_genes.N_RANDOM : missing_genes.N_RANDOM]] == [
        round(100 * share) for share in missing_genes.SHARES
    ]
    heaviest = sets[n_shares * missing_genes.N_RANDOM : n_shares * (missing_genes.N_RANDOM + 1)]
    assert heaviest[0].tolist() == [99]
    assert set(heaviest[3]) < set(heaviest[-1])
    assert all(len(np.unique(some)) == len(some) for some in sets)


def test_too_few_cells(family_run: FamilyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without enough held-out cells to have neighbours there is no table."""
    monkeypatch.setattr(missing_genes, "N_CELLS", 10)
    graphs = missing_genes.Graphs({}, {}, None)
    assert missing_genes.measure(family_run[0], graphs, np.ones(40, np.float32)) is None


def _csr(dense: np.ndarray):
    import scipy.sparse as sp

    return sp.csr_matrix(dense)
