"""Questions about the cells of a request together. Their answers depend on all of them, and say so; no task's answer ever does."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from service.cells.columns import Columns, Labels
from service.cells.counts import Cells
from service.errors import InvalidCells, InvalidOption, NotRawCounts, SpeciesMismatch, TaskNotOffered, TooFewGenes
from service.inference import annotate, health, markers
from service.inference.majority import majority_labels
from service.inference.markers import Ranking
from service.inference.model import Model
from service.inference.query import Query
from service.inference.task import Options

DEPENDS_ON = "all cells of the request"
MAX_TABLE = 2_000_000
"""Groups times genes that are compared: a dozen tables of that size are held, 16 MB each."""

MAX_VALUES = 20_000_000
"""Counts that are compared: 20,000 cells with 1,000 genes each."""

Refusal = TooFewGenes | SpeciesMismatch | NotRawCounts


class CheckOptions(Options):
    """Options of `check`."""

    min_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a cluster's cells that its `majority_labels` must have; less is `Heterogeneous`.",
    )


class MarkersOptions(Options):
    """Options of `markers`."""

    group_by: Literal["labels", "clusters"] = Field(
        "labels", description="What cells are grouped by: their predicted `labels`, or the `clusters` that were sent."
    )
    test: markers.Test = Field(
        "wilcoxon",
        description="`wilcoxon` (rank sums, corrected for ties) or `t_test` (Welch's), each group against all other cells.",
    )
    n_genes: int = Field(20, ge=1, le=1000, description="Genes per group, those with the highest score first.")


@dataclass(frozen=True)
class Question:
    """A plain function of a model and all cells of a request."""

    name: str
    """Route and command are this word."""

    summary: str
    description: str
    """The members of the answer, in Markdown."""

    options: type[Options]
    required: tuple[str, ...]
    """Members that every answer has."""

    needs_labels: Callable[[Model, Cells, Options], bool]
    """Whether it has to be known what `annotate` answers. Raises TaskNotOffered, InvalidOption."""

    answer: Callable[[Model, Cells, Query, Columns | None, Options], dict[str, Any]]
    """(model, cells, the same made ready, what `kept` leaves of `annotate`'s answer where it is needed, options) → members."""

    refused: Callable[[Cells, Refusal], dict[str, Any]] | None = None
    """The answer for cells that every task would refuse; None where it refuses them, too."""


kept = health.without_probabilities
"""What questions need of the answer of `annotate`."""


def annotated(model: Model, counts: sp.csr_matrix) -> Columns:
    """What `annotate` answers by default, as far as questions need it."""
    return kept(annotate.TASK.run(model, counts, annotate.TASK.read_options({}, model)))


def offers_labels(model: Model) -> bool:
    """Whether a model can annotate."""
    return set(annotate.TASK.graphs) <= set(model.sessions)


def _check_needs_labels(model: Model, cells: Cells, options: Options) -> bool:  # noqa: ARG001 - a question's signature
    if cells.clusters is not None and not offers_labels(model):
        raise TaskNotOffered(model=model.id, task="majority labels of clusters", offered="check without clusters")
    return offers_labels(model)


def _check(model: Model, cells: Cells, query: Query, columns: Columns | None, options: Options) -> dict[str, Any]:
    """Verdict, reasons and figures."""
    assert isinstance(options, CheckOptions)
    profile = model.manifest.profile
    findings = health.of_genes(query.genes_report)
    findings += health.of_counts(query.counts_report, query.library_size, profile)
    about: dict[str, Any] | None = None
    votes: dict[str, Any] = {}
    if columns is not None:
        found, about = health.of_labels(columns, query.library_size)
        findings += found
        about["reference_labels"] = health.reference_labels(profile, model.manifest.labels[0].name)
        if cells.clusters is not None:
            labels = _labels(columns)
            by_cluster = majority_labels(cells.clusters, labels.codes, labels.words, options.min_share)
            votes = {
                "majority_labels": {name: vote.majority_label for name, vote in by_cluster.items()},
                "clusters": {name: asdict(vote) for name, vote in by_cluster.items()},
            }
    return {
        "verdict": health.worst(findings),
        "reasons": [finding.message for finding in findings if finding.verdict != "green"],
        "n_cells": len(cells),
        "checks": [finding.as_dict() for finding in findings],
        "mapping": about,
        **votes,
        "counts": health.counts_summary(query.library_size, query.counts_report, profile),
        "genes": query.genes_report.as_dict(),
        "refused": None,
    }


def _check_refused(cells: Cells, error: Refusal) -> dict[str, Any]:
    return {
        "verdict": "red",
        "reasons": [error.detail],
        "n_cells": len(cells),
        "checks": [],
        "mapping": None,
        "counts": None,
        "genes": None,
        "refused": {"code": error.code, "detail": error.detail},
    }


def _markers_need_labels(model: Model, cells: Cells, options: Options) -> bool:
    assert isinstance(options, MarkersOptions)
    if options.group_by == "clusters":
        if cells.clusters is None:
            raise InvalidOption(name="group_by", problem="it is 'clusters', and the body names no cluster per cell.")
        return False
    if not offers_labels(model):
        raise TaskNotOffered(model=model.id, task="markers of labels", offered="markers with group_by=clusters")
    return True


def _markers(model: Model, cells: Cells, query: Query, columns: Columns | None, options: Options) -> dict[str, Any]:
    """The genes of the model that separate each group of cells from all others."""
    assert isinstance(options, MarkersOptions)
    if columns is not None:
        labels = _labels(columns)
        found, group = np.unique(labels.codes, return_inverse=True)
        names = [labels.words[code] for code in found]
    else:
        found, group = np.unique(np.asarray(cells.clusters, dtype=object).astype(str), return_inverse=True)
        names = [str(name) for name in found]
    n_groups = MAX_TABLE // query.counts.shape[1]
    if len(names) > n_groups:
        raise InvalidOption(
            name="group_by",
            problem=f"there are {len(names):,} groups; with {query.counts.shape[1]:,} genes at most {n_groups:,} are compared.",
        )
    if query.counts.nnz > MAX_VALUES:
        raise InvalidCells(
            problem=f"The cells hold {query.counts.nnz:,} counts; at most {MAX_VALUES:,} are compared at a time. Send a part of the "
            "cells, drawn at random: the Python client does, with max_cells."
        )
    codes = group.astype(np.int32).ravel()
    ranking = markers.rank_genes(query.counts, codes, len(names), options.test)
    sizes = np.bincount(codes, minlength=len(names))
    return {
        "test": options.test,
        "group_by": options.group_by,
        "groups": {
            name: {"n_cells": int(sizes[i]), "genes": _top(model, ranking, i, options.n_genes)}
            for i, name in enumerate(names)
            if ranking.is_tested[i]
        },
        "too_small": {name: int(sizes[i]) for i, name in enumerate(names) if not ranking.is_tested[i]},
        "genes": query.genes_report.as_dict(),
        "counts": query.counts_report.as_dict(),
    }


def _labels(columns: Columns) -> Labels:
    labels = columns["predicted_labels"]
    assert isinstance(labels, Labels)
    return labels


def _top(model: Model, ranking: Ranking, group: int, n_genes: int) -> list[dict[str, Any]]:
    table = model.genes.table
    score: NDArray[np.float64] = ranking.score[group]
    return [
        {
            "gene_id": table.gene_id[i],
            "gene_symbol": table.gene_symbol[i],
            "score": float(score[i]),
            "p_value": float(ranking.p_value[group, i]),
            "q_value": float(ranking.q_value[group, i]),
            "log2_fold_change": float(ranking.log2_fold_change[group, i]),
            "share_in": float(ranking.share_in[group, i]),
            "share_rest": float(ranking.share_rest[group, i]),
        }
        for i in np.argsort(-score, kind="stable")[:n_genes]
    ]


QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        Question(
            name="check",
            summary="How a whole query maps: green, amber or red, and why",
            description=(
                "`verdict` and `reasons`; `checks`, everything that was looked at, with its value and limits; `mapping`, the share of cells "
                "that map well and their labels; `counts` and `genes`. Cells that tasks refuse are red, and `refused` says why. With clusters "
                "in the body `majority_labels` names the label that most cells of each cluster have."
            ),
            options=CheckOptions,
            required=("verdict", "reasons", "checks"),
            needs_labels=_check_needs_labels,
            answer=_check,
            refused=_check_refused,
        ),
        Question(
            name="markers",
            summary="Which genes separate groups of cells in the query itself",
            description=(
                "Per group the genes of the model with the highest score: `score`, `p_value`, `q_value` (Benjamini and Hochberg's, over the "
                "genes), `log2_fold_change`, and the shares of cells with a count. Groups of less than three cells are in `too_small`."
            ),
            options=MarkersOptions,
            required=("groups", "too_small"),
            needs_labels=_markers_need_labels,
            answer=_markers,
        ),
    )
}
"""By name. To add one: write its functions and name it here."""
