"""How a whole query maps: one verdict for the cells of a request together, with the reason of each doubt.

It depends on all cells of the request, and so it is never part of what a single cell is answered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.cells.columns import Columns, Labels, Values, Vectors
from service.cells.counts import CountsReport
from service.cells.genes import AlignmentReport
from service.contract.manifest import Profile

Verdict = Literal["green", "amber", "red"]
VERDICTS: tuple[Verdict, ...] = ("green", "amber", "red")
MIN_CONFIDENCE = 0.5
"""Without a mapping score a cell counts as mapped well where its label has at least this probability."""

DOUBLET_SECOND, DOUBLET_RATIO = 0.2, 1.5
"""Doublet-like: the second label has at least this probability, and the cell this many times the median counts of its label's cells."""

MIN_CELLS = 30
"""Below it a share says little, and Azimuth's mapping fails."""


@dataclass(frozen=True)
class Limits:
    """Where a number turns amber and red."""

    amber: float
    red: float
    is_low_bad: bool = False

    def verdict(self, value: float) -> Verdict:
        """The colour of a value; the limits themselves are still the better colour."""
        sign = -1 if self.is_low_bad else 1
        return "red" if sign * value > sign * self.red else "amber" if sign * value > sign * self.amber else "green"


# Azimuth warns and fails by two limits for each figure; its own are for shares of anchors (warn below 15 %, fail below 5 %), which are fewer
# than cells that map. These are for shares of cells.
LIMITS: dict[str, Limits] = {
    "mapped": Limits(0.8, 0.5, is_low_bad=True),
    "empty": Limits(0.01, 0.2),
    "missing_genes": Limits(0.1, 0.3),
    "low_counts": Limits(0.2, 0.5),
    "library_size": Limits(4.0, 20.0),
    "doublet_like": Limits(0.1, 0.3),
    "ambiguous_genes": Limits(0.01, 0.1),
    "damaged_names": Limits(0.0, 0.01),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    verdict: Verdict
    value: float
    message: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the limits."""
        limits = LIMITS.get(self.check)
        bounds = {"amber": limits.amber, "red": limits.red} if limits else {}
        return {"check": self.check, "verdict": self.verdict, "value": self.value, **bounds, "message": self.message}


def worst(findings: list[Finding]) -> Verdict:
    """The verdict on all."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default="green")


def of_genes(report: AlignmentReport) -> list[Finding]:
    """What the names of the genes give cause to say."""
    moved = ""
    if report.missing_effect is not None:
        moved = f", for which cells of the reference moved by {report.missing_effect.displacement_median:.2f} distances between neighbours"
    weight, names = report.missing_weight, max(1, report.n_query_genes)
    return [
        _judged(
            "missing_genes",
            weight,
            f"{report.n_missing:,} of {report.n_model_genes:,} genes are missing; they hold {weight:.1%} of the encoder's weight{moved}.",
        ),
        _judged(
            "ambiguous_genes",
            report.n_ambiguous / report.n_model_genes,
            f"{report.n_ambiguous:,} names may mean a gene of the model that is missing, and were not taken for it.",
        ),
        _judged(
            "damaged_names",
            len(report.suspect) / names,
            f"{len(report.suspect)} names look like dates that a spreadsheet made of gene symbols.",
        ),
    ]


def of_counts(report: CountsReport, library_size: NDArray[np.float32], profile: Profile | None) -> list[Finding]:
    """What the counts give cause to say; compared with the reference where its figures travel with the model."""
    findings = [_judged("empty", report.n_empty / report.n_cells, f"{report.n_empty:,} cells have no count.")]
    if report.n_cells < MIN_CELLS:
        findings.append(
            Finding("few_cells", "amber", report.n_cells, f"{report.n_cells} cells are few to judge a query by.")
        )
    findings += [Finding("suspicious_values", "amber", 1.0, warning) for warning in report.warnings]
    filled = library_size[library_size > 0]
    if profile is None or not len(filled):
        return findings
    usual, low = profile.library_size.quantiles["0.5"], profile.library_size.quantiles["0.05"]
    median = float(np.median(filled))
    n_low = int((filled < low / 2).sum())
    findings.append(
        _judged(
            "library_size",
            max(median / usual, usual / median) if usual > 0 else 1.0,
            f"The median cell has {median:,.0f} counts in the model's genes, the reference's {usual:,.0f}.",
        )
    )
    findings.append(
        _judged(
            "low_counts",
            n_low / len(filled),
            f"{n_low:,} cells have less than half the counts of nineteen in twenty cells of the reference.",
        )
    )
    return findings


def of_labels(columns: Columns, library_size: NDArray[np.float32]) -> tuple[list[Finding], dict[str, Any]]:
    """What `annotate` gives cause to say, and the figures behind it: how cells map, their labels, and doublets."""
    labels, confidence = columns["predicted_labels"], columns["conf_score"]
    assert isinstance(labels, Labels)
    assert isinstance(confidence, Values)
    is_filled = library_size > 0
    is_mapped, by = well_mapped(columns, is_filled)
    n_filled = max(1, int(is_filled.sum()))
    share = float(is_mapped.sum() / n_filled)
    is_doublet = doublet_like(columns, labels.codes, library_size)
    doublets = float(is_doublet.sum() / n_filled)
    numbers = np.bincount(labels.codes, minlength=len(labels.words))
    findings = [
        _judged("mapped", share, f"{share:.1%} of the cells map well, by {by}."),
        _judged(
            "doublet_like",
            doublets,
            f"{doublets:.1%} of the cells look like two: a second likely label, and many counts.",
        ),
    ]
    about = {
        "share_mapped_well": share,
        "mapped_by": by,
        "conf_score": _quantiles(confidence.values[is_filled]),
        "mapping_score": _quantiles(found.values[is_filled])
        if isinstance(found := columns.get("mapping_score"), Values)
        else None,
        "share_doublet_like": doublets,
        "labels": {word: int(n) / len(labels.codes) for word, n in zip(labels.words, numbers, strict=True) if n},
    }
    return findings, about


def well_mapped(columns: Columns, is_filled: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], str]:
    """Whether each cell maps well, and by what that was told: the model's own threshold, or the confidence in the label."""
    labels, confidence = columns["predicted_labels"], columns["conf_score"]
    assert isinstance(labels, Labels)
    assert isinstance(confidence, Values)
    if "mapping_score" in columns:
        return is_filled & (labels.codes < len(labels.words) - 1), "mapping_score above the model's threshold"
    return is_filled & (confidence.values >= MIN_CONFIDENCE), f"conf_score of at least {MIN_CONFIDENCE}"


def doublet_like(columns: Columns, codes: NDArray[np.int32], library_size: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Cells with a second likely label and more counts than cells of their label have: what two cells in one droplet look like.

    A heuristic: doublets of one type are not seen, and a cell between two types that is large is.
    """
    second = columns["second_score"]
    assert isinstance(second, Values)
    usual = np.zeros(int(codes.max(initial=0)) + 1)
    for code in np.unique(codes):
        usual[code] = np.median(library_size[codes == code])
    return np.asarray((second.values >= DOUBLET_SECOND) & (library_size > DOUBLET_RATIO * usual[codes]))


def without_probabilities(columns: Columns) -> Columns:
    """The columns that the verdict needs, with the second highest probability in place of all of them: a chunk's answer, made small."""
    probabilities = columns["probabilities"]
    assert isinstance(probabilities, Vectors)
    n_classes = probabilities.values.shape[1]
    second = np.zeros(len(probabilities.values), dtype=np.float32)
    if n_classes > 1:
        second = np.partition(probabilities.values, n_classes - 2, axis=1)[:, n_classes - 2]
    kept = {name: columns[name] for name in ("predicted_labels", "conf_score", "mapping_score") if name in columns}
    return {**kept, "second_score": Values(second)}


def counts_summary(library_size: NDArray[np.float32], report: CountsReport, profile: Profile | None) -> dict[str, Any]:
    """Counts per cell in the model's genes, beside the reference's."""
    return {
        **report.as_dict(),
        "library_size": _quantiles(library_size),
        "reference_library_size": dict(profile.library_size.quantiles) if profile is not None else None,
    }


def reference_labels(profile: Profile | None, level: str) -> Mapping[str, float] | None:
    """Share of each label in the reference."""
    known = profile.labels.get(level) if profile is not None else None
    return known.shares if known is not None else None


def _judged(check: str, value: float, message: str) -> Finding:
    return Finding(check, LIMITS[check].verdict(value), float(value), message)


def _quantiles(values: NDArray[np.generic]) -> dict[str, float] | None:
    """By name, as the manifest's profile names them; None without values."""
    if not len(values):
        return None
    return {str(q): float(np.quantile(values.astype(np.float64), q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
