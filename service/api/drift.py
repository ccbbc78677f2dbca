"""What is being sent and what it is taken for, as metrics: a drift shows on the dashboard before a user complains."""

import numpy as np

from service import metrics
from service.cells.columns import Columns, Labels, Values, Vectors
from service.inference.model import Model
from service.inference.profile import entropy
from service.inference.query import Query


def observe_query(model: Model, query: Query) -> None:
    """Genes that a request lacks, and the library sizes of its cells."""
    names = model.manifest.name, model.manifest.version
    metrics.series(metrics.MISSING_GENES, *names).observe(1.0 - query.genes_report.gene_overlap)
    metrics.series(metrics.MISSING_WEIGHT, *names).observe(query.genes_report.missing_weight)
    metrics.LIBRARY_SIZE.observe(names, query.library_size)


def observe_answers(model: Model, columns: Columns) -> None:
    """Labels that cells were given, and how sure that is; other columns say nothing of it."""
    names = model.manifest.name, model.manifest.version
    for name, column in columns.items():
        if isinstance(column, Labels) and name.startswith(("predicted_labels", "voted_labels")):
            numbers = np.bincount(column.codes, minlength=len(column.words))
            for word, number in zip(column.words, numbers, strict=True):
                metrics.LABELS.labels(*names, name, word).inc(int(number))
        elif isinstance(column, Values) and name.startswith("conf_score"):
            metrics.CONFIDENCE.observe((*names, name), column.values.astype(np.float32, copy=False))
        elif isinstance(column, Vectors) and name.startswith("probabilities"):
            metrics.ENTROPY.observe((*names, name), entropy(column.values))
