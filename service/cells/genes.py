"""Gene alignment: from the genes that were sent to the genes of the model, and a report of what became of each."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse import _sparsetools

from service.cells.counts import csr, row_sums
from service.cells.species import SpeciesGuess, guess_species
from service.contract.ambiguous_names import Ambiguous
from service.contract.gene_table import GeneTable
from service.contract.manifest import MissingGenes
from service.errors import SpeciesMismatch, TooFewGenes

# Only stable ids carry a version. Symbols keep their dots: RP11-885N19.6 is a whole name.
_VERSIONED = re.compile(r"(ENS[A-Z]*[GTP]\d{11})\.\d+")
_ENSEMBL = re.compile(r"ENS[A-Z]*[GTP]\d{11}(\.\d+)?")
_ANTIBODY = re.compile(r"(_TotalSeq[ABC]?|_TotalC|\.ADT|_ADT|-AB)$", re.IGNORECASE)
_PREFIXED = re.compile(r"(hg19|hg38|GRCh37|GRCh38|mm10|GRCm38|GRCm39)_+", re.IGNORECASE)
_DATE = re.compile(r"(\d{1,2}-(Mar|Sep|Dec|Oct)|(Mar|Sep|Dec|Oct)-\d{1,2}|\d{4}-\d\d-\d\d.*)", re.IGNORECASE)
N_EXAMPLES = 5
N_REMEMBERED = 16
N_LISTED = 20


@dataclass(frozen=True)
class AlignmentReport:
    """What became of the genes that were sent. Travels in every answer."""

    n_model_genes: int
    n_query_genes: int
    n_matched: int
    """Genes of the model that the query has."""

    gene_overlap: float
    """n_matched / n_model_genes."""

    n_missing: int
    """Genes of the model that the query lacks; they are taken as zero."""

    missing: tuple[str, ...]
    """The missing genes that weigh most in the encoder, at most 20."""

    missing_weight: float
    """Share of the encoder's first layer that the missing genes hold, 0 to 1."""

    n_unknown: int
    """Genes that were sent and that the model does not use."""

    renamed: dict[str, str]
    """Sent name → gene of the model, where it matched by alias or without its version; at most 20."""

    n_renamed: int
    duplicated: dict[str, int]
    """Gene of the model → number of columns that were summed into it; at most 20."""

    n_duplicated: int
    suspect: tuple[str, ...]
    """Names that a spreadsheet has probably changed into dates (1-Mar); at most 20. They match nothing and are not guessed."""

    id_type: str
    """What was sent: ensembl, symbol or mixed."""

    species: str | None
    """Of which the names speak; None where they do not tell."""

    ambiguous: dict[str, tuple[str, ...]]
    """Name that was sent and not taken → genes of the model, missing otherwise, that it may mean; at most 20."""

    n_ambiguous: int
    missing_effect: "MissingEffect | None"
    """What the missing genes may do to the embedding; None where the artifact does not say."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Many requests have the same genes, hence the same report: the dictionary is theirs together."""
        return self._plain

    @cached_property
    def _plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MissingEffect:
    """How far held-out cells of the reference moved when genes of the same weight were taken away from them."""

    displacement_median: float
    """In distances between neighbours: 1 is as far as from a cell to its 15 nearest."""

    displacement_90: float
    """Nine cells in ten moved less."""

    label_changes: float | None
    """Share of cells whose label became another; None for a model without labels."""


@dataclass(frozen=True)
class GeneIndex:
    """Finds the genes of one model by any of their names."""

    table: GeneTable
    model: str
    """name@version, for messages."""

    min_gene_overlap: float
    species: str = "homo_sapiens"
    ambiguous_names: Mapping[str, Ambiguous] = field(default_factory=dict)
    missing_genes: MissingGenes | None = None

    @cached_property
    def _by_name(self) -> dict[str, int]:
        # From the weakest claim on a name to the strongest, so that a stronger one overwrites it.
        index = {alias: i for i, aliases in enumerate(self.table.aliases) for alias in aliases}
        index.update({symbol: i for i, symbol in enumerate(self.table.gene_symbol) if symbol})
        index.update({gene_id: i for i, gene_id in enumerate(self.table.gene_id)})
        return index

    @cached_property
    def _own_names(self) -> frozenset[str]:
        return frozenset(self.table.gene_id) | frozenset(self.table.gene_symbol)

    def find(self, name: str) -> int:
        """Position of a gene in the model, or -1."""
        found = self._by_name.get(name, -1)
        if found < 0 and (versioned := _VERSIONED.fullmatch(name)):
            found = self._by_name.get(versioned[1], -1)
        return found

    def display(self, position: int) -> str:
        """The symbol of a gene of the model, or its id where it has none."""
        return self.table.gene_symbol[position] or self.table.gene_id[position]

    @cached_property
    def displays(self) -> tuple[str, ...]:
        """`display` of every gene of the model, in order."""
        return tuple(map(self.display, range(len(self.table))))

    @cached_property
    def locate(self) -> Callable[[tuple[str, ...]], tuple[NDArray[np.int32], AlignmentReport]]:
        """`_locate`, remembering the last gene lists: a client sends the same one with every request.

        The formats remember them, too, so that most often it is the very same object, and need not be hashed name by name.
        """
        remembered = lru_cache(maxsize=N_REMEMBERED)(self._locate)
        last: dict[int, tuple[tuple[str, ...], tuple[NDArray[np.int32], AlignmentReport]]] = {}

        def locate(genes: tuple[str, ...]) -> tuple[NDArray[np.int32], AlignmentReport]:
            known = last.get(id(genes))
            if known is not None and known[0] is genes:
                return known[1]
            found = remembered(genes)
            if len(last) >= N_REMEMBERED:
                last.clear()
            last[id(genes)] = genes, found
            return found

        return locate

    def _locate(self, genes: tuple[str, ...]) -> tuple[NDArray[np.int32], AlignmentReport]:
        """Position in the model of each gene that was sent, -1 for genes that the model does not use.

        Raises:
            SpeciesMismatch, TooFewGenes: as `refusal` says.
        """
        positions = self.positions(genes)
        species = guess_species(genes)
        report = self.report(genes, positions, species)
        if refused := self.refusal(genes, positions, report, species):
            raise refused
        return positions, report

    def positions(self, genes: tuple[str, ...]) -> NDArray[np.int32]:
        """Position in the model of each gene that was sent, -1 for genes that the model does not use; read-only."""
        positions = np.fromiter((self.find(gene) for gene in genes), dtype=np.int32, count=len(genes))
        positions.setflags(write=False)  # shared by all requests with these genes
        return positions

    def report(
        self, genes: tuple[str, ...], positions: NDArray[np.int32], species: SpeciesGuess, n_listed: int = N_LISTED
    ) -> AlignmentReport:
        """What becomes of genes that were sent, with at most `n_listed` of each kind by name."""
        columns = np.bincount(positions[positions >= 0], minlength=len(self.table))
        missing = np.flatnonzero(columns == 0)
        heaviest = missing[np.argsort(-self.table.encoder_weight[missing], kind="stable")][:n_listed]
        renamed = {
            gene: self.display(int(at))
            for gene, at in zip(genes, positions, strict=True)
            if at >= 0 and gene not in self._own_names
        }
        duplicated = np.flatnonzero(columns > 1)
        ambiguous = self._ambiguous(genes, positions, columns)
        n_matched = len(self.table) - len(missing)
        missing_weight = min(1.0, float(self.table.encoder_weight[missing].sum())) if len(missing) else 0.0
        n_ids = sum(bool(_ENSEMBL.fullmatch(gene)) for gene in genes)
        return AlignmentReport(
            n_model_genes=len(self.table),
            n_query_genes=len(genes),
            n_matched=n_matched,
            gene_overlap=n_matched / len(self.table),
            n_missing=len(missing),
            missing=tuple(self.display(int(at)) for at in heaviest),
            missing_weight=missing_weight,
            n_unknown=int((positions < 0).sum()),
            renamed=dict(list(renamed.items())[:n_listed]),
            n_renamed=len(renamed),
            duplicated={self.display(int(at)): int(columns[at]) for at in duplicated[:n_listed]},
            n_duplicated=len(duplicated),
            suspect=tuple(gene for gene in genes if _DATE.fullmatch(gene))[:n_listed],
            id_type="ensembl" if n_ids > 0.9 * len(genes) else "symbol" if n_ids < 0.1 * len(genes) else "mixed",
            species=species.guess,
            ambiguous=dict(list(ambiguous.items())[:n_listed]),
            n_ambiguous=len(ambiguous),
            missing_effect=self.missing_effect(missing_weight),
        )

    def _ambiguous(
        self, genes: tuple[str, ...], positions: NDArray[np.int32], columns: NDArray[np.int64]
    ) -> dict[str, tuple[str, ...]]:
        """Names that were not taken → genes that they may mean, of those that nothing else was taken for."""
        found = {}
        for gene, at in zip(genes, positions, strict=True):
            if at < 0 and (why := self.ambiguous_names.get(gene)) is not None:
                meant = tuple(self.display(i) for name in why.gene_ids if not columns[i := self.find(name)])
                if meant:
                    found[gene] = meant
        return found

    def missing_effect(self, missing_weight: float) -> MissingEffect | None:
        """What genes of that share of the encoder's first layer do by missing."""
        measured = self.missing_genes
        if measured is None:
            return None

        def at(column: tuple[float, ...]) -> float:
            return float(np.interp(missing_weight, measured.weight, column))

        return MissingEffect(
            displacement_median=at(measured.displacement_median),
            displacement_90=at(measured.displacement_90),
            label_changes=at(measured.label_changes) if measured.label_changes is not None else None,
        )

    def refusal(
        self, genes: tuple[str, ...], positions: NDArray[np.int32], report: AlignmentReport, species: SpeciesGuess
    ) -> SpeciesMismatch | TooFewGenes | None:
        """Why a query with these genes is not answered: they are of another species, or too few; None where it is."""
        if species.contradicts(self.species):
            return SpeciesMismatch(
                model=self.model,
                species=self.species,
                guess=str(species.guess),
                evidence="; ".join(_shown(line, 300) for line in species.evidence),
            )
        if report.gene_overlap >= self.min_gene_overlap:
            return None
        unmatched = [gene for gene, at in zip(genes, positions, strict=True) if at < 0]
        return TooFewGenes(
            model=self.model,
            n_model_genes=report.n_model_genes,
            n_query_genes=report.n_query_genes,
            n_matched=report.n_matched,
            gene_overlap=report.gene_overlap,
            min_gene_overlap=self.min_gene_overlap,
            query_examples=", ".join(_shown(gene) for gene in (unmatched or genes)[:N_EXAMPLES]) or "none",
            model_examples=", ".join(
                f"{self.table.gene_id[i]} ({self.display(i)})" for i in range(min(3, len(self.table)))
            ),
            hint=self._hint(unmatched),
        )

    def _hint(self, unmatched: list[str]) -> str:
        """The likely reason why the names in `unmatched` are not known."""
        sample = unmatched[:1000]

        def share(is_so: Callable[[str], object]) -> float:
            return sum(bool(is_so(name)) for name in sample) / max(1, len(sample))

        if share(str.isdigit) > 0.5:
            return "The names are numbers: an index was sent in place of gene names. Send var_names."
        if share(_PREFIXED.match) > 0.5:
            return "The names carry a genome prefix. Remove it (hg19_CD3D is CD3D)."
        if share(lambda name: self.find(name.upper()) >= 0) > 0.1:
            return "In upper case many of them would match: send the symbols as HGNC writes them."
        if share(_ANTIBODY.search) > 0.5:
            return "These look like antibodies. Send gene expression."
        return "Send Ensembl gene ids or gene symbols of the model's species, and all genes that were measured, not only marker genes."


def align(counts: sp.csr_matrix, positions: NDArray[np.int32], n_genes: int, is_plain: bool = False) -> sp.csr_matrix:
    """Reorder counts to the model's genes; genes that the query lacks become zero, columns of one gene are summed.

    Args:
        counts: raw counts, shape (n_cells, n_query_genes).
        positions: for each query gene its position in the model or -1, from `GeneIndex.locate`.
        n_genes: number of genes of the model.
        is_plain: no two genes that were sent are one gene of the model, and no cell has 2**24 counts or more, so that sums of its counts
            are exact in float32 in any order.

    Returns:
        Counts float32 of shape (n_cells, n_genes), in which a cell has no more than one entry of a gene that is not zero. The order in
        which genes were sent leaves no trace in sums over them: where nothing has to be added up, indices stand as they were sent, and what
        the model does not use is a zero of its first gene, so that nothing is sorted and nothing moved. Else columns are added up in
        float64 and indices are sorted.
    """
    if is_plain and _is_ascending(counts):
        data = counts.data.astype(np.float32)
        if len(positions) == n_genes and (positions == np.arange(n_genes, dtype=np.int32)).all():
            return csr(data, counts.indices, counts.indptr, n_genes, row_sums(counts))
        if len(positions) and positions.min() < 0:
            data *= (positions >= 0).astype(np.float32)[counts.indices]
        return csr(data, np.maximum(positions, 0)[counts.indices], counts.indptr, n_genes)
    moved = positions[counts.indices]
    kept = moved >= 0
    ends = np.concatenate(([0], np.cumsum(kept)))[counts.indptr]
    data = counts.data[kept].astype(np.float64)
    aligned = sp.csr_matrix((data, moved[kept], ends), shape=(counts.shape[0], n_genes))
    aligned.sum_duplicates()
    return aligned.astype(np.float32)


def _is_ascending(counts: sp.csr_matrix) -> bool:
    """Whether each cell names its genes in rising order, as nearly all clients do: then none is named twice."""
    if len(counts.indices) < 2:
        return True
    rises = counts.indices[1:] > counts.indices[:-1]
    if counts.shape[0] > 1:
        starts = counts.indptr[1:-1]
        rises[starts[(starts > 0) & (starts < len(counts.indices))] - 1] = True
    return bool(np.logical_and.reduce(rises))


def library_size(counts: sp.csr_matrix) -> NDArray[np.float32]:
    """Counts of each cell, (n_cells,)."""
    return row_sums(counts).astype(np.float32)


def densify(counts: sp.csr_matrix, rows: slice, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill `out`, shape (at least as many rows, n_genes), with some rows of `counts` and zeros below; what occurs twice is summed."""
    first, last = counts.indptr[rows.start], counts.indptr[rows.stop]
    return scatter(counts.data[first:last], counts, rows, out)


def scatter(
    entries: NDArray[np.float32], counts: sp.csr_matrix, rows: slice, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """As `densify`, with other `entries` in the places of the counts of these rows."""
    out.fill(0.0)
    # What `toarray` calls, on a view of the rows: slicing first would copy them.
    indptr = counts.indptr[rows.start : rows.stop + 1]
    indices = counts.indices[indptr[0] : indptr[-1]]
    _sparsetools.csr_todense(len(indptr) - 1, counts.shape[1], indptr - indptr[0], indices, entries, out)
    return out


def _shown(name: str, n_characters: int = 40) -> str:
    """A name as it may stand in a message: short, and without control characters."""
    clean = "".join(character if character.isprintable() else "?" for character in name[:n_characters])
    return clean + "…" if len(name) > n_characters else clean
