"""Fill the generated parts of README.md and docs/: tables of settings, metrics, errors, tasks, formats; openapi.json; example answers.

    python -m docs.generate           write them
    python -m docs.generate --check   fail where one is stale (make lint)

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from service import metrics
from service.api import openapi, problems
from service.cells.formats import FORMATS
from service.contract.manifest import Manifest
from service.inference import TASKS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs/examples"
_BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


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
            f"### POST /v1/{task.name}\n\n{task.summary}. Needs the graphs {', '.join(task.graphs)}.\n\n{task.description}\n"
        )
        parts.append(_table(("option", "meaning"), [("`model`", "`name`, `name@version` or `name@alias`"), *options]))
    return "\n".join(parts)


def formats() -> str:
    """Media type and layout."""
    return _table(("media type", "layout"), [(f"`{form.media_type}`", form.description) for form in FORMATS.values()])


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
    rows = json.loads((ROOT / "docs/evaluation.json").read_text())
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


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "evaluation": evaluation,
    "benchmark": benchmark,
    "image": image,
    "stages": stages,
    "swaps": swaps,
    "metrics": metric_families,
    "errors": errors,
    "tasks": tasks,
    "formats": formats,
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
