"""The tasks on an AnnData in this process, without a server: what the command line runs, and a notebook may."""

from typing import Any

import anndata as ad
from anndata import read_h5ad

from service.cells.counts import Cells
from service.cells.formats.arrow import ArrowWriter
from service.client import column_of, fill, find_counts, read_answer
from service.errors import NotRawCounts, SpeciesMismatch, TooFewGenes
from service.inference.model import Model
from service.inference.query import prepare
from service.inference.questions import DEPENDS_ON, Question, annotated
from service.inference.task import Task, read_options

__all__ = ["ask", "find_counts", "read_h5ad", "run_task"]


def run_task(
    task: Task, model: Model, adata: ad.AnnData, options: dict[str, str], layer: str | None, gene_key: str | None
) -> ad.AnnData:
    """Answer cells in this process with the code of the service; arguments, answer and errors as of `Client.run`."""
    chosen = task.read_options(options, model)
    counts, genes, source = find_counts(adata, layer, gene_key)
    query = prepare(model, Cells(genes=tuple(genes), counts=counts, cell_ids=tuple(adata.obs_names)))
    writer = ArrowWriter()
    content = (
        writer.start(query.head(model, task, chosen))
        + writer.write(task.run(model, query.counts, chosen), None)
        + writer.end()
    )
    return fill(adata, [read_answer(content)], source)


def ask(
    question: Question,
    model: Model,
    adata: ad.AnnData,
    options: dict[str, str],
    layer: str | None = None,
    gene_key: str | None = None,
    cluster_key: str | None = None,
) -> dict[str, Any]:
    """Answer a question about all cells in this process; as POST /v1/<question> does.

    Raises:
        InvalidOption, TaskNotOffered, KeyError.
        TooFewGenes, SpeciesMismatch, NotRawCounts: where the question has no answer for that.
    """
    chosen = read_options(question.name, question.options, options)
    counts, genes, source = find_counts(adata, layer, gene_key)
    clusters = tuple(column_of(adata, cluster_key)) if cluster_key is not None else None
    cells = Cells(genes=tuple(genes), counts=counts, clusters=clusters)
    head = {
        "model": {"name": model.manifest.name, "version": model.manifest.version},
        "counts_source": source,
        "depends_on": DEPENDS_ON,
    }
    needs_labels = question.needs_labels(model, cells, chosen)
    try:
        query = prepare(model, cells)
    except (TooFewGenes, SpeciesMismatch, NotRawCounts) as error:
        if question.refused is None:
            raise
        return {**head, **question.refused(cells, error)}
    columns = annotated(model, query.counts) if needs_labels else None
    return {**head, **question.answer(model, cells, query, columns, chosen)}
