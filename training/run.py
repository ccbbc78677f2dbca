"""A run directory: everything that exporting, evaluating and repeating a run needs. Nothing in it is a pickle of ours."""

import functools
import io
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from training import archive, loggers, start
from training import config as configuration
from training import fit as fitting
from training.calibration import stored
from training.calibration.stored import Calibration
from training.config import Config
from training.data import source
from training.data.prepared import Prepared, add_labels, prepare, split_reference
from training.data.reference import load_reference
from training.data.splits import TEST, VALIDATION, Split
from training.data.stored_cells import SCRATCH_PREFIX
from training.families.family import Family

CONFIG, SPLIT, GENES, WEIGHTS, PROVENANCE = "config.yaml", "split.json", "genes.tsv", "weights.npz", "provenance.json"
PACKAGES = ("torch", "lightning", "numpy", "scipy", "anndata", "scanpy", "onnx", "onnxscript", "onnxruntime")
_ROOT = Path(__file__).parent.parent


class NotARun(Exception):
    """A directory holds no finished run."""


class TooFewGenes(Exception):
    """A data set lacks too many genes of the run that another begins with."""


class RunExists(Exception):
    """A directory already holds a run."""


@dataclass(frozen=True)
class Run:
    """A finished run with the cells that it was made of."""

    config: Config
    reference: AnnData
    split: Split
    prepared: Prepared
    family: Family
    provenance: dict[str, Any]
    calibration: Calibration | None = None
    """What `calibrate` found, if it was run."""

    @property
    def test_cells(self) -> AnnData:
        """Held-out cells of all sets over the model's genes."""
        return self.reference[self.split.positions(self.reference, TEST), self.prepared.var.index]

    @property
    def held_out(self) -> NDArray[np.int64]:
        """Positions of the test and validation cells; none where the configuration sets neither apart."""
        return self.split.positions(self.reference, TEST, VALIDATION)

    @property
    def outcome(self) -> str:
        """Which epoch was kept, and how long it took, in a few words."""
        found = self.provenance
        kept = f"last epoch of {found['n_epochs']}, no validation cells"
        if found["best_validation_loss"] is not None:
            kept = (
                f"best epoch {found['best_epoch'] + 1} of {found['n_epochs']}, validation loss "
                f"{found['best_validation_loss']:.4f}"
            )
        return f"{kept}, {found['seconds']:.0f} s"


def fit(config: Config, directory: Path, resume: bool = False, show_progress: bool = True) -> Run:
    """Train as `config` says and write the run directory.

    Raises:
        RunExists: the directory holds a run and `resume` is false.
        LossNotFinite: the run directory holds the best model before.
        LoggerUnavailable: a logger's package is not installed.
        as `registry.fetch` and `fit.fit` do.
    """
    if not resume and (directory / CONFIG).exists():
        raise RunExists(f"{directory} already holds a run. Use --resume to go on with it, or another --output.")
    loggers.check(config.fit.loggers)
    parent = load(Path(config.start.run)) if config.start else None
    if parent is not None:
        config = start.known_batches(config, parent)
    directory.mkdir(parents=True, exist_ok=True)
    if (
        resume
        and (directory / CONFIG).exists()
        and _unlogged(configuration.load(directory / CONFIG)) != _unlogged(config)
    ):
        raise RunExists(f"{directory} holds a run of another configuration, which --resume cannot go on with.")
    (directory / CONFIG).write_text(config.dump())
    started = time.perf_counter()
    reference = _reference(config, parent.prepared.var if parent else None)
    if parent is not None:
        start.add_latent(reference, parent)
    split = split_reference(config, reference)
    (directory / SPLIT).write_text(split.dump())
    for left in directory.glob(f"{SCRATCH_PREFIX}*"):
        left.unlink()  # of a run that was killed
    prepared = prepare(config, reference, split, directory)
    prepared.var.to_csv(directory / GENES, sep="\t", index=False)
    begin = functools.partial(start.begin, config=config, prepared=prepared, parent=parent) if parent else None
    try:
        fitted, problem = fitting.fit(config, prepared, directory, resume, show_progress, begin), None
    except fitting.LossNotFinite as error:
        if error.fitted is None:
            raise
        fitted, problem = error.fitted, error
    provenance = {
        **describe_environment(config.seed),
        "seconds": round(time.perf_counter() - started, 1),
        "best_epoch": fitted.best_epoch,
        "best_validation_loss": fitted.best_loss,
        "n_epochs": fitted.n_epochs,
        "n_parameters": sum(weight.numel() for weight in fitted.family.parameters()),
        "is_interrupted": fitted.is_interrupted,
        "data": {name: source.digests(data) for data, name in zip(config.data, config.datasets, strict=True)},
    }
    weights = {name: tensor.numpy() for name, tensor in fitted.family.state_dict().items()}
    (directory / WEIGHTS).write_bytes(archive.dump(weights))
    (directory / stored.FIGURES).unlink(missing_ok=True)  # it was of other weights
    (directory / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
    if problem is not None:
        raise problem
    return Run(config, reference, split, prepared, fitted.family, provenance)


def load(directory: Path) -> Run:
    """Read a run directory, and its cells from the registry.

    Raises:
        NotARun: a file is missing.
        StaleCalibration: it was calibrated with other weights.
    """
    if missing := [name for name in (CONFIG, SPLIT, GENES, WEIGHTS, PROVENANCE) if not (directory / name).is_file()]:
        raise NotARun(
            f"{directory} holds no finished run: {', '.join(missing)} missing. Run `fit` with --output {directory}."
        )
    config = configuration.load(directory / CONFIG)
    genes = pd.read_csv(directory / GENES, sep="\t", keep_default_na=False)
    reference = _reference(config, genes)
    if config.start:
        start.add_no_latent(reference, config)
    split = Split.parse((directory / SPLIT).read_text())
    prepared = prepare(config, reference, split)
    if not np.array_equal(genes.to_numpy(), prepared.var.to_numpy()):
        raise NotARun(f"{directory / GENES} lists other genes than its configuration now gives. Fit the run again.")
    family = fitting.build(config, prepared)
    with np.load(io.BytesIO((directory / WEIGHTS).read_bytes()), allow_pickle=False) as arrays:
        family.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    provenance = json.loads((directory / PROVENANCE).read_text())
    calibration = stored.read(directory, directory / WEIGHTS)
    return Run(config, reference, split, prepared, family.eval(), provenance, calibration)


def _unlogged(config: Config) -> Config:
    """The configuration without what may change when a run is resumed."""
    return config.model_copy(update={"fit": config.fit.model_copy(update={"loggers": ()})})


def _reference(config: Config, genes: pd.DataFrame | None) -> AnnData:
    """The cells of a run with their labels, over `genes` where the run keeps those of another.

    Raises:
        TooFewGenes: a set has less of them than `export.min_gene_overlap`.
    """
    kept = genes if config.start and config.start.keep_genes else None
    reference = load_reference(config.data, config.cells, config.map_symbols, config.seed, kept)
    add_labels(config, reference)
    for name, overlap in reference.uns.get("gene_overlap", {}).items():
        if overlap < config.export.min_gene_overlap:
            raise TooFewGenes(
                f"'{name}' has {overlap:.1%} of the genes of {config.start.run}, and export.min_gene_overlap is "
                f"{config.export.min_gene_overlap:.0%}. Check that its genes are named as there, or set start.keep_genes: false."
            )
    return reference


def describe_environment(seed: int) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m training", *sys.argv[1:]]),
        "code_commit": code_commit(),
        "seed": seed,
        "packages": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu(),
            "n_cpus": str(os.cpu_count()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
    }


def code_commit() -> str:
    """Commit of this checkout, with "-dirty" where training/ or service/ differ from it; "unknown" outside a checkout."""
    try:
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "training", "service")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - our own words


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
