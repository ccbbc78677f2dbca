"""Every family: does it train, resume after kill -9, export, agree with torch, repeat byte for byte, and is it served?

    make bench-families

Each is fitted to real cells three times: unbroken, again, and killed in the middle and resumed. The exported versions are served by one
real server, in the environment without torch, and asked over HTTP for held-out cells. A family counts as served only if no file of
service/ names it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from service.client import Client
from service.contract import artifact
from tests.end_to_end.server import ROOT, Server
from training import config as configuration
from training import export as exporting
from training import parity, run
from training.families import FAMILIES

RESULT = Path(__file__).with_suffix(".json")
CONFIGS = ROOT / "training/configs"
SHORT = ("fit.max_epochs=6", "fit.patience=6", "fit.schedule=one_cycle")
LIMIT = 1e-4
N_CELLS = 200


def model_name(family: str) -> str:
    """Of its model in the store."""
    return family.replace("_", "-")


def settings(family: str) -> tuple[Path, tuple[str, ...]]:
    """A configuration of real data for the family, shortened."""
    if family == "cite_autoencoder":
        return CONFIGS / "cite_pbmc.yaml", (*SHORT, f"name={model_name(family)}")
    return CONFIGS / "cell_lines.yaml", (*SHORT, f"name={model_name(family)}", f"family={family}")


def command(family: str, directory: Path, *options: str) -> list[str]:
    """That fits the family in a process of its own."""
    path, changes = settings(family)
    flags = [word for change in changes for word in ("--set", change)]
    return [sys.executable, "-m", "training", "fit", str(path), "--output", str(directory), *flags, *options]


def fit_and_kill(family: str, directory: Path) -> int:
    """Start a fit and kill -9 it when two epochs have been kept; the number of epochs in its last checkpoint."""
    last = directory / "checkpoints/last.ckpt"
    process = subprocess.Popen(command(family, directory), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen: set[int] = set()
    while len(seen) < 2:
        if process.poll() is not None:
            raise RuntimeError(f"{family} ended before it could be killed: {process.stderr.read().decode()[-2000:]}")
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(seen)


def check(family: str, folder: Path, store: Path) -> tuple[run.Run, dict[str, Any]]:
    """Everything but serving."""
    path, changes = settings(family)
    config = configuration.load(path, changes)
    made = run.fit(config, folder / "first", show_progress=False)
    exported = exporting.export(made, store)
    again = exporting.export(run.fit(config, folder / "second", show_progress=False), folder / "store")
    fit_and_kill(family, folder / "killed")
    subprocess.run(command(family, folder / "killed", "--resume"), cwd=ROOT, check=True, capture_output=True)
    graphs = {one.name: one.read_bytes() for one in exported.glob("*.onnx")}
    manifest = artifact.read_manifest(exported)
    losses = (folder / "first/metrics.csv").read_text().splitlines()
    column = losses[0].split(",").index("train_loss")
    found = {
        "trains": float(losses[-1].split(",")[column]) < float(losses[1].split(",")[column]),
        "resumes": (folder / "first/weights.npz").read_bytes() == (folder / "killed/weights.npz").read_bytes(),
        "exports": sorted(graphs),
        "largest_difference": {
            name: {"absolute": value.absolute, "relative": value.relative}
            for name, value in manifest.parity.outputs.items()
        },
        "repeats": graphs == {one.name: one.read_bytes() for one in again.glob("*.onnx")},
    }
    return made, found


def serve(runs: dict[str, run.Run], store: Path) -> dict[str, dict[str, Any]]:
    """Ask one server for held-out cells of every model, and compare with torch in float64."""
    os.environ.setdefault("CELLSERVE_TEST_SERVER_PYTHON", str(ROOT / ".venv-serve/bin/python"))
    server = Server(store)
    found = {}
    try:
        server.start().wait_until_ready()
        for family, made in runs.items():
            cells = made.reference[:N_CELLS, made.prepared.var.index]
            counts = sp.csr_matrix(cells.X, dtype=np.float32)
            query = ad.AnnData(counts, obs=cells.obs[[]].copy(), var=cells.var[[]].copy())
            inputs = {
                "counts": counts.toarray(),
                "library": np.asarray(counts.sum(axis=1)).ravel(),
                "batch": np.zeros(len(cells), dtype=np.int64),
            }
            torch_says = parity.run_torch(made.family.graphs(), inputs)
            with Client(server.url, model=model_name(family)) as client:
                latent = client.embed(query).obsm[f"X_{model_name(family)}"]
                expression = client.reconstruct(query, batch=made.prepared.batches[0]).obsm["expression"]
                annotated = client.annotate(query).obs if "classify" in made.family.graphs() else None
            expected = torch_says["decode/expression"]
            found[family] = {
                "latent": float(np.abs(latent - torch_says["encode/latent"]).max()),
                "expression": float(np.abs(np.asarray(expression) - expected).max() / expected.max()),
                "labels_agree": None if annotated is None else _agreement(annotated, made, torch_says),
                "lines_in_service": named_in_service(family),
            }
    finally:
        server.close()
    return found


def _agreement(annotated: pd.DataFrame, made: run.Run, torch_says: parity.Arrays) -> float:
    """Share of the cells with the label that torch gives."""
    level = made.config.labels[0]
    expected = np.array(list(level.classes))[torch_says[f"classify/probabilities_{level.name}"].argmax(axis=1)]
    return float((annotated["predicted_labels"].astype(str).to_numpy() == expected).mean())


def named_in_service(family: str) -> int:
    """Lines of service/ with the name of the family or its class."""
    words = re.compile(rf"\b({family}|{FAMILIES[family].__name__})\b")
    return sum(len(words.findall(path.read_text())) for path in (ROOT / "service").rglob("*.py"))


def table(results: dict[str, Any]) -> Table:
    """A row per family."""
    made = Table("family", "trains", "resumes", "graphs", "ONNX - torch", "served", "same bytes twice")
    for name, row in results.items():
        served = row["served"]
        made.add_row(
            name,
            *("yes" if row[key] else "NO" for key in ("trains", "resumes")),
            str(len(row["exports"])),
            f"{row['largest_difference']['encode/latent']['absolute']:.1e}",
            "yes" if passes_served(served) else f"NO: {served}",
            "yes" if row["repeats"] else "NO",
        )
    return made


def passes_served(served: dict[str, Any]) -> bool:
    """Same latent, same labels, and not a line of the service about the family."""
    same = served["latent"] < LIMIT and served["expression"] < LIMIT and served["labels_agree"] in (None, 1.0)
    return bool(same) and not served["lines_in_service"]


def passes(row: dict[str, Any]) -> bool:
    """Whether a family has every property."""
    near = row["largest_difference"]["encode/latent"]["absolute"] < LIMIT
    return bool(row["trains"] and row["resumes"] and row["exports"] and row["repeats"] and near) and passes_served(
        row["served"]
    )


def main() -> None:
    """Print the table, write the JSON; exit code 1 if a family lacks anything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=sorted(FAMILIES))
    names = parser.parse_args().families
    console, runs, results = Console(), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            runs[name], results[name] = check(name, Path(scratch) / name, Path(scratch) / "store")
            console.print(f"{name}: fitted three times, exported twice")
        for name, served in serve(runs, Path(scratch) / "store").items():
            results[name]["served"] = served
    console.print(table(results))
    if names == sorted(FAMILIES):
        RESULT.write_text(json.dumps({"machine": machine(), "families": results}, indent=1) + "\n")
    if not all(passes(row) for row in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
