"""Fitting: the same run gives the same weights, broken or not; the device; Ctrl-C."""

import csv
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import lightning
import numpy as np
import pytest
import torch
import yaml

from tests.training.tiny import SETTINGS, tiny_cells, tiny_config
from training import fit as fitting
from training import run
from training.config import Config, Fit
from training.data.prepared import NoTrainingCells, Prepared, prepare, split_reference
from training.data.reference import load_reference
from training.families.family import Example
from training.families.vae import VAE
from training.progress import MetricsLog


@pytest.fixture
def prepared(tiny_sets: None) -> Prepared:
    """The tiny sets as a family is fitted to them."""
    config = tiny_config()
    reference = load_reference(config.data)
    return prepare(config, reference, split_reference(config, reference))


def weights(config: Config, prepared: Prepared, directory: Path, resume: bool = False) -> dict[str, bytes]:
    """All weights after a fit, as bytes."""
    fitted = fitting.fit(config, prepared, directory, resume, show_progress=False)
    return {name: tensor.numpy().tobytes() for name, tensor in fitted.family.state_dict().items()}


def with_fit(**changes: Any) -> Config:
    """The tiny configuration with other settings of `fit`."""
    return tiny_config(fit={**SETTINGS["fit"], **changes})


def unvalidated(**changes: Any) -> Config:
    """The same without validation cells."""
    return tiny_config(fit={**SETTINGS["fit"], **changes}, split={"validation": 0})


def log(directory: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv without the times."""
    with (directory / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


class PowerCut(Exception):
    """The process ends in the middle of an epoch."""


class CutInThirdEpoch(MetricsLog):
    """A log that ends the run after two epochs and one minibatch."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise PowerCut


class InterruptInSecondEpoch(MetricsLog):
    """A log during whose second epoch somebody presses Ctrl-C."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_step == trainer.num_training_batches + 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("configured", [with_fit, unvalidated])
def test_resuming_equals_never_having_stopped(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: Callable[..., Config]
) -> None:
    """A run that was cut and resumed ends with the same bits and the same log as one that was not, schedule and noise included."""
    config = configured(max_epochs=5, patience=5, schedule="one_cycle", thinning=0.5, gene_dropout=0.1)
    unbroken = weights(config, prepared, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "MetricsLog", CutInThirdEpoch)
        with pytest.raises(PowerCut):
            weights(config, prepared, tmp_path / "broken")
    assert weights(config, prepared, tmp_path / "broken", resume=True) == unbroken
    assert log(tmp_path / "broken") == log(tmp_path / "unbroken")
    assert [row["epoch"] for row in log(tmp_path / "broken")] == ["0", "1", "2", "3", "4"]


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.training.tiny import register, tiny_config
from training import fit as fitting
from training import run
from training.progress import MetricsLog
import yaml

class Kill(MetricsLog):
    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

register(pytest.MonkeyPatch())
fitting.MetricsLog = Kill
run.fit(tiny_config(fit=yaml.safe_load(sys.argv[2])), Path(sys.argv[1]), show_progress=False)
"""


@pytest.mark.parametrize("schedule", get_args(Fit.model_fields["schedule"].annotation))
def test_a_killed_process_is_resumed_to_the_same_bits(tiny_sets: None, tmp_path: Path, schedule: str) -> None:
    """SIGKILL in the middle of the third epoch: two epochs were kept, and the run ends as if nothing had been."""
    config = with_fit(max_epochs=5, patience=5, schedule=schedule, thinning=0.5, gene_dropout=0.1)
    unbroken = run.fit(config, tmp_path / "unbroken", show_progress=False)
    arguments = [str(tmp_path / "broken"), yaml.safe_dump(config.fit.model_dump(mode="json"))]
    root = Path(fitting.__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    kept = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert kept["epoch"] == 1
    resumed = run.fit(config, tmp_path / "broken", resume=True, show_progress=False)
    assert resumed.provenance["best_epoch"] == unbroken.provenance["best_epoch"]
    assert (tmp_path / "broken/weights.npz").read_bytes() == (tmp_path / "unbroken/weights.npz").read_bytes()


def test_resuming_what_had_stopped_early_trains_no_more(prepared: Prepared, tmp_path: Path) -> None:
    """The stop is remembered: same number of epochs, same weights."""
    config = with_fit(max_epochs=60, patience=1, learning_rate=0.1)
    first = fitting.fit(config, prepared, tmp_path, show_progress=False)
    again = fitting.fit(config, prepared, tmp_path, resume=True, show_progress=False)
    assert (again.n_epochs, again.best_epoch, again.best_loss) == (first.n_epochs, first.best_epoch, first.best_loss)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.family.state_dict().values(), first.family.state_dict().values(), strict=True)
    )


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the step, the part, the cells and a cause; the run directory holds the best model before."""
    loss = VAE.loss

    def spoil(self: VAE, example: Example) -> dict[str, torch.Tensor]:
        losses = loss(self, example)
        return {
            name: value * float("nan" if example.epoch == 2 and self.training else 1) for name, value in losses.items()
        }

    monkeypatch.setattr(VAE, "loss", spoil)
    message = (
        r"The loss is nan at epoch 3, step 1 .*in reconstruction.*Minibatch: 'tiny_.*/cell\d+'.*32 cells.*"
        r"Likely cause: a learning rate.*The model of epoch [12] was kept"
    )
    with pytest.raises(fitting.LossNotFinite, match=message):
        run.fit(tiny_config(), tmp_path / "run", show_progress=False)
    assert run.load(tmp_path / "run").provenance["best_epoch"] in (0, 1)


@pytest.mark.parametrize(
    ("change", "spoiled", "cause"),
    [
        ({}, True, "the step before was too large"),
        ({"precision": "16-mixed"}, False, "holds no larger numbers"),
        ({}, False, "learning rate that is too high"),
    ],
)
def test_the_likely_cause_is_told(prepared: Prepared, change: dict[str, Any], spoiled: bool, cause: str) -> None:
    """From the weights, the precision and the counts."""
    config = with_fit(**change)
    family = fitting.build(config, prepared)
    if spoiled:
        next(family.parameters()).data.fill_(float("nan"))
    batch = prepared.train.take(np.arange(5)).minibatch()
    losses = {"loss": torch.tensor(float("inf"))}
    assert cause in fitting.explain_loss(losses, batch, batch.counts(), family, config, "epoch 1, step 1")
    if not (change or spoiled):
        deep = batch.counts() * 1e6
        told = fitting.explain_loss(losses, batch, deep, family, config, "epoch 1, step 1")
        assert "Set cells.max_counts" in told


def test_a_loss_that_is_not_finite_at_once_keeps_nothing(prepared: Prepared, tmp_path: Path) -> None:
    """And says so."""
    with pytest.raises(fitting.LossNotFinite, match="no model was kept"):
        fitting.fit(with_fit(learning_rate=1e30, gradient_clip=None), prepared, tmp_path, show_progress=False)


def test_two_runs_give_the_same_weights(prepared: Prepared, tmp_path: Path) -> None:
    """Nothing but the configuration decides, not even what was drawn before."""
    first = weights(tiny_config(), prepared, tmp_path / "a")
    torch.manual_seed(123)
    np.random.default_rng().random()
    assert weights(tiny_config(), prepared, tmp_path / "b") == first


def test_another_seed_gives_other_weights(prepared: Prepared, tmp_path: Path) -> None:
    """The seed of the configuration is used."""
    assert weights(tiny_config(seed=1), prepared, tmp_path / "a") != weights(tiny_config(), prepared, tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 16},
        {"learning_rate": 1e-2},
        {"weight_decay": 0.5},
        {"gradient_clip": 1e-3},
        {"thinning": 0.5},
        {"gene_dropout": 0.5},
        {"balance": 1.0},
        {"schedule": "one_cycle"},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_fit_has_an_effect(prepared: Prepared, tmp_path: Path, change: dict[str, Any]) -> None:
    """A setting that is accepted is used."""
    base = weights(with_fit(max_epochs=1), prepared, tmp_path / "base")
    assert weights(with_fit(max_epochs=1, **change), prepared, tmp_path / "changed") != base


def test_two_processes_train_like_one(prepared: Prepared, tmp_path: Path) -> None:
    """DDP over two processes of the CPU: the mean of the gradients of half minibatches is that of whole ones.

    The autoencoder has no noise; sums are taken in another order, so the weights agree but for rounding.
    """
    changes = {"max_epochs": 2, "learning_rate": 1e-3}
    one = fitting.fit(
        tiny_config(family="autoencoder", labels=[], fit={**SETTINGS["fit"], **changes}),
        prepared, tmp_path / "one", show_progress=False,
    )  # fmt: skip
    two = fitting.fit(
        tiny_config(family="autoencoder", labels=[], fit={**SETTINGS["fit"], **changes, "n_devices": 2}),
        prepared, tmp_path / "two", show_progress=False,
    )  # fmt: skip
    assert (two.best_epoch, two.n_epochs) == (one.best_epoch, one.n_epochs)
    for name, tensor in one.family.state_dict().items():
        torch.testing.assert_close(two.family.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("configured", "kept"), [(with_fit, {0, 1}), (unvalidated, {1})])
def test_ctrl_c_keeps_the_best_model(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configured: Callable[..., Config],
    kept: set[int],
) -> None:
    """The epoch that is running is finished, and the best epoch so far is returned; the last where none is best."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(fitting, "MetricsLog", InterruptInSecondEpoch)
    fitted = fitting.fit(configured(max_epochs=50), prepared, tmp_path, show_progress=False)
    assert fitted.is_interrupted
    assert fitted.n_epochs == 2
    assert fitted.best_epoch in kept
    assert signal.getsignal(signal.SIGINT) is before


def test_early_stopping_returns_the_best_epoch(prepared: Prepared, tmp_path: Path) -> None:
    """Training stops `patience` epochs after the best one, whose weights are returned."""
    fitted = fitting.fit(
        with_fit(max_epochs=60, patience=1, learning_rate=0.1), prepared, tmp_path, show_progress=False
    )
    assert fitted.n_epochs < 60
    assert fitted.best_epoch == fitted.n_epochs - 2


def test_without_validation_the_last_epoch_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    """All epochs are run, with the weights and the training losses of a fit that looks at validation cells, of which nothing is said."""
    changes: dict[str, Any] = {"max_epochs": 12, "patience": 12, "learning_rate": 0.1}
    fitting.fit(with_fit(**changes), prepared, tmp_path / "validated", show_progress=False)
    last = torch.load(tmp_path / "validated/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    found = fitting.fit(
        unvalidated(max_epochs=12, patience=1, learning_rate=0.1), prepared, tmp_path / "found", show_progress=False
    )
    assert (found.n_epochs, found.best_epoch, found.best_loss) == (12, 11, None)
    assert all(torch.equal(weight, last[f"family.{name}"]) for name, weight in found.family.state_dict().items())
    expected = [
        {key: value for key, value in row.items() if not key.startswith("validation_")}
        for row in log(tmp_path / "validated")
    ]
    assert log(tmp_path / "found") == expected
    assert not (tmp_path / "found/checkpoints/best.ckpt").exists()


def test_validation_cells_that_are_asked_for_must_be_there(prepared: Prepared, tmp_path: Path) -> None:
    """A split of tiny strata gives none, which nobody may take for a decision."""
    bare = dataclasses.replace(prepared, validation=prepared.validation.take(np.arange(0)))
    with pytest.raises(NoTrainingCells, match=r"set split\.validation: 0"):
        fitting.fit(tiny_config(), bare, tmp_path, show_progress=False)


def test_a_run_without_validation_cells_reads_back(whole_run: tuple[run.Run, Path]) -> None:
    """It says that its last epoch was kept, and has no loss to say."""
    made, directory = whole_run
    again = run.load(directory)
    assert len(made.prepared.train) == made.reference.n_obs
    assert again.provenance["best_validation_loss"] is None
    assert again.provenance["best_epoch"] == again.provenance["n_epochs"] - 1 == 2
    assert again.outcome.startswith("last epoch of 3, no validation cells, ")
    assert not len(again.held_out)


def test_cuda_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a device never falls back in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fitting.DeviceUnavailable, match="--device cpu"):
        fitting.choose_accelerator("cuda")
    assert fitting.choose_accelerator("auto") == "cpu"


def test_thinned_counts_are_counts() -> None:
    """Thinning keeps counts whole and never adds any; about the drawn share is kept."""
    torch.manual_seed(0)
    counts = torch.full((200, 50), 20.0)
    thinned = fitting.corrupt(counts, thinning=0.7, gene_dropout=0.0)
    assert torch.equal(thinned, thinned.round())
    assert (thinned <= counts).all()
    assert abs(float(thinned.mean()) / 20 - 0.65) < 0.05


def test_a_run_directory_reads_back(family_run: tuple[run.Run, Path]) -> None:
    """Weights, genes and split come back as they were, and nothing of ours is a pickle."""
    made, directory = family_run
    again = run.load(directory)
    assert again.config == made.config
    assert again.split == made.split
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.family.state_dict().values(), made.family.state_dict().values(), strict=True)
    )
    assert {path.name for path in directory.iterdir()} == {
        "config.yaml", "split.json", "genes.tsv", "weights.npz", "provenance.json", "metrics.csv", "checkpoints",
    }  # fmt: skip


def test_a_run_of_files(tiny_sets: None, tmp_path: Path) -> None:
    """Files train like registered sets: same cells, same weights; the digests of their bytes are kept, and the run reads back."""
    data = []
    for name in SETTINGS["data"]:
        cells = tiny_cells(name)
        cells.obs["CellType"] = cells.obs.pop("cell_type")
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        data.append({"name": name, "path": tmp_path / f"{name}.h5ad", "columns": {"cell_type": "CellType"}})
    made = run.fit(tiny_config(data=data), tmp_path / "run", show_progress=False)
    registered = run.fit(tiny_config(), tmp_path / "registered", show_progress=False)
    assert made.prepared.var.equals(registered.prepared.var)
    assert (tmp_path / "run/weights.npz").read_bytes() == (tmp_path / "registered/weights.npz").read_bytes()
    digest = hashlib.sha256((tmp_path / "tiny_a.h5ad").read_bytes()).hexdigest()
    assert made.provenance["data"]["tiny_a"] == {"tiny_a.h5ad": digest}
    assert run.load(tmp_path / "run").config == made.config


def test_a_run_is_not_overwritten(family_run: tuple[run.Run, Path]) -> None:
    """A second fit into the same directory needs --resume, and the same configuration."""
    made, directory = family_run
    with pytest.raises(run.RunExists, match="--resume"):
        run.fit(made.config, directory)
    with pytest.raises(run.RunExists, match="another configuration"):
        run.fit(made.config.model_copy(update={"seed": 7}), directory, resume=True)


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    """What is missing is named."""
    with pytest.raises(run.NotARun, match=r"weights\.npz"):
        run.load(tmp_path)
