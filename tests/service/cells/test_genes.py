"""Gene alignment: laws, names, reports and hints."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.genes import GeneIndex, align
from service.errors import TooFewGenes
from tests.builders import N_GENES, counts, gene_table

TABLE = gene_table()
INDEX = GeneIndex(TABLE, "tiny@1", 0.5)


def aligned(matrix: sp.csr_matrix, genes: tuple[str, ...]) -> sp.csr_matrix:
    positions, _ = INDEX.locate(genes)
    return align(matrix, positions, N_GENES)


def bits(matrix: sp.csr_matrix) -> tuple[bytes, ...]:
    return matrix.indptr.astype(np.int64).tobytes(), matrix.indices.astype(np.int64).tobytes(), matrix.data.tobytes()


REFERENCE = aligned(counts(6), TABLE.gene_symbol)


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(N_GENES)))
def test_order_leaves_no_trace(order: list[int]) -> None:
    """Genes in any order give the very same aligned counts, down to the layout."""
    assert bits(aligned(counts(6)[:, order], tuple(TABLE.gene_symbol[i] for i in order))) == bits(REFERENCE)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_columns_of_one_gene_are_summed(data: st.DataObject) -> None:
    """Counts that are spread over several columns of a gene, by whichever of its names, add up."""
    shares = data.draw(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["id", "symbol", "version"])), min_size=1, max_size=6)
    )
    names = {"id": TABLE.gene_id[1], "symbol": TABLE.gene_symbol[1], "version": TABLE.gene_id[1] + ".4"}
    genes = (*TABLE.gene_symbol[:1], *TABLE.gene_symbol[2:], *(names[kind] for _, kind in shares))
    rest = sp.hstack([REFERENCE[:, :1], REFERENCE[:, 2:]], format="csr")
    columns = np.array([[share for share, _ in shares]] * 6, dtype=np.float32)
    found = aligned(sp.hstack([rest, sp.csr_matrix(columns)], format="csr"), genes)

    assert found[:, 1].toarray().ravel().tolist() == [sum(share for share, _ in shares)] * 6
    assert found[:, 2:].toarray().tolist() == REFERENCE[:, 2:].toarray().tolist()


def test_a_gene_twice_within_a_cell() -> None:
    """A repeated index within a cell is summed, as columns are."""
    twice = sp.csr_matrix((np.array([2.0, 3.0, 1.0]), np.array([5, 5, 0]), np.array([0, 3])), shape=(1, N_GENES))
    assert aligned(twice, TABLE.gene_symbol)[0, 5] == 5


def test_missing_genes_are_zero_and_reported_by_weight() -> None:
    """Genes that the query lacks count zero; the report lists the heaviest first and their share."""
    table = type(TABLE)(
        TABLE.gene_id, TABLE.gene_symbol, TABLE.aliases, np.linspace(0, 2 / N_GENES, N_GENES, dtype=np.float32)
    )
    positions, report = GeneIndex(table, "m@1", 0.1).locate(TABLE.gene_symbol[:30])

    assert (report.n_matched, report.n_missing, report.gene_overlap) == (30, 10, 0.75)
    assert report.missing == tuple(f"G{number}" for number in range(39, 29, -1))
    assert report.missing_weight == pytest.approx(table.encoder_weight[30:].sum())
    assert align(counts(2)[:, :30], positions, N_GENES)[:, 30:].nnz == 0


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("ENSG00000000007", 7),
        ("ENSG00000000007.12", 7),
        ("G7", 7),
        ("OLD2", 2),
        ("RP11-885N19.6", 3),
        ("RP11-885N19", -1),
        ("G7.1", -1),
        ("ENSG00000000007.", -1),
        ("g7", -1),
        ("", -1),
        ("ENSG00000000007.1.2", -1),
    ],
)
def test_names(name: str, position: int) -> None:
    """Ids, ids with versions, symbols and aliases are found; a dot is removed from ENS ids only, and nothing is guessed."""
    assert INDEX.find(name) == position


def test_the_report_of_names() -> None:
    """What was renamed, duplicated, unknown or looks damaged is in the report."""
    genes = ("OLD0", "ENSG00000000001.3", "G1", *TABLE.gene_symbol[2:], "stranger", "1-Mar", "Sep-02")
    _, report = INDEX.locate(genes)

    assert report.renamed == {"OLD0": "G0", "ENSG00000000001.3": "G1"}
    assert report.duplicated == {"G1": 2}
    assert (report.n_unknown, report.n_missing) == (3, 0)
    assert report.suspect == ("1-Mar", "Sep-02")


def test_a_stronger_name_wins() -> None:
    """A symbol that is another gene's alias means the gene of that symbol."""
    table = type(TABLE)(("A", "B"), ("x", "y"), (("y",), ()), np.array([0.5, 0.5], dtype=np.float32))
    assert GeneIndex(table, "m@1", 0.1).find("y") == 1


@pytest.mark.parametrize(
    ("genes", "hint"),
    [
        (["g0", "g1", "g2"], "upper case"),
        ([str(number) for number in range(9)], "index was sent"),
        (["hg19_G0", "hg19_G1"], "prefix"),
        (["CD3_TotalSeqB", "CD4_TotalSeqB"], "antibodies"),
        (["gene-a", "gene-b"], "Ensembl gene ids or gene symbols"),
    ],
)
def test_hints(genes: list[str], hint: str) -> None:
    """Below the floor the query is refused with numbers, examples of both sides and the likely reason."""
    with pytest.raises(TooFewGenes) as refused:
        INDEX.locate(tuple(genes))

    assert hint in refused.value.hint
    assert refused.value.n_query_genes == len(genes)
    assert genes[0] in refused.value.query_examples
    assert "ENSG00000000000 (G0)" in refused.value.model_examples


def test_the_floor() -> None:
    """Exactly the floor is enough, one gene less is not."""
    INDEX.locate(TABLE.gene_symbol[:20])
    with pytest.raises(TooFewGenes, match=r"Of the 40 genes of tiny@1, 19 .* \(47.5%; at least 50% is needed\)"):
        INDEX.locate(TABLE.gene_symbol[:19])


def test_names_in_messages_are_short_and_printable() -> None:
    """A message repeats no control characters and no endless names."""
    with pytest.raises(TooFewGenes) as refused:
        INDEX.locate(("a\x1b[31m\n", "b" * 10_000))

    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_alignment_is_a_sum_over_names(data: st.DataObject) -> None:
    """Aligned counts are what numpy adds up gene by gene; the result is sorted, without repeats, and float32."""
    n_cells, n_query, n_model = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12)), 8
    positions = np.array(
        data.draw(st.lists(st.integers(-1, n_model - 1), min_size=n_query, max_size=n_query)), np.int32
    )
    kind = data.draw(st.sampled_from([np.uint8, np.int64, np.float32, np.float64]))
    values = data.draw(st.lists(st.integers(0, 200), min_size=n_cells * n_query, max_size=n_cells * n_query))
    sent = np.array(values, kind).reshape(n_cells, n_query)
    expected = np.zeros((n_cells, n_model))
    for column, position in enumerate(positions):
        if position >= 0:
            expected[:, position] += sent[:, column]
    found = align(sp.csr_matrix(sent), positions, n_model)

    np.testing.assert_array_equal(found.toarray(), expected)
    assert found.dtype == np.float32
    assert found.has_canonical_format
    assert all((np.diff(row.indices) > 0).all() for row in found)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(4)))
def test_sums_beyond_float32_leave_no_trace_of_order(order: list[int]) -> None:
    """Columns of one gene that add up to more than float32 holds exactly give the same bits in every order."""
    sent = np.array([[2**24, 1, 1, 1]], dtype=np.float32)[:, order]
    found = align(sp.csr_matrix(sent), np.zeros(4, np.int32), 1)
    assert found.data.tolist() == [np.float32(2**24 + 3)]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(6)), keep=st.integers(1, 6))
def test_a_cell_does_not_depend_on_its_company(order: list[int], keep: int) -> None:
    """Cells in any order and any company are aligned to the same bits."""
    rows = order[:keep]
    assert bits(aligned(counts(6)[rows], TABLE.gene_symbol)) == bits(REFERENCE[rows])


def test_alignment_leaves_what_was_sent() -> None:
    """The counts of the request are not changed by aligning them."""
    matrix = counts(3)
    before = bits(matrix)
    aligned(matrix, TABLE.gene_symbol)
    assert bits(matrix) == before


def test_the_same_genes_again() -> None:
    """A gene list that was seen before gives the same answer, which nobody can change for the next one."""
    index = GeneIndex(TABLE, "tiny@1", 0.5)
    first, report = index.locate(TABLE.gene_symbol)
    again, _ = index.locate(tuple(TABLE.gene_symbol))
    assert first.tolist() == again.tolist()
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 5
    report.as_dict()["renamed"]["G0"] = "changed"
    assert index.locate(TABLE.gene_symbol)[1].renamed == {}


def test_every_kind_of_name_gives_the_same_bits() -> None:
    """Ids, ids with versions, symbols and aliases are names of the same genes."""
    for names in (
        TABLE.gene_id,
        tuple(f"{gene_id}.{number}" for number, gene_id in enumerate(TABLE.gene_id)),
        ("OLD0", "OLD1", "OLD2", *TABLE.gene_symbol[3:]),
    ):
        assert bits(aligned(counts(6), names)) == bits(REFERENCE)


@pytest.mark.parametrize(
    "symbol", ["HLA-DRA", "RP11-885N19.6", "AC004556.1", "Y_RNA", "ENSX.1", "MT-CO1", "ENSG.2", "1-Mar"]
)
def test_symbols_are_kept_as_they_are(symbol: str) -> None:
    """Dots, dashes and underscores belong to a symbol: it is found whole and not without its ending."""
    table = type(TABLE)(("A",), (symbol,), ((),), np.ones(1, dtype=np.float32))
    index = GeneIndex(table, "m@1", 1)
    assert index.find(symbol) == 0
    assert index.find(symbol + ".1") == -1
    assert index.find(symbol.split(".")[0] + "?") == -1


@pytest.mark.parametrize(
    "name", ["1-Mar", "15-Sep", "Mar-01", "SEP-02", "1-Dec", "2-Oct", "2026-03-01", "2001-09-02 00:00:00", "4-OCT"]
)
def test_dates(name: str) -> None:
    """What a spreadsheet makes of MARCH1, SEPT2, DEC1 and OCT4 is reported as suspect."""
    assert INDEX.locate((*TABLE.gene_symbol, name))[1].suspect == (name,)


@pytest.mark.parametrize(
    "name", ["MARCH1", "SEPT2", "DEC1", "OCT4", "MARCHF1", "SEPTIN2", "1-Jan", "HLA-A", "Mar", "2-Octane"]
)
def test_what_is_no_date(name: str) -> None:
    """Symbols before a spreadsheet touched them are not suspect."""
    assert INDEX.locate((*TABLE.gene_symbol, name))[1].suspect == ()


@pytest.mark.parametrize(
    ("genes", "hint"),
    [
        ([f"GRCh38_{name}" for name in TABLE.gene_symbol], "prefix"),
        ([f"GRCh37___{name}" for name in TABLE.gene_symbol], "prefix"),
        ([name.lower() for name in TABLE.gene_id], "upper case"),
        (["CD3_ADT", "CD4.ADT", "CD8-AB"], "antibodies"),
        (["CD3_TotalSeqC"] * 9 + ["G0"], "antibodies"),
        ([*TABLE.gene_symbol[:5]], "all genes that were measured"),
        (["", " ", "\t"], "Ensembl gene ids or gene symbols"),
    ],
)
def test_more_hints(genes: list[str], hint: str) -> None:
    """Versions, two spellings of prefixes, ids in lower case, markers only, and names that are none."""
    with pytest.raises(TooFewGenes) as refused:
        INDEX.locate(tuple(genes))
    assert hint in refused.value.hint


def test_reports_are_bounded() -> None:
    """However many genes there are, the report lists twenty of each kind and counts them all."""
    n_genes = 1_000
    table = gene_table(n_genes)
    index = GeneIndex(table, "m@1", 0.1)
    genes = (
        *(f"{gene_id}.1" for gene_id in table.gene_id[:500]),
        *table.gene_id[:500],
        *[f"{n}-Mar" for n in range(30)],
    )
    _, report = index.locate(genes)

    assert (report.n_renamed, report.n_duplicated, report.n_missing, report.n_unknown) == (500, 500, 500, 30)
    for listed in (report.renamed, report.duplicated, report.missing, report.suspect):
        assert len(listed) == 20
