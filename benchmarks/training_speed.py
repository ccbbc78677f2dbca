"""Cells per second of a training epoch: our `vae` beside scvi-tools' SCVI of the same architecture.

    make bench-training

Both sides fit the same cells in the same minibatches of 128 with one hidden layer of 128 units, 10 latent units, a dispersion per gene and
dropout 0.1, in processes of their own and in turns. `steps` counts an epoch's training steps alone; `epoch` is what a user waits for with
each side's defaults: ours then also computes the validation loss and writes a checkpoint to resume from, which SCVI's does not.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.training_clock import Clock
from training.data import registry
from training.data.features import variance_of

ROOT = Path(__file__).parent.parent
N_GENES, N_SYNTHETIC, ROWS = 2000, 20_000, 128
GOAL = {"cpu": 3.0, "cuda": 10.0}


def real_cells() -> ad.AnnData:
    """pbmc_facs over its 2,000 genes of highest variance of log counts."""
    cells = registry.read("pbmc_facs")
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    logged = counts.copy()
    logged.data = np.log1p(logged.data)
    chosen = np.sort(np.argsort(-variance_of(logged), kind="stable")[:N_GENES])
    return _named(counts[:, chosen])


def synthetic_cells() -> ad.AnnData:
    """20,000 cells of ten kinds, negative-binomial counts of which an eighth are not zero."""
    generator = np.random.default_rng(0)
    share = generator.gamma(0.3, size=(10, N_GENES))
    share /= share.sum(axis=1, keepdims=True)
    blocks = []
    for _ in range(20):
        kind = generator.integers(10, size=N_SYNTHETIC // 20)
        mean = share[kind] * generator.lognormal(6.5, 0.4, size=(len(kind), 1))
        blocks.append(sp.csr_matrix(generator.poisson(mean * generator.gamma(2.0, 0.5, mean.shape)).astype(np.float32)))
    return _named(sp.vstack(blocks, format="csr"))


DATA = {"pbmc_facs": real_cells, "synthetic": synthetic_cells}


def _named(counts: sp.csr_matrix) -> ad.AnnData:
    counts = counts[np.asarray(counts.sum(axis=1)).ravel() > 0]
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(counts.shape[0])])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(counts.shape[1])]))


def our_side(path: Path, n_epochs: int, likelihood: str, device: str, n_threads: int, precision: str) -> dict[str, Any]:
    """Fit `vae` in this process: cells per second by epoch, peak of memory in GiB."""
    from training import fit as fitting
    from training import progress, run
    from training.config import Config

    clock = Clock()

    class Log(progress.MetricsLog):
        """The callback that every fit has; it lends the clock its place."""

        on_train_epoch_start = staticmethod(clock.on_train_epoch_start)
        on_train_batch_end = staticmethod(clock.on_train_batch_end)
        on_train_end = staticmethod(clock.on_train_end)

    fitting.MetricsLog = Log  # type: ignore[misc] - `fit` takes no callbacks, and needs none elsewhere
    model: dict[str, Any] = {"hidden": [128], "n_latent": 10, "dropout": 0.1, "layer_norm": True}
    if likelihood != "nb":
        model["likelihood"] = likelihood
    config = Config.model_validate(
        {
            "name": "speed",
            "species": "none",
            "data": [{"name": "cells", "path": path, "gene_symbol": "index"}],
            "genes": {"rule": "log_variance", "n_genes": N_GENES, "min_cells": 0},
            "split": {"validation": 0.099, "test": 0.001},
            "family": "vae",
            "model": model,
            "fit": {
                "max_epochs": n_epochs,
                "patience": n_epochs,
                "rows": ROWS,
                "gradient_clip": None,
                "device": device,
                "n_threads": n_threads,
                "precision": precision,
            },
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        run.fit(config, Path(folder) / "run", show_progress=False)
    return clock.summary() | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}


def measure(command: list[str]) -> dict[str, Any]:
    """Run one side; the medians over its epochs."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {name: statistics.median(value) if isinstance(value, list) else value for name, value in figures.items()}


def main() -> int:
    """Measure both sides and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of each run; the first is not counted")
    parser.add_argument("--device", choices=list(GOAL), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--likelihoods", nargs="+", default=["nb"], choices=["nb", "zinb"])
    parser.add_argument("--precisions", nargs="+", default=["32-true"], help="of both sides, as Lightning names them")
    parser.add_argument("--scvi-python", default=os.environ.get("CELLSERVE_BENCH_PYTHON"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/training_speed.json")
    parser.add_argument("--ours", nargs=2, metavar=("CELLS", "LIKELIHOOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        path, likelihood = options.ours
        print(
            json.dumps(
                our_side(Path(path), options.epochs, likelihood, options.device, options.threads, options.precisions[0])
            )
        )
        return 0
    if not options.scvi_python:
        parser.error(
            "name the Python that has scvi-tools: --scvi-python or CELLSERVE_BENCH_PYTHON (make bench-training does)"
        )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for data, make in DATA.items():
            path = Path(folder) / f"{data}.h5ad"
            cells = make()
            cells.write_h5ad(path)
            shape = {
                "n_cells": cells.n_obs,
                "n_genes": cells.n_vars,
                "nonzero_per_cell": round(cells.X.nnz / cells.n_obs),
            }
            for likelihood, precision in itertools.product(options.likelihoods, options.precisions):
                shared = [str(options.epochs), likelihood, options.device, str(options.threads), precision]
                script = str(Path(__file__).with_name("scvi_training.py"))
                ours = [sys.executable, "-m", "benchmarks.training_speed", "--ours", str(path), likelihood]
                ours += ["--epochs", shared[0], "--device", options.device, "--threads", shared[3]]
                ours += ["--precisions", precision]
                sides = {"ours": ours, "scvi_tools": [options.scvi_python, script, str(path), *shared]}
                runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
                for _ in range(options.rounds):
                    for side, command in sides.items():
                        runs[side].append(measure(command))
                found[f"{data}, {likelihood}, {precision}"] = shape | {
                    side: {name: round(statistics.median(run[name] for run in all_), 3) for name in all_[0]}
                    for side, all_ in runs.items()
                }
    result = {
        "machine": machine(),
        "device": options.device,
        "n_threads": options.threads,
        "rounds": options.rounds,
        "goal": GOAL[options.device],
        "cells_per_second": found,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(
        "data, likelihood", "", "ours, cells/s", "scvi-tools, cells/s", "ratio", "peak GiB, ours : scvi-tools"
    )
    for name, row in found.items():
        memory = f"{row['ours']['peak_gib']:.2f} : {row['scvi_tools']['peak_gib']:.2f}"
        for part in ("steps", "epoch"):
            rate, other = row["ours"][part], row["scvi_tools"][part]
            table.add_row(name, part, f"{rate:,.0f}", f"{other:,.0f}", f"{rate / other:.2f}", memory)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
