"""An evaluation as tables for the terminal; figures are rounded here and nowhere else."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

TITLES = {
    "logistic_regression": "LR, C=1",
    "logistic_regression_tuned": "LR, C tuned",
    "logistic_regression_balanced": "LR, C tuned, balanced",
}


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """One table after the other; those without rows are left out."""
    models = document["models"]
    if document["annotation"]:
        yield annotation_table(document["annotation"])
    yield loss_table(models)
    measured = {name: model for name, model in models.items() if "held_out_molecules" in model}
    for table in (molecule_table(measured), reconstruction_table(measured), cluster_table(measured)):
        if table.row_count:
            yield table
    yield integration_table(measured)


def annotation_table(rows: list[dict[str, Any]]) -> Table:
    """Accuracy / macro-F1 per query and method."""
    methods = [name for name in rows[0] if name not in ("query", "n_cells")]
    table = Table("query", "cells", *(TITLES.get(name, name) for name in methods), title="accuracy / macro-F1")
    for row in rows:
        figures = [f"{row[method]['accuracy']:.3f} / {row[method]['macro_f1']:.3f}" for method in methods]
        table.add_row(row["query"], f"{row['n_cells']:,}", *figures)
    return table


def loss_table(models: dict[str, Any]) -> Table:
    """Parts of the loss per model and part of the split."""
    names = list(dict.fromkeys(name for model in models.values() for part in model["loss"].values() for name in part))
    table = Table("model", "epoch", "cells", *names, title="loss, mean per cell")
    for model, found in models.items():
        for part, losses in found["loss"].items():
            table.add_row(model, str(found["epoch"]), part, *(number(losses.get(name), 4) for name in names))
    return table


def molecule_table(models: dict[str, Any]) -> Table:
    """Held-out molecules per model."""
    table = Table(
        "model",
        "cells",
        "molecules",
        "log-likelihood",
        "of gene means",
        "gain",
        title="held-out molecules, nats per molecule",
    )
    for name, model in models.items():
        if (found := model["held_out_molecules"]) is not None:
            figures = [number(found[key], 5) for key in ("model", "trivial", "gain")]
            table.add_row(name, f"{found['n_cells']:,}", f"{found['n_molecules']:,}", *figures)
    return table


def reconstruction_table(models: dict[str, Any]) -> Table:
    """Likelihood and standard deviations per model."""
    columns = ("mean", "standard deviation", "median", "sd: total", "explained", "observed", "share explained")
    table = Table("model", *columns, title="log-likelihood in nats per cell; standard deviation per gene")
    for name, model in models.items():
        if (found := model["reconstruction"]) is not None:
            likelihood = [found["log_likelihood"][key] for key in ("mean", "standard_deviation", "median")]
            deviation = [found["standard_deviation"][key] for key in ("total", "explained", "observed")]
            table.add_row(name, *(number(one, 4) for one in (*likelihood, *deviation, found["explained_share"])))
    return table


def cluster_table(models: dict[str, Any]) -> Table:
    """Agreement of clusters with labels, and silhouettes."""
    table = Table("model", "cells", "labels", "clusters", "ARI", "AMI", "NMI", "silhouette", title="latent")
    for name, model in models.items():
        for part, levels in model["latent"].items():
            for level, found in levels.items():
                for kind in ("kmeans", "mixture"):
                    if kind in found:
                        figures = [number(found[kind][key], 3) for key in ("ari", "ami", "nmi")]
                        counted = f"{part}, {found['n_cells']:,}"
                        table.add_row(name, counted, level, kind, *figures, number(found["silhouette"], 3))
    return table


def integration_table(models: dict[str, Any]) -> Table:
    """Figures of scib-metrics per model, or why there are none."""
    table = Table("metric", *models, title="scib-metrics")
    found = [model["integration"] for model in models.values()]
    for metric in dict.fromkeys(name for one in found for name in one):
        cells = [one.get(metric) for one in found]
        table.add_row(metric, *(number(cell, 3) if isinstance(cell, float) else _text(cell) for cell in cells))
    return table


def number(value: float | None, digits: int) -> str:
    """That many significant digits; a dash for what is not defined."""
    return "-" if value is None else f"{value:.{digits}g}"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
