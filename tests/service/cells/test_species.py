"""Of which species a list of genes is: ids, prefixes and the writing of symbols, with the evidence."""

import pytest

from service.cells.genes import GeneIndex
from service.cells.species import guess_species
from service.errors import SpeciesMismatch
from tests.builders import gene_table

TABLE = gene_table()
INDEX = GeneIndex(TABLE, "tiny@1", 0.5)
HUMAN = ["CD3D", "MS4A1", "LYZ", "C1orf112", "RP11-885N19.6", "HLA-DRA", "MT-CO1", "AC004556.1"]
MOUSE = ["Cd3d", "Ms4a1", "Lyz2", "Gm1234", "2610301B20Rik", "H2-Aa", "mt-Co1", "Cyp2d22"]


@pytest.mark.parametrize(
    ("genes", "species"),
    [
        ([f"ENSG{n:011d}" for n in range(9)], "homo_sapiens"),
        ([f"ENSG{n:011d}.{n}" for n in range(9)], "homo_sapiens"),
        ([f"ENSMUSG{n:011d}.3" for n in range(9)], "mus_musculus"),
        ([f"ENSRNOG{n:011d}" for n in range(9)], "rattus_norvegicus"),
        ([f"ENSDARG{n:011d}" for n in range(9)], "danio_rerio"),
        ([f"FBgn{n:07d}" for n in range(9)], "drosophila_melanogaster"),
        ([f"mm10___{name}" for name in MOUSE], "mus_musculus"),
        ([f"hg19_{name}" for name in HUMAN], "homo_sapiens"),
        (HUMAN, "homo_sapiens"),
        (MOUSE, "mus_musculus"),
        (["gene-a", "x", "12"], None),
        ([], None),
    ],
)
def test_guess(genes: list[str], species: str | None) -> None:
    """Ids and prefixes tell it, and so does how symbols are written."""
    assert guess_species(genes).guess == species


def test_mouse_symbols_in_capitals() -> None:
    """A mouse's genes in capitals are still a mouse's: human genes have no names like GM12345 and 2610301B20RIK."""
    genes = [*TABLE.gene_symbol, *(f"GM{n}" for n in range(10_000, 10_005))]
    guess = guess_species(genes)
    assert guess.guess == "mus_musculus"
    assert any("GM10000" in line for line in guess.evidence)
    with pytest.raises(SpeciesMismatch, match="changing the case"):
        INDEX.locate(tuple(genes))


def test_one_strange_name_is_no_species() -> None:
    """One such name among two hundred is a stranger, not a mouse."""
    genes = [*HUMAN * 30, "GM12345"]
    assert guess_species(genes).guess == "homo_sapiens"


@pytest.mark.parametrize(
    ("genes", "evidence"),
    [
        (
            [f"ENSMUSG{n:011d}" for n in range(9)],
            "100% of the names are ids or carry a prefix of mus_musculus (ENSMUSG00000000000)",
        ),
        ([f"ENSXXXG{n:011d}" for n in range(9)], "another species (ENSXXX…)"),
        (MOUSE, "written as mouse and rat symbols are (Cd3d, Ms4a1, Lyz2)"),
        ([f"mm10_{name}" for name in TABLE.gene_symbol], "prefix of mus_musculus"),
    ],
)
def test_a_mismatch_is_refused_with_the_evidence(genes: list[str], evidence: str) -> None:
    """Whatever else is wrong with the genes, that is said first."""
    with pytest.raises(SpeciesMismatch) as refused:
        INDEX.locate(tuple(genes))
    assert evidence in refused.value.detail
    assert refused.value.species == "homo_sapiens"


@pytest.mark.parametrize("species", ["rattus_norvegicus", "mus_musculus"])
def test_capitalised_symbols_are_a_rodents(species: str) -> None:
    """Mouse and rat write symbols alike, so that neither is refused for the other; capitals are refused for both."""
    assert not guess_species(MOUSE).contradicts(species)
    assert guess_species(HUMAN).contradicts(species)


@pytest.mark.parametrize("species", ["macaca_mulatta", "none", "sus_scrofa"])
def test_capitals_exclude_no_other_species(species: str) -> None:
    """Macaque and pig genes are written as human ones are, and a model of no known species takes any."""
    assert not guess_species(HUMAN).contradicts(species)


def test_ids_of_another_species_where_a_model_has_none_that_is_known() -> None:
    """Nothing is refused for a model whose species cannot be told from names."""
    assert not guess_species([f"ENSMUSG{n:011d}" for n in range(9)]).contradicts("none")
    assert guess_species([f"ENSMMUG{n:011d}" for n in range(9)]).contradicts("homo_sapiens")
