"""POST /v1/check and /v1/markers: questions about the cells of a request together. Their answers depend on all of them, and say so."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from service.api import request_id
from service.api.access import Endpoint
from service.api.answers import json_answer, run_whole
from service.api.disconnect import cancelled_on_disconnect
from service.api.drift import observe_query
from service.api.negotiation import body_format
from service.api.state import State, state
from service.api.tasks import MODEL_OPTION, offers, query_options
from service.cells.columns import Columns, Labels
from service.cells.counts import Cells
from service.cells.formats.format import Format
from service.errors import (
    CellserveError,
    InvalidOption,
    NotRawCounts,
    ShuttingDown,
    SpeciesMismatch,
    TaskNotOffered,
    TooFewGenes,
    TooManyCells,
)
from service.inference import TASKS, health, markers
from service.inference.batcher import Work
from service.inference.majority import majority_labels
from service.inference.markers import Ranking
from service.inference.model import Model
from service.inference.query import Query, prepare
from service.inference.task import Options, read_options

P = ParamSpec("P")
T = TypeVar("T")
DEPENDS_ON = "all cells of the request"
MAX_GROUPS = 500
"""Groups that are compared: each has a row of every gene in memory."""


class CheckOptions(Options):
    """Options of POST /v1/check."""

    min_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a cluster's cells that its `majority_labels` must have; less is `Heterogeneous`.",
    )


class MarkersOptions(Options):
    """Options of POST /v1/markers."""

    group_by: str = Field(
        "labels",
        pattern="^(labels|clusters)$",
        description="What cells are grouped by: their predicted `labels`, or the `clusters` sent.",
    )
    test: markers.Test = Field(
        "wilcoxon",
        description="`wilcoxon` (rank sums, corrected for ties) or `t_test` (Welch's), each group against all other cells.",
    )
    n_genes: int = Field(20, ge=1, le=1000, description="Genes per group, those with the highest score first.")


@dataclass(frozen=True)
class Question:
    """A route of this kind."""

    name: str
    summary: str
    description: str
    options: type[Options]
    answer: Callable[[State, Model, Cells, Options], Awaitable[dict[str, Any]]]
    required: tuple[str, ...]
    """Members that every answer has, besides those of all."""


def endpoint(question: Question) -> Endpoint:
    """The endpoint of a question."""

    async def answer(request: Request) -> Response:
        app = state(request)
        if app.is_draining:
            raise ShuttingDown
        form = body_format(request.headers.get("content-type"))
        model = await app.models.obtain(request.query_params.get(MODEL_OPTION), request_id.current.get())
        options = read_options(question.name, question.options, query_options(request))
        async with app.intake.body(request) as body, cancelled_on_disconnect(request):
            cells = await _in_parser(app, _read, app, form, body)
            return json_answer(model, {"depends_on": DEPENDS_ON, **await question.answer(app, model, cells, options)})

    return answer


async def check(app: State, model: Model, cells: Cells, options: Options) -> dict[str, Any]:
    """Verdict, reasons and figures; also for cells that every task would refuse, which are red."""
    assert isinstance(options, CheckOptions)
    try:
        query = await _in_parser(app, prepare, model, cells)
    except (TooFewGenes, SpeciesMismatch, NotRawCounts) as error:
        return _refused(cells, error)
    observe_query(model, query)
    profile = model.manifest.profile
    findings = health.of_genes(query.genes_report)
    findings += health.of_counts(query.counts_report, query.library_size, profile)
    about: dict[str, Any] = {}
    votes: dict[str, Any] = {}
    if offers(model, TASKS["annotate"]):
        columns = await _annotated(app, model, query)
        found, about = await _in_parser(app, health.of_labels, columns, query.library_size)
        findings += found
        about["reference_labels"] = health.reference_labels(profile, model.manifest.labels[0].name)
        if cells.clusters is not None:
            labels = _labels(columns)
            by_cluster = majority_labels(cells.clusters, labels.codes, labels.words, options.min_share)
            votes = {
                "majority_labels": {name: vote.majority_label for name, vote in by_cluster.items()},
                "clusters": {name: asdict(vote) for name, vote in by_cluster.items()},
            }
    elif cells.clusters is not None:
        raise _not_offered(model, "check with clusters")
    return {
        "verdict": health.worst(findings),
        "reasons": [finding.message for finding in findings if finding.verdict != "green"],
        "n_cells": len(cells),
        "checks": [finding.as_dict() for finding in findings],
        "mapping": about or None,
        **votes,
        "counts": health.counts_summary(query.library_size, query.counts_report, profile),
        "genes": query.genes_report.as_dict(),
        "refused": None,
    }


async def rank_markers(app: State, model: Model, cells: Cells, options: Options) -> dict[str, Any]:
    """The genes of the model that separate each group of cells from all others."""
    assert isinstance(options, MarkersOptions)
    query = await _in_parser(app, prepare, model, cells)
    observe_query(model, query)
    if options.group_by == "clusters":
        if cells.clusters is None:
            raise InvalidOption(name="group_by", problem="it is 'clusters', and the body names no cluster per cell.")
        names, group = np.unique(np.asarray(cells.clusters, dtype=object).astype(str), return_inverse=True)
    else:
        if not offers(model, TASKS["annotate"]):
            raise _not_offered(model, "markers of labels")
        labels = _labels(await _annotated(app, model, query))
        found, group = np.unique(labels.codes, return_inverse=True)
        names = np.array([labels.words[code] for code in found])
    if len(names) > MAX_GROUPS:
        raise InvalidOption(
            name="group_by", problem=f"there are {len(names):,} groups; at most {MAX_GROUPS} are compared."
        )
    codes = group.astype(np.int32).ravel()
    ranking = await _in_parser(app, markers.rank_genes, query.counts, codes, len(names), options.test)
    sizes = np.bincount(codes, minlength=len(names))
    return {
        "test": options.test,
        "group_by": options.group_by,
        "groups": {
            str(name): {"n_cells": int(sizes[i]), "genes": _top(model, ranking, i, options.n_genes)}
            for i, name in enumerate(names)
            if ranking.is_tested[i]
        },
        "too_small": {str(name): int(sizes[i]) for i, name in enumerate(names) if not ranking.is_tested[i]},
        "genes": query.genes_report.as_dict(),
        "counts": query.counts_report.as_dict(),
    }


CHECK = Question(
    name="check",
    summary="How a whole query maps: green, amber or red, and why",
    description=(
        "`verdict` and `reasons`; `checks`, everything that was looked at, with its value and limits; `mapping`, the share of cells that map "
        "well and their labels; `counts` and `genes`. Cells that tasks refuse are red, and `refused` says why. With clusters in the body "
        "`majority_labels` names the label that most cells of each cluster have."
    ),
    options=CheckOptions,
    answer=check,
    required=("depends_on", "verdict", "reasons", "checks"),
)
MARKERS = Question(
    name="markers",
    summary="Which genes separate groups of cells in the query itself",
    description=(
        "Per group the genes of the model with the highest score: `score`, `p_value`, `q_value` (Benjamini and Hochberg's, over the genes), "
        "`log2_fold_change`, and the shares of cells with a count. Groups of less than three cells are in `too_small`."
    ),
    options=MarkersOptions,
    answer=rank_markers,
    required=("depends_on", "groups", "too_small"),
)
QUESTIONS = (CHECK, MARKERS)


def _read(app: State, form: Format, body: bytes) -> Cells:
    cells = form.read(body, app.max_decoded_bytes)
    if len(cells) > app.max_cells:
        raise TooManyCells(n_cells=len(cells), limit_cells=app.max_cells)
    return cells


async def _in_parser(app: State, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run a function in a parser thread."""
    return await asyncio.get_running_loop().run_in_executor(app.parsers, lambda: function(*arguments, **named))


async def _annotated(app: State, model: Model, query: Query) -> Columns:
    """What `annotate` answers by default, without the probabilities of all classes."""
    task = TASKS["annotate"]
    work = Work(model=model, task=task, options=task.read_options({}, model))
    return await run_whole(app, work, query.counts, health.without_probabilities)


def _labels(columns: Columns) -> Labels:
    labels = columns["predicted_labels"]
    assert isinstance(labels, Labels)
    return labels


def _refused(cells: Cells, error: CellserveError) -> dict[str, Any]:
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


def _not_offered(model: Model, what: str) -> TaskNotOffered:
    offered = ", ".join(task.name for task in TASKS.values() if offers(model, task))
    return TaskNotOffered(model=model.id, task=what, offered=offered)


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
