"""Eight clients at once ask one model about cells with different genes: does each get the answer that it would get alone?

    make bench-concurrent

Ours over HTTP, the shipped model. CellTypist with one model in one process, as a service around it would hold it, each client a thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray

from benchmarks.annotation_tasks import SETUPS, prepared
from benchmarks.machine import machine
from service.client import Client
from tests.end_to_end.server import ROOT, running_server

RESULT = Path(__file__).with_suffix(".json")
N_CLIENTS = 8
SETUP = "pbmc_facs, 80 to 20"


def gene_sets(n_genes: int) -> list[NDArray[np.int64]]:
    """A different choice of genes for each client, from all to four fifths of them, in an order of its own."""
    generator = np.random.default_rng(0)
    return [generator.permutation(n_genes)[: round(n_genes * share)] for share in np.linspace(1.0, 0.8, N_CLIENTS)]


def ours(cells: ad.AnnData, n_rounds: int) -> dict[str, int]:
    """Answers of a server, and how many of them differ from that of a client that is alone."""
    queries = [cells[:, genes].copy() for genes in gene_sets(cells.n_vars)]

    def ask(query: ad.AnnData) -> NDArray[np.float32]:
        with Client(url) as client:
            return client.annotate(query).obsm["probabilities"].to_numpy()

    with running_server(ROOT / "models_store") as url:
        alone = [ask(query) for query in queries]
        with ThreadPoolExecutor(N_CLIENTS) as clients:
            together = list(clients.map(ask, queries * n_rounds))
    n_other = sum(found.tobytes() != alone[i % N_CLIENTS].tobytes() for i, found in enumerate(together))
    return {"answers": len(together), "differ": n_other, "failed": 0}


def celltypist(python: str, reference: ad.AnnData, query: ad.AnnData, n_rounds: int) -> dict[str, int]:
    """The same of CellTypist."""
    cells = ad.concat([reference, query])
    cells.obs["part"] = np.repeat(["reference", "query"], [reference.n_obs, query.n_obs])
    with tempfile.TemporaryDirectory() as folder:
        path, genes = Path(folder) / "cells.h5ad", Path(folder) / "genes.json"
        cells.write_h5ad(path)
        genes.write_text(json.dumps([chosen.tolist() for chosen in gene_sets(query.n_vars)]))
        script = str(Path(__file__).with_name("celltypist_side.py"))
        command = [python, script, "concurrent", str(path), str(genes), str(n_rounds)]
        found: dict[str, int] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return found


def main() -> int:
    """Ask, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--celltypist-python", default=os.environ.get("CELLSERVE_CELLTYPIST_PYTHON"))
    options = parser.parse_args()
    if not options.celltypist_python:
        parser.error("name the Python that has CellTypist (make bench-concurrent does)")
    task = prepared(SETUPS[SETUP], 0).task()
    result: dict[str, Any] = {
        "machine": machine(),
        "clients": N_CLIENTS,
        "cells": task.query.n_obs,
        "cellserve": ours(task.query, options.rounds),
        "CellTypist": celltypist(options.celltypist_python, task.reference, task.query, options.rounds),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if not result["cellserve"]["differ"] else 1


if __name__ == "__main__":
    sys.exit(main())
