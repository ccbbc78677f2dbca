"""Fill the generated parts of README.md and docs/: tables of settings, metrics, errors, tasks, formats; openapi.json; example answers.

    python -m docs.generate           write them
    python -m docs.generate --check   fail where one is stale (make lint)

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs import annotation_figures
from docs.serving_figures import cold_start, million_cells, overload, servers, single_cells, variants
from docs.tables import table as _table
from service import metrics
from service.api import openapi, problems
from service.cells.formats import FORMATS
from service.contract.manifest import Manifest
from service.inference import TASKS
from service.inference.questions import QUESTIONS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs/examples"
_BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def settings() -> str:
    """Variable, default, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = (
            ""
            if field.default is None
            else f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
        )
        rows.append((f"`{PREFIX}{name.upper()}`", default, field.description or ""))
    return _table(("variable", "default", "meaning"), rows)


def metric_families() -> str:
    """Name, type, labels, meaning."""
    rows = []
    for collector in metrics.COLLECTORS:
        family = next(iter(collector.describe()))
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in metrics.label_names(collector))
        rows.append((f"`{name}`", family.type, labels, family.documentation))
    return _table(("metric", "type", "labels", "meaning"), sorted(rows))


def errors() -> str:
    """Status, code, title, sentence."""
    rows = []
    for error, status in sorted(problems.STATUS.items(), key=lambda item: (item[1], item[0].code)):
        meaning = (error.__doc__ or "").split("\n")[0]
        rows.append((str(status), f"`{error.code}`", error.title, meaning))
    return _table(("status", "code", "title", "when"), rows)


def tasks() -> str:
    """One section per task: what it answers and its options."""
    parts = []
    for task in TASKS.values():
        options = [(f"`{name}`", field.description or "") for name, field in task.options.model_fields.items()]
        parts.append(
            f"### POST /v1/{task.name}\n\n{task.summary}. Needs the graphs {', '.join(task.graphs)}"
            f"{', and reference cells' if task.needs_reference else ''}.\n\n{task.description}\n"
        )
        parts.append(_table(("option", "meaning"), [("`model`", "`name`, `name@version` or `name@alias`"), *options]))
    return "\n".join(parts)


def questions() -> str:
    """Route, answer and options."""
    rows = [("`POST /v1/genes/check`", "What would happen to these genes, without sending a cell", "`model`")]
    for question in QUESTIONS.values():
        options = [f"`{name}`: {field.description}" for name, field in question.options.model_fields.items()]
        rows.append((f"`POST /v1/{question.name}`", question.summary, "; ".join(["`model`", *options])))
    return _table(("route", "answer", "options"), rows)


def formats() -> str:
    """Media type and layout."""
    rows = [
        (f"`{form.media_type}`", "body, answer" if form.is_body else "answer", form.description)
        for form in FORMATS.values()
    ]
    return _table(("media type", "as", "layout"), rows)


def openapi_json() -> str:
    """docs/openapi.json: what GET /docs.json answers."""
    return json.dumps(openapi.document(), indent=2) + "\n"


def manifest_json() -> str:
    """docs/manifest.schema.json: JSON Schema of manifest.json."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"


def example(name: str) -> str:
    """A file of docs/examples as a code block; `make examples` asks a running server for it."""
    return f"```{'json' if name.endswith('.json') else 'text'}\n{(EXAMPLES / name).read_text().rstrip()}\n```\n"


def evaluation() -> str:
    """docs/evaluation.json, which `make evaluate` writes."""
    rows = json.loads((ROOT / "docs/evaluation.json").read_text())["annotation"]
    titles = {
        "ours": "cellserve",
        "logistic_regression": "logistic regression, C=1",
        "logistic_regression_tuned": "logistic regression, C tuned",
        "logistic_regression_balanced": "logistic regression, C tuned, classes balanced",
    }
    cells = [
        (
            row["query"],
            f"{row['n_cells']:,}",
            *(f"{row[method]['accuracy']:.3f} / {row[method]['macro_f1']:.3f}" for method in titles),
        )
        for row in rows
    ]
    return _table(("query", "cells", *titles.values()), cells)


def benchmark() -> str:
    """benchmarks/embed_http.json, which `make bench` writes."""
    result = json.loads((ROOT / "benchmarks/embed_http.json").read_text())
    measured = result["cells_per_second"]
    best = max(measured["scvi_tools"].values())
    rows = [
        (size, f"{rate:,}", f"{rate / measured['session_run'][size]:.2f}", f"{rate / best:.2f}")
        for size, rate in measured["http"].items()
    ]
    machine = f"{result['machine']['cpus']} CPUs of {result['machine']['processor']}, {result['n_genes']:,} genes, one client, one connection"
    header = ("cells per request", "cells/s", "ratio to session.run", "ratio to the best of scvi-tools")
    return f"{_table(header, rows)}\n{machine}; medians of {result['rounds']} rounds. Ratios carry over to other machines, rates do not.\n"


def stages() -> str:
    """benchmarks/stages.json, which `make bench-stages` writes."""
    result = json.loads((ROOT / "benchmarks/stages.json").read_text())
    titles = {
        "bytes": "body, bytes",
        "floor_read": "floor of reading: copying the body once",
        "read": "read: Arrow to counts",
        "check": "check: raw counts?",
        "align": "align: to the model's genes",
        "encode": "encode: densify and run the graph",
        "floor_encode": "floor of encoding: its operations at the speed of a 2048³ product",
        "serialise": "serialise: columns to Arrow",
    }
    sizes = result["stages"]
    rows = [(title, *(f"{sizes[size][stage]:,}" for size in sizes)) for stage, title in titles.items()]
    return _table(("microseconds per request", *(f"{size} cells" for size in sizes)), rows)


def image() -> str:
    """benchmarks/image.json, which `make bench-image` writes."""
    result = json.loads((ROOT / "benchmarks/image.json").read_text())
    titles = {"slim": "`make image`", "stock": "`make image-bentoml`"}
    rows = [
        ("size in MB, base included", *(f"{result[kind]['bytes'] / 1e6:.0f}" for kind in titles)),
        ("seconds from start to the first answer", *(f"{result[kind]['seconds_to_first_answer']}" for kind in titles)),
        ("memory at rest in MB (PSS)", *(f"{result[kind]['memory_bytes'] / 1e6:.0f}" for kind in titles)),
    ]
    layers = ", ".join(layer["size"] for layer in result["slim"]["layers"])
    return (
        f"{_table(('', *titles.values()), rows)}\nOne bento, one Debian base, medians of {result['rounds']} starts in turns; printed by "
        f"`make bench-image`. Layers of the slim image, models first, then code, packages, base: {layers}.\n"
    )


def training_speed() -> str:
    """benchmarks/training_speed.json, which `make bench-training` writes."""
    result = json.loads((ROOT / "benchmarks/training_speed.json").read_text())
    rows = []
    for name, row in result["cells_per_second"].items():
        ours, theirs = row["ours"], row["scvi_tools"]
        for part, title in {"steps": "training steps", "epoch": "whole epoch"}.items():
            rates = (f"{ours[part]:,.0f}", f"{theirs[part]:,.0f}", f"{ours[part] / theirs[part]:.2f}")
            rows.append((name, title, *rates, f"{ours['peak_gib']:.2f} / {theirs['peak_gib']:.2f}"))
    header = (
        "data, likelihood, precision",
        "what is timed",
        "cells/s",
        "scvi-tools, cells/s",
        "ratio",
        "peak memory in GiB, ours / theirs",
    )
    sizes = {
        name.split(",")[
            0
        ]: f"{row['n_cells']:,} cells x {row['n_genes']:,} genes, {row['nonzero_per_cell']} counts per cell that are not zero"
        for name, row in result["cells_per_second"].items()
    }
    shapes = "; ".join(f"{name}: {size}" for name, size in sizes.items())
    return (
        f"{_table(header, rows)}\n{shapes}. {result['n_threads']} thread of {result['machine']['processor']}, medians of "
        f"{result['rounds']} runs in turns.\n"
    )


def out_of_core() -> str:
    """benchmarks/out_of_core.json, which `make bench-out-of-core` writes."""
    found = json.loads((ROOT / "benchmarks/out_of_core.json").read_text())
    rows = [
        ("cells x genes", f"{found['n_cells']:,} x {found['n_genes']:,}"),
        (
            "size of the zarr in GB; of its sparse matrix in memory in GiB",
            f"{found['stored_gb']}; {found['in_memory_gib']}",
        ),
        (
            "seconds of the epoch; with reading, choosing genes and splitting",
            f"{found['seconds_of_epochs']}; {found['seconds']}",
        ),
        ("peak memory of the process in GiB", f"{found['peak_gib']}"),
    ]
    return _table(("", "one epoch of `vae`, 2,000 genes, one thread"), rows)


def transfer() -> str:
    """Accuracies in benchmarks/quality.json, which `make bench-quality` writes."""
    measured = json.loads((ROOT / "benchmarks/quality.json").read_text())["cell_lines"]
    found = measured["transfer"]
    sizes = (f"{task} ({row['n_reference']:,} → {row['n_query']:,} cells)" for task, row in found.items())
    methods = next(iter(found.values()))["accuracy"]
    rows = ((name, *(_median(row["accuracy"][name]) for row in found.values())) for name in methods)
    return f"{_table(('accuracy on the query', *sizes), rows)}\n{_seeds(measured)}\n"


def integration() -> str:
    """Figures of scib-metrics in benchmarks/quality.json."""
    measured = json.loads((ROOT / "benchmarks/quality.json").read_text())["cell_lines"]
    rows = (
        (name, *(_median(row[part]) for part in ("batch", "bio", "total")))
        for name, row in measured["integration"].items()
    )
    return f"{_table(('latent', 'batch correction', 'bio conservation', 'total'), rows)}\n{_seeds(measured)}\n"


def clustering() -> str:
    """Agreement of clusters with sorted types in benchmarks/quality.json."""
    measured = json.loads((ROOT / "benchmarks/quality.json").read_text())["pbmc_facs"]
    found = measured["clustering"]
    columns = [(truth, name) for truth in found for name in ("ARI", "NMI")]
    header = ("clusters", *(f"{name}, {truth}" for truth, name in columns))
    rows = (
        (method, *(_median(found[truth][method][name]) for truth, name in columns))
        for method in next(iter(found.values()))
    )
    return f"{_table(header, rows)}\nMedians of {measured['n_seeds']} seeds.\n"


def autoencoders() -> str:
    """sc-autoencoder's experiment and the orthogonality constraint in benchmarks/quality.json."""
    measured = json.loads((ROOT / "benchmarks/quality.json").read_text())["autoencoders"]
    error = measured["training_error"]
    first = _table(
        ("training error after 1,000 epochs", ""),
        [
            ("ours, first run and second", " and ".join(f"{value:.4f}" for value in error["ours"])),
            ("sc-autoencoder", f"{error['published']:.4f}"),
            ("largest difference of a weight between our runs", f"{error['largest_difference_of_weights']:g}"),
        ],
    )
    rows = ((weight, *map(_median, one.values())) for weight, one in measured["orthogonality"].items())
    names = next(iter(measured["orthogonality"].values()))
    second = _table(("`orthogonality`", *names), rows)
    return f"{first}\n{second}\nMedians of {measured['n_seeds']} seeds.\n"


def reproducibility() -> str:
    """How far runs lie apart in benchmarks/reproducibility.json, which `make bench-reproducibility` writes."""
    measured = json.loads((ROOT / "benchmarks/reproducibility.json").read_text())
    titles = {
        "as_shipped": "as shipped",
        "other_seeds": "other seeds",
        "two_threads": "two threads, not deterministic",
        "one_and_two_threads": "one thread and two",
    }
    rows = []
    for way, title in titles.items():
        found = measured["between"][way]
        figures = (
            f"{found[name]['mean']:.3g} ({found[name]['min']:.3g} to {found[name]['max']:.3g})"
            for name in ("loss", "embedding", "neighbours", "clusters")
        )
        rows.append((title, f"{found['n_same_bytes']} of {found['n_pairs']}", *figures))
    header = ("pairs of runs", "same bytes", "loss, relative", "embedding", "neighbours", "clusters")
    return f"{_table(header, rows)}\n{measured['n_epochs']} epochs, {measured['n_cells']:,} cells: means, and ranges over pairs.\n"


def _seeds(measured: dict[str, Any]) -> str:
    return f"Medians of {measured['n_seeds']} seeds, of {measured['n_seeds_scvi_tools']} for scvi-tools."


def _median(figure: dict[str, Any]) -> str:
    seeds = figure["seeds"]
    return f"{figure['median']:.3f}" + (f" ({min(seeds):.3f} to {max(seeds):.3f})" if len(seeds) > 1 else "")


def swaps() -> str:
    """benchmarks/swaps.json, which `python -m benchmarks.swaps` writes."""
    result = json.loads((ROOT / "benchmarks/swaps.json").read_text())
    memory = [f"{result['memory_bytes'][half] / 1e6:.0f}" for half in ("first_half", "second_half")]
    rows = [
        ("exchanges", f"{result['n_swaps']}"),
        ("requests, of which failed", f"{result['n_requests']:,}, {result['n_failed']}"),
        ("sets of bits of one and the same cells", f"{result['n_sets_of_bits']}"),
        (
            "seconds from the alias to the first answer, median and longest",
            f"{result['seconds_to_exchange_median']}, {result['seconds_to_exchange_max']}",
        ),
        *(
            (
                f"milliseconds per request, p{percent}, without and with exchanges",
                f"{result[f'milliseconds_p{percent}_quiet']}, {result[f'milliseconds_p{percent}_during']}",
            )
            for percent in (50, 99)
        ),
        ("memory of the server in MB (USS), median of the first and the second half", ", ".join(memory)),
    ]
    return _table(("", "measured"), rows)


def explanation() -> str:
    """Completeness, deletion and markers in benchmarks/explanation.json, which `python -m benchmarks.explanation` writes."""
    found = json.loads((ROOT / "benchmarks/explanation.json").read_text())
    first = _table(
        (
            "integrated gradients of",
            "baseline",
            "completeness error, median",
            "largest",
            "below 1 %",
            "gradients per cell",
        ),
        [
            (
                one["explained"],
                one["baseline"],
                f"{one['error_median']:.2%}",
                f"{one['error_max']:.2%}",
                f"{one['share_below_1_percent']:.0%}",
                f"{one['steps_mean']:.0f}",
            )
            for one in found["completeness"]
        ],
    )
    lost = found["deletion"]
    second = _table(
        ("20 genes deleted", "probability of the label lost, mean", "median", "below one half afterwards"),
        [
            (
                words,
                *(f"{lost[f'probability_lost_{kind}_{measure}']:.3f}" for measure in ("mean", "median")),
                f"{lost[f'label_changed_{kind}']:.0%}",
            )
            for kind, words in (("top", "those of the explanation"), ("random", "others of the same counts"))
        ],
    )
    ranks = ("rank_query", "rank_table_attribution", "rank_table_impact")
    third = _table(
        ("label", "gene", "rank in held-out cells", "rank in the table by attribution", "by impact"),
        [
            (one["label"], one["gene"], *("-" if one[rank] is None else str(one[rank]) for rank in ranks))
            for one in found["markers"]
        ],
    )
    return f"{first}\n{second}\nOf {lost['n_cells']} held-out cells.\n\n{third}"


def units() -> str:
    """Genes and gene sets of the units of pbmc in benchmarks/explanation.json."""
    found = json.loads((ROOT / "benchmarks/explanation.json").read_text())["units"]
    return _table(
        ("unit", "first genes", "sets with q < 0.05", "first of them"),
        [
            (
                str(one["unit"]),
                ", ".join(one["genes"]),
                str(one["n_sets"]),
                "; ".join(f"{term['name']} ({term['q']:.1g})" for term in one["sets"]) or "-",
            )
            for one in found
        ],
    )


def orthogonality() -> str:
    """The expression-saliency autoencoder with and without its constraint in benchmarks/explanation.json."""
    found = json.loads((ROOT / "benchmarks/explanation.json").read_text())["orthogonality"]
    rows = [
        (name.replace("_", " "), *(f"{one[name]:.3g}" for one in (found["with"], found["without"])))
        for name in found["with"]
    ]
    return _table(("autoencoder on pbmc_facs, 64 units", "orthogonal", "without the constraint"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "evaluation": evaluation,
    "benchmark": benchmark,
    "servers": servers,
    "single_cells": single_cells,
    "variants": variants,
    "cold_start": cold_start,
    "overload": overload,
    "million_cells": million_cells,
    "image": image,
    "stages": stages,
    "training_speed": training_speed,
    "out_of_core": out_of_core,
    "transfer": transfer,
    "integration": integration,
    "clustering": clustering,
    "reproducibility": reproducibility,
    "autoencoders": autoencoders,
    "swaps": swaps,
    "annotation_labels": annotation_figures.labels,
    "annotation_confidence": annotation_figures.confidence,
    "annotation_sets": annotation_figures.prediction_sets,
    "annotation_unknown": annotation_figures.unknown,
    "annotation_concurrent": annotation_figures.concurrent,
    "explanation": explanation,
    "units": units,
    "orthogonality": orthogonality,
    "metrics": metric_families,
    "errors": errors,
    "tasks": tasks,
    "formats": formats,
    "questions": questions,
}
FILES: dict[str, Callable[[], str]] = {"docs/openapi.json": openapi_json, "docs/manifest.schema.json": manifest_json}


def filled(text: str) -> str:
    """A page with its generated parts filled in."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        content = PARTS[name]() if name in PARTS else example(name)
        return f"{match[1]}{content}{match[3]}"

    return _BLOCK.sub(part, text)


def main(arguments: list[str]) -> int:
    """Write or check everything that is generated; 1 if something is stale."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {page: filled(page.read_text()) for page in pages} | {ROOT / name: make() for name, make in FILES.items()}
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run `make docs`\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
