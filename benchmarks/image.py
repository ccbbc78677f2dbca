"""The slim image beside BentoML's own image of the same bento: size, layers, seconds to the first answer, memory.

    make bench-image

Both are started the same number of times, in turns, by the same engine; the first answer is that of one cell to /v1/embed, asked for
from the moment that the engine has been told to start.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from service.contract import artifact
from service.contract.store import Store
from tests.builders import arrow_body
from tests.container.container import MEMORY, URL, Container, engine, image_config
from tests.end_to_end.conftest import STORE

RESULT = Path(__file__).with_suffix(".json")
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}


def one_cell() -> bytes:
    """A held-out cell of the shipped model."""
    store = Store(STORE)
    shipped = artifact.read(store.path(store.resolve("pbmc")))
    return arrow_body(sp.csr_matrix(shipped.golden()["encode/counts"][:1]), shipped.genes.gene_symbol)


def layers(name: str) -> list[dict[str, str]]:
    """Layers that hold files, newest first, and what made them."""
    lines = engine("history", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", name).splitlines()
    parts = [line.split("\t", 1) for line in lines]
    return [{"size": size, "made_by": _made_by(command)} for size, command in parts if size.replace(" ", "") != "0B"]


def _made_by(command: str) -> str:
    """The instruction and, of a copy, where to."""
    words = command.removeprefix("/bin/sh -c ").removeprefix("#(nop) ").split()
    return f"{words[0]} {words[-1]}" if words[0] in ("COPY", "ADD") else words[0]


def start(name: str, body: bytes) -> tuple[float, int]:
    """Seconds from start to the first answer, and bytes of memory that the processes then hold (PSS: a shared page counts once)."""
    # BentoML's image keeps files in its home, which cannot be written here; ours has this set already.
    container = Container("-e", "BENTOML_HOME=/tmp/bentoml", name=name)
    try:
        with container.network():
            answer = None
            while answer is None or answer.status_code != 200:
                with contextlib.suppress(httpx.TransportError):
                    answer = httpx.post(URL + "/v1/embed?model=pbmc", content=body, headers=ARROW, timeout=5)
                time.sleep(0.02)
            seconds = time.monotonic() - container.started
        status = container.run(
            "sh", "-c", "cat /proc/[0-9]*/smaps_rollup 2>/dev/null | awk '/^Pss:/ {sum += $2} END {print sum}'"
        )
        return seconds, int(status) * 1024
    finally:
        container.close()


def main() -> None:
    """Measure both, print a table, and write the result beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slim")
    parser.add_argument("stock")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    body = one_cell()
    images = {"slim": arguments.slim, "stock": arguments.stock}
    measured: dict[str, list[tuple[float, int]]] = {kind: [] for kind in images}
    for _ in range(arguments.rounds):
        for kind, name in images.items():
            measured[kind].append(start(name, body))
    result: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, "memory_limit": MEMORY}
    for kind, name in images.items():
        seconds, memory = zip(*measured[kind], strict=True)
        result[kind] = {
            "bytes": int(image_config(name)["Size"]),
            "seconds_to_first_answer": round(statistics.median(seconds), 2),
            "memory_bytes": int(statistics.median(memory)),
            "layers": layers(name),
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", "slim", "stock", "ratio")
    rows = (
        ("MB", "bytes", 1e6),
        ("seconds to first answer", "seconds_to_first_answer", 1),
        ("memory, MB", "memory_bytes", 1e6),
    )
    for title, key, unit in rows:
        slim, stock = (result[kind][key] / unit for kind in images)
        table.add_row(title, f"{slim:.4g}", f"{stock:.4g}", f"{slim / stock:.2f}")
    console = Console()
    console.print(table)
    for kind in images:
        for layer in result[kind]["layers"]:
            console.print(f"{kind:5} {layer['size']:>8}  {layer['made_by']}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
