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

from training import loggers
from training.config import Config
from training.data.minibatches import Cells, DeviceCells, Minibatch, Minibatches
from training.data.prepared import NoTrainingCells, Prepared
from training.families import FAMILIES
from training.families.family import Example, Family
from training.progress import MetricsLog, ProgressBar

CHECKPOINTS = "checkpoints"
BEST, LAST = "best", "last"
METRICS = "metrics.csv"
VALIDATION_EPOCH = 1_000_000
"""The epoch that a validation loss is computed for: all warm-up is over, so that epochs can be compared."""

LARGE_LIBRARY = 1_000_000
"""Counts of a cell beyond which it is named as the likely cause of a loss that is not finite."""


class DeviceUnavailable(Exception):
    """The device that was asked for is not there."""


class LossNotFinite(Exception):
    """Training was stopped at a loss that is NaN or infinite; `fitted` is the best model before, None in the first epoch."""

    fitted: "Fitted | None" = None


@dataclass(frozen=True)
class Fitted:
    """A family with the weights of its best epoch, or of its last where no validation cells tell which is best."""

    family: Family
    best_epoch: int
    best_loss: float | None
    """Validation loss of that epoch; None without validation cells."""

    n_epochs: int
    is_interrupted: bool


class Fitting(lightning.LightningModule):
    """How a family meets Lightning, whose signatures hold more than we use (ARG002)."""

    def __init__(self, family: Family, config: Config) -> None:
        super().__init__()
        self.family, self.config = family, config
        self._sums: dict[str, torch.Tensor] = {}
        self._n_cells = 0

    def transfer_batch_to_device(self, batch: Minibatch, device: torch.device, dataloader_idx: int) -> Minibatch:  # noqa: ARG002
        """Move cells while they are sparse."""
        return batch.to(device)

    def on_train_epoch_start(self) -> None:
        """Noise depends on the epoch and not on what came before it, so that a resumed run draws the same."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)
        self._sums, self._n_cells = {}, 0

    def on_train_batch_end(self, outputs: Any, batch: Minibatch, batch_idx: int) -> None:  # noqa: ARG002
        """Give the means to the callbacks where no validation does it. At the end of the epoch Lightning asks the callbacks first."""
        if self.trainer.is_last_batch and not self.config.split.validation:
            self._publish("train")

    def on_validation_epoch_start(self) -> None:
        """All epochs are validated with the same draws."""
        self._publish("train")
        torch.manual_seed(self.config.seed)

    def on_validation_epoch_end(self) -> None:
        """Give the means to the callbacks."""
        self._publish("validation")

    def training_step(self, batch: Minibatch, batch_idx: int) -> torch.Tensor:
        """Loss of one minibatch."""
        target = batch.counts()
        counts = corrupt(target, self.config.fit.thinning, self.config.fit.gene_dropout)
        example = Example(counts, target, batch.batch, batch.labels, self.current_epoch, batch.obsm)
        losses = self.family.loss(example)
        if not bool(torch.isfinite(losses["loss"])):
            place = f"epoch {self.current_epoch + 1}, step {batch_idx + 1} (step {self.global_step + 1} of all)"
            raise LossNotFinite(explain_loss(losses, batch, target, self.family, self.config, place))
        return self._add(losses, len(target))

    def validation_step(self, batch: Minibatch, batch_idx: int) -> None:
        """Loss of one minibatch of validation cells, uncorrupted."""
        counts = batch.counts()
        example = Example(counts, counts, batch.batch, batch.labels, VALIDATION_EPOCH, batch.obsm)
        losses = self.family.loss(example)
        if not bool(torch.isfinite(losses["loss"])):
            place = f"epoch {self.current_epoch + 1}, validation step {batch_idx + 1}"
            raise LossNotFinite(explain_loss(losses, batch, counts, self.family, self.config, place))
        self._add(losses, len(counts))

    @property
    def parts(self) -> dict[str, float]:
        """Means of the loss and its parts over the cells of this epoch so far; reading them waits for the device."""
        return {name: float(total) / self._n_cells for name, total in self._sums.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and the schedule of its learning rate."""
        fit = self.config.fit
        optimizer = torch.optim.AdamW(self.family.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
        if fit.schedule == "constant":
            return {"optimizer": optimizer}
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.learning_rate, total_steps=n_steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _add(self, losses: dict[str, torch.Tensor], n_cells: int) -> torch.Tensor:
        # Summed here and not by `log`, which costs some milliseconds a step.
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * n_cells
        self._n_cells += n_cells
        return losses["loss"]

    def _publish(self, part: str) -> None:
        means = {f"{part}_{name}": total / self._n_cells for name, total in self._sums.items()}
        self._sums, self._n_cells = {}, 0
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=1, sync_dist=self.trainer.world_size > 1)


def explain_loss(
    losses: dict[str, torch.Tensor],
    batch: Minibatch,
    target: torch.Tensor,
    family: Family,
    config: Config,
    place: str,
) -> str:
    """What is known about a loss that is not finite: where, in which part, for which cells, and the likeliest cause.

    Args:
        losses: of the step, by name.
        batch: its cells.
        target: their counts.
        family: as it was before the step.
        config: of the run.
        place: epoch and step.
    """
    parts = [name for name, value in losses.items() if name != "loss" and not bool(torch.isfinite(value))]
    spoiled = [name for name, weight in family.named_parameters() if not bool(torch.isfinite(weight).all())]
    library = target.sum(dim=1)
    names = list(batch.names) if batch.names is not None else []
    if not bool(torch.isfinite(target).all()):
        cause = "counts that are not finite"
    elif spoiled:
        cause = (
            f"the weights were not finite before this step ({spoiled[0]}): the step before was too large. Lower fit.learning_rate "
            f"({config.fit.learning_rate:g}), or set a smaller fit.gradient_clip ({config.fit.gradient_clip})"
        )
    elif "16" in config.fit.precision:
        cause = f"precision {config.fit.precision} holds no larger numbers. Train with fit.precision=32-true"
    elif float(library.max()) > LARGE_LIBRARY:
        largest = int(library.argmax())
        cell = f"'{names[largest]}'" if names else f"number {largest}"
        cause = f"the cell {cell} with {float(library[largest]):,.0f} counts. Set cells.max_counts"
    else:
        cause = f"a learning rate that is too high ({config.fit.learning_rate:g}). Lower fit.learning_rate"
    cells = f"'{names[0]}', '{names[1]}', … ({len(names)} cells)" if len(names) > 1 else f"{len(target)} cells"
    return (
        f"The loss is {float(losses['loss'].detach())} at {place}{', in ' + ' and '.join(parts) if parts else ''}. Minibatch: {cells}, "
        f"{float(library.min()):,.0f} to {float(library.max()):,.0f} counts per cell. Likely cause: {cause}."
    )


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

    With `split.validation: 0` nothing tells which epoch is best: all `max_epochs` are run, and the last epoch's weights are returned.

    Args:
        config: family, hyper-parameters, optimiser.
        prepared: the cells.
        directory: where metrics.csv and checkpoints/ are written.
        resume: go on from the last checkpoint in `directory`, if there is one.
        show_progress: draw the bar.
        begin: gives the random weights others, and may say which are fitted.

    Raises:
        DeviceUnavailable: CUDA is asked for and absent.
        NoTrainingCells: validation cells are asked for, and there are none.
        LossNotFinite: with the step, the cells and a likely cause; the best model so far is with it.
    """
    is_validated = bool(config.split.validation)
    if is_validated and not len(prepared.validation):
        raise NoTrainingCells(
            "The split gives no validation cells. A stratum of fewer than three cells is not split. To train on all cells and keep the last "
            "epoch, set split.validation: 0."
        )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below that it advertises
    accelerator = choose_accelerator(config.fit.device)
    family = build(config, prepared)
    if begin is not None:
        begin(family)
    module = Fitting(family, config)
    rows, seed = config.fit.rows, config.seed
    folder = directory / CHECKPOINTS
    watching: list[lightning.Callback] = []
    if is_validated:
        watching = [
            ModelCheckpoint(folder, BEST, monitor="validation_loss", enable_version_counter=False),
            Patience("validation_loss", patience=config.fit.patience, check_finite=False),
        ]
    # One of its own: `save_last` of the one above writes only when the best is written, and a kill would lose more epochs.
    latest = ModelCheckpoint(folder, LAST, enable_version_counter=False)
    interrupt = _Interrupt()
    bar = [ProgressBar(is_validated)] if show_progress else []
    last = folder / f"{LAST}.ckpt"
    is_resumed = resume and last.exists()
    first_step = int(torch.load(last, map_location="cpu", weights_only=True)["global_step"]) if is_resumed else 0
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=config.fit.n_devices,
        # Processes are spawned, so that this one goes on with the result and the command is not run again in each.
        strategy="ddp_spawn" if config.fit.n_devices > 1 else "auto",
        use_distributed_sampler=False,
        precision=config.fit.precision,
        deterministic=config.fit.deterministic,
        max_epochs=config.fit.max_epochs,
        gradient_clip_val=config.fit.gradient_clip,
        callbacks=[
            *watching,
            latest,
            MetricsLog(directory / METRICS),
            interrupt,
            *bar,
        ],
        logger=loggers.build(config, directory, is_resumed, first_step) or False,
        log_every_n_steps=1,  # losses are logged by epoch; Lightning warns of a number beyond the steps of one
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    progress = _Progress(trainer)
    share = progress.share if config.fit.n_devices > 1 else None
    device = torch.device("cuda") if accelerator == "cuda" and has_room(config, prepared) else None
    train = Minibatches(prepared.train, rows, seed, progress.epoch, config.fit.balance, device, share)
    validation = Minibatches(prepared.validation, rows, seed, device=device, share=share) if is_validated else None
    with interrupt, _threads(config.fit.n_threads), warnings.catch_warnings():
        # Lightning 2.6 looks at the leaves of torch's trees in a way that torch 2.13 has deprecated.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        # It takes a step for validation without cells for an oversight.
        warnings.filterwarnings("ignore", r"You defined a `validation_step` but have no `val_dataloader`", UserWarning)
        if resume:
            warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty", UserWarning)
        try:
            trainer.fit(
                module,
                train,
                validation,
                ckpt_path=last if is_resumed else None,
                weights_only=True,
            )
        except LossNotFinite as error:
            if not last.exists():
                raise LossNotFinite(f"{error} It is the first epoch, so no model was kept.") from None
            error.fitted = _kept(module, prepared, directory, is_interrupted=True)
            error.args = (f"{error} The model of epoch {error.fitted.best_epoch + 1} was kept.",)
            raise
    return _kept(module, prepared, directory, interrupt.is_asked)


def _kept(module: Fitting, prepared: Prepared, directory: Path, is_interrupted: bool) -> Fitted:
    """The family with the weights of the best epoch, or of the last where none is best, from its checkpoint."""
    # From the files and not from the trainer, which knows nothing where other processes did the work.
    last = torch.load(directory / CHECKPOINTS / f"{LAST}.ckpt", map_location="cpu", weights_only=True)
    checkpoint, best_loss = last, None
    if module.config.split.validation:
        checkpoint = torch.load(directory / CHECKPOINTS / f"{BEST}.ckpt", map_location="cpu", weights_only=True)
        states = checkpoint["callbacks"].values()
        state = next(state for state in states if state.get("monitor") and "best_model_score" in state)
        best_loss = float(state["best_model_score"])
    module.load_state_dict(checkpoint["state_dict"])
    family = module.family.cpu().eval()
    family.conclude(_examples(module.config, prepared.train))
    return Fitted(
        family=family,
        best_epoch=int(checkpoint["epoch"]),
        best_loss=best_loss,
        n_epochs=int(last["epoch"]) + 1,
        is_interrupted=is_interrupted,
    )


def _examples(config: Config, cells: Cells) -> Iterator[Example]:
    """The cells in their own order, uncorrupted, in the minibatches of a fit."""
    for batch in Minibatches(cells, config.fit.rows, config.seed):
        counts = batch.counts()
        yield Example(counts, counts, batch.batch, batch.labels, VALIDATION_EPOCH, batch.obsm)


class Patience(EarlyStopping):
    """Early stopping that a resumed run remembers: Lightning trains one epoch more when the stop had been decided."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        """Stop at once if the checkpoint was taken when patience was over."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


@dataclass(frozen=True)
class _Progress:
    """What a loader of minibatches asks the trainer; an object and not a closure, so that it can be sent to other processes."""

    trainer: lightning.Trainer

    def epoch(self) -> int:
        """Number of the epoch that runs."""
        return self.trainer.current_epoch

    def share(self) -> tuple[int, int]:
        """Number of this process, and of all."""
        return self.trainer.global_rank, self.trainer.world_size


def has_room(config: Config, prepared: Prepared) -> bool:
    """Whether the counts may lie on the GPU: they are in memory, one process uses them, and they take at most half of what is free."""
    cells = (prepared.train, prepared.validation)
    if not config.fit.counts_on_device or config.fit.n_devices > 1 or not all(isinstance(c, Cells) for c in cells):
        return False
    n_free, _ = torch.cuda.mem_get_info()
    return sum(DeviceCells.n_bytes(one) for one in cells) <= n_free // 2


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
    before, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(n_threads)
    # With deterministic algorithms torch would write NaN into every tensor before its values are computed.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


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
