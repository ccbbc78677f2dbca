"""Fit a family: Lightning runs the epochs; seeds, order and noise are fixed, so that the same run gives the same weights."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from training.config import Config
from training.data.minibatches import Minibatch, Minibatches
from training.data.prepared import NoTrainingCells, Prepared
from training.families import FAMILIES
from training.families.family import Example, Family
from training.progress import MetricsLog, ProgressBar

CHECKPOINTS = "checkpoints"
METRICS = "metrics.csv"
_VALIDATION_EPOCH = 1_000_000
"""The epoch that a validation loss is computed for: all warm-up is over, so that epochs can be compared."""


class DeviceUnavailable(Exception):
    """The device that was asked for is not there."""


@dataclass(frozen=True)
class Fitted:
    """A family with the weights of its best epoch."""

    family: Family
    best_epoch: int
    best_loss: float
    """Validation loss of that epoch."""

    n_epochs: int
    is_interrupted: bool


class Fitting(lightning.LightningModule):
    """How a family meets Lightning, whose signatures hold more than we use (ARG002)."""

    def __init__(self, family: Family, config: Config) -> None:
        super().__init__()
        self.family, self.config = family, config

    def transfer_batch_to_device(self, batch: Minibatch, device: torch.device, dataloader_idx: int) -> Minibatch:  # noqa: ARG002
        """Move cells while they are sparse."""
        return batch.to(device)

    def on_train_epoch_start(self) -> None:
        """Noise depends on the epoch and not on what came before it, so that a resumed run draws the same."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        """All epochs are validated with the same draws."""
        torch.manual_seed(self.config.seed)

    def training_step(self, batch: Minibatch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Loss of one minibatch."""
        target = batch.counts()
        counts = corrupt(target, self.config.fit.thinning, self.config.fit.gene_dropout)
        example = Example(counts, target, batch.batch, batch.labels, self.current_epoch, batch.obsm)
        return self._log("train", self.family.loss(example), len(target))

    def validation_step(self, batch: Minibatch, batch_idx: int) -> None:  # noqa: ARG002
        """Loss of one minibatch of validation cells, uncorrupted."""
        counts = batch.counts()
        example = Example(counts, counts, batch.batch, batch.labels, _VALIDATION_EPOCH, batch.obsm)
        self._log("validation", self.family.loss(example), len(counts))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and the schedule of its learning rate."""
        fit = self.config.fit
        optimizer = torch.optim.AdamW(self.family.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
        if fit.schedule == "constant":
            return {"optimizer": optimizer}
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.learning_rate, total_steps=n_steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _log(self, part: str, losses: dict[str, torch.Tensor], n_cells: int) -> torch.Tensor:
        values = {f"{part}_{name}": value.detach() for name, value in losses.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=n_cells)
        return losses["loss"]


def corrupt(counts: torch.Tensor, thinning: float, gene_dropout: float) -> torch.Tensor:
    """Counts as a shallower experiment with fewer detected genes would have given them.

    Args:
        counts: raw counts (n, n_genes).
        thinning: each cell keeps a share of its counts, drawn from 1 - thinning to 1; each count falls binomially.
        gene_dropout: share of genes set to zero, drawn for each cell.
    """
    if thinning:
        share = 1.0 - thinning * torch.rand(len(counts), 1, device=counts.device)
        counts = torch.binomial(counts, share.expand_as(counts))
    if gene_dropout:
        counts = counts * (torch.rand_like(counts) >= gene_dropout)
    return counts


def build(config: Config, prepared: Prepared) -> Family:
    """The family with its first, random weights; they follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return FAMILIES[config.family](config.hyperparameters, prepared.dimensions, prepared.statistics)


def fit(
    config: Config,
    prepared: Prepared,
    directory: Path,
    resume: bool = False,
    show_progress: bool = True,
    begin: Callable[[Family], None] | None = None,
) -> Fitted:
    """Fit until the validation loss has not improved for `patience` epochs, and return the best epoch's weights.

    Args:
        config: family, hyper-parameters, optimiser.
        prepared: the cells.
        directory: where metrics.csv and checkpoints/ are written.
        resume: go on from the last checkpoint in `directory`, if there is one.
        show_progress: draw the bar.
        begin: gives the random weights others, and may say which are fitted.

    Raises:
        DeviceUnavailable: CUDA is asked for and absent.
        NoTrainingCells: there are no validation cells.
    """
    if not len(prepared.validation):
        raise NoTrainingCells("The split gives no validation cells. A stratum of fewer than three cells is not split.")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below that it advertises
    accelerator = choose_accelerator(config.fit.device)
    family = build(config, prepared)
    if begin is not None:
        begin(family)
    module = Fitting(family, config)
    rows, seed = config.fit.rows, config.seed
    best = ModelCheckpoint(
        directory / CHECKPOINTS, "best", monitor="validation_loss", save_last=True, enable_version_counter=False
    )
    interrupt = _Interrupt()
    bar = [ProgressBar()] if show_progress else []
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=config.fit.precision,
        deterministic=config.fit.deterministic,
        max_epochs=config.fit.max_epochs,
        gradient_clip_val=config.fit.gradient_clip,
        callbacks=[
            best,
            EarlyStopping("validation_loss", patience=config.fit.patience),
            MetricsLog(directory / METRICS),
            interrupt,
            *bar,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    train = Minibatches(prepared.train, rows, seed, lambda: trainer.current_epoch, config.fit.balance)
    last = directory / CHECKPOINTS / "last.ckpt"
    with interrupt, _threads(config.fit.n_threads), warnings.catch_warnings():
        # Lightning 2.6 looks at the leaves of torch's trees in a way that torch 2.13 has deprecated.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        if resume:
            warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty", UserWarning)
        trainer.fit(
            module,
            train,
            Minibatches(prepared.validation, rows, seed),
            ckpt_path=last if resume and last.exists() else None,
            weights_only=True,
        )
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    return Fitted(
        family=module.family.cpu().eval(),
        best_epoch=int(checkpoint["epoch"]),
        best_loss=float(best.best_model_score),
        n_epochs=trainer.current_epoch,
        is_interrupted=interrupt.is_asked,
    )


def choose_accelerator(device: str) -> str:
    """Lightning's name for `device`; "auto" is CUDA where it works, else the CPU.

    Raises:
        DeviceUnavailable: CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(
            "Device 'cuda' was asked for, but torch finds none. Use --device cpu, or install torch for CUDA."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Must stand in the environment before cuBLAS starts; deterministic algorithms on CUDA need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Interrupt(lightning.Callback):
    """Ctrl-C ends the fit after the epoch that is running, so that the best model is kept; a second Ctrl-C ends it at once."""

    is_asked = False

    def __enter__(self) -> None:
        # Python delivers signals to the main thread only.
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.is_asked = True
        signal.signal(signal.SIGINT, self._previous)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        if self.is_asked:
            trainer.should_stop = True
