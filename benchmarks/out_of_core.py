"""Train one epoch on a zarr that does not fit: `make bench-out-of-core`; prints and writes seconds and peak memory.

The zarr is made in a scratch directory and deleted afterwards, or kept and used again where `--zarr` says. Training runs in a process of its
own, so that its peak is its own.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.machine import machine

N_GENES, PER_CELL, BLOCK = 20_000, 600, 20_000


def write_zarr(path: Path, n_cells: int) -> int:
    """Sparse counts of three batches and four types, written block by block; returns the number of stored values."""
    import zarr
    from anndata.io import write_elem

    generator = np.random.default_rng(0)
    # A few genes are seen in most cells and most in few, as in real cells.
    weight = generator.gamma(0.3, 1.0, N_GENES)
    edges = np.cumsum(weight / weight.sum())
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    matrix = group.create_group("X")
    matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]})
    data = matrix.create_array("data", shape=(0,), chunks=(1 << 20,), dtype="float32")
    indices = matrix.create_array("indices", shape=(0,), chunks=(1 << 20,), dtype="int32")
    indptr = np.zeros(n_cells + 1, np.int64)
    n_values = 0
    for start in range(0, n_cells, BLOCK):
        n = min(BLOCK, n_cells - start)
        drawn = np.searchsorted(edges, generator.random((n, PER_CELL))).clip(0, N_GENES - 1)
        code, counts = np.unique((np.arange(n)[:, None] * N_GENES + drawn).ravel(), return_counts=True)
        indptr[start + 1 : start + n + 1] = n_values + np.cumsum(np.bincount(code // N_GENES, minlength=n))
        n_values += len(code)
        data.append(counts.astype(np.float32))
        indices.append((code % N_GENES).astype(np.int32))
    matrix.create_array("indptr", data=indptr)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(generator.integers(3, size=n_cells), ["a", "b", "c"]),
            "cell_type": pd.Categorical.from_codes(generator.integers(4, size=n_cells), list("BTNM")),
        },
        index=pd.RangeIndex(n_cells).astype(str),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_elem(group, "obs", obs)
        write_elem(group, "var", pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))
        for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            write_elem(group, name, {})
    return n_values


def train(path: Path, output: Path, n_epochs: int) -> dict[str, float]:
    """Fit the family `vae` for some epochs; seconds and the peak of this process' memory, in GiB."""
    from training import run
    from training.config import Config

    config = Config.model_validate(
        {
            "name": "big",
            "species": "none",
            "data": [{"name": "big", "path": path, "backed": True}],
            "batch_key": "batch",
            "labels": [{"name": "cell_type", "classes": dict.fromkeys("BTNM")}],
            "genes": {"rule": "log_variance", "n_genes": 2000},
            "family": "vae",
            "model": {"hidden": [128], "n_latent": 10},
            "fit": {"max_epochs": n_epochs, "rows": 512, "device": "cpu", "n_threads": 1},
        }
    )
    started = time.perf_counter()
    made = run.fit(config, output, show_progress=False)
    return {
        "seconds": time.perf_counter() - started,
        "seconds_of_epochs": float(pd.read_csv(output / "metrics.csv")["seconds"].iloc[-1]),
        "n_training_cells": len(made.prepared.train),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }


def main() -> None:
    """Generate, train, write, delete."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cells", type=int, default=1_000_000)
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--scratch", type=Path, default=None, help="where all files go; default: the system's")
    arguments.add_argument("--zarr", type=Path, help="make the cells here, or use those that are here, and keep them")
    arguments.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)
    found = arguments.parse_args()
    if found.train:
        print(json.dumps(train(*found.train, found.epochs)))
        return
    scratch = Path(tempfile.mkdtemp(dir=found.scratch))
    path = found.zarr or scratch / "big.zarr"
    try:
        if not path.exists():
            started = time.perf_counter()
            write_zarr(path, found.cells)
            print(f"made {path.name} in {time.perf_counter() - started:.0f} s", flush=True)
        result = measure(path, scratch / "run", found.epochs)
    finally:
        shutil.rmtree(scratch)
    found.output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['n_cells']:,} cells x {N_GENES:,} genes, {result['n_values']:,} values, {result['stored_gb']} GB on disk, "
        f"{result['in_memory_gib']} GiB as a sparse matrix in memory"
    )
    print(
        f"{found.epochs} epoch(s) of {result['n_training_cells']:,} cells in {result['seconds_of_epochs']} s (with reading, genes and split "
        f"{result['seconds']} s); peak memory {result['peak_gib']} GiB"
    )


def measure(path: Path, output: Path, n_epochs: int) -> dict[str, Any]:
    """Train on the zarr at `path` in a process of its own."""
    import zarr

    group = zarr.open_group(path, mode="r")
    n_values = int(group["X/data"].shape[0])
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    command = [
        sys.executable,
        "-m",
        "benchmarks.out_of_core",
        "--train",
        str(path),
        str(output),
        "--epochs",
        str(n_epochs),
    ]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return {
        "machine": machine(),
        "n_cells": int(group["X/indptr"].shape[0]) - 1,
        "n_genes": N_GENES,
        "n_values": n_values,
        "stored_gb": round(n_bytes / 1e9, 2),
        "in_memory_gib": round(n_values * 8 / 2**30, 2),
        "n_epochs": n_epochs,
        "n_training_cells": figures["n_training_cells"],
        "seconds_of_epochs": round(figures["seconds_of_epochs"], 1),
        "seconds": round(figures["seconds"], 1),
        "peak_gib": round(figures["peak_gib"], 2),
    }


if __name__ == "__main__":
    main()
