"""The tasks on an AnnData in this process, without a server: what the command line runs, and a notebook may."""

import anndata as ad
from anndata import read_h5ad

from service.cells.counts import Cells
from service.cells.formats.arrow import ArrowWriter
from service.client import fill, find_counts, read_answer
from service.inference.model import Model
from service.inference.query import prepare
from service.inference.task import Task

__all__ = ["read_h5ad", "run_task"]


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
