"""Gene sets: read from GMT, and tested exactly against all sets of the same size."""

import gzip
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.builders import gene_table
from training import gene_sets


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9])
def test_p_is_that_of_all_permutations(k: int) -> None:
    """Every set of k of 9 genes, ties among their values: the closed form is what counting all of them gives."""
    values = np.array([0.1, 0.4, 0.4, 0.2, 0.9, 0.3, 0.8, 0.8, 0.5])
    every = np.array([np.sort(values[list(genes)])[(k - 1) // 2] for genes in combinations(range(9), k)])
    for genes in ((0, 3, 5, 1, 2, 8, 6, 7, 4)[:k], (4, 6, 7, 8, 2, 1, 5, 3, 0)[:k]):
        members = [np.sort(np.array(genes))]
        found = gene_sets.medians(values[None], members)[0, 0]
        tails = (every >= found).mean(), (every <= found).mean()
        assert gene_sets.p_values(values[None], members)[0, 0] == pytest.approx(min(1, 2 * min(tails)), abs=1e-12)


def test_p_is_that_of_many_random_sets() -> None:
    """The permutation test as one would run it, with 20,000 draws, comes near."""
    random = np.random.default_rng(0)
    values = random.gamma(1.0, 1.0, 400)
    members = np.argsort(-values)[np.arange(0, 300, 10)]
    t = np.sort(values[members])[14]
    draws = np.array([np.sort(random.choice(values, 30, replace=False))[14] for _ in range(20_000)])
    expected = 2 * (draws >= t).mean()

    assert expected > 0
    found = gene_sets.p_values(values[None], [members])[0, 0]
    assert found == pytest.approx(expected, abs=5 * np.sqrt(expected / 20_000) + 1e-4)


def test_random_sets_give_uniform_p_and_few_discoveries() -> None:
    """Under the null p below 0.1 comes in a tenth of the sets, and q below 0.05 hardly ever."""
    random = np.random.default_rng(1)
    values = random.standard_normal((1, 500))
    members = [np.sort(random.choice(500, 15, replace=False)) for _ in range(2000)]
    p = gene_sets.p_values(values, members)

    assert (p < 0.1).mean() == pytest.approx(0.1, abs=0.03)
    assert (gene_sets.q_values(p) < 0.05).sum() <= 2


def test_reading(tmp_path: Path) -> None:
    """Symbols, aliases and ids are found; weights after a comma, genes of others and small sets are left out; gzip is read."""
    path = tmp_path / "own.gmt.gz"
    lines = ["BIG\tsource\tG5\tOLD1,1.0\tENSG00000000009\tTP53\tG5", "SMALL\tsource\tG1\tTP53"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = gene_sets.read([str(path)], gene_table(), 2, 500)

    assert found.names == ("BIG",)
    assert found.members[0].tolist() == [1, 5, 9]
    assert (found.files[0].name, found.files[0].n_sets) == ("own.gmt.gz", 1)


def test_what_is_no_file_of_gene_sets(tmp_path: Path) -> None:
    """The registered ones are named."""
    with pytest.raises(gene_sets.NoGeneSets, match=r"h\.all\.v7\.0\.symbols\.gmt"):
        gene_sets.read(["nope.gmt"], gene_table(), 2, 500)
    (tmp_path / "empty.gmt").write_text("just words\n")
    with pytest.raises(gene_sets.NoGeneSets, match="holds no gene set"):
        gene_sets.read([str(tmp_path / "empty.gmt")], gene_table(), 2, 500)
