"""The training cells that travel with a model: which, where its exported encoder puts them, and how well their votes name other cells."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from service.contract.manifest import Reference, Vote
from service.contract.reference_cells import ReferenceCells, dump_cells
from service.inference import encoding, neighbours
from service.inference.model import Model
from service.inference.nearest import Nearest
from service.inference.session import Session
from training.data.minibatches import Cells
from training.data.prepared import encode_cells
from training.projection import Projector, fit_projection, measure_projection
from training.run import Run

LATENT, CELLS, UMAP = "reference/latent.npy", "reference/cells.tsv", "reference/umap.npy"
MAX_BYTES = 8_000_000
"""Of all files of the reference: graphs, genes and golden cells need the rest of what a version may have."""

_BYTES_OF_NAMES = 60
"""Of a line of the table of cells, about."""

NEIGHBOURS = (5, 15, 30, 50)
"""How many may vote; chosen on validation cells."""

MARGIN = 0.005
"""Macro-F1 by which the vote must be better than the classifier on validation cells to answer in its place. Besides, the cells that it
alone names rightly must outnumber those that the classifier alone does by two standard errors (McNemar 1947)."""


@dataclass(frozen=True)
class ReferenceSpace:
    """What `build` adds to an artifact."""

    manifest: Reference
    contents: dict[str, bytes]
    metrics: dict[str, float] = field(default_factory=dict)
    projector: Projector | None = None


def build(run: Run, sessions: Mapping[str, Session], with_projection: bool = True) -> ReferenceSpace | None:
    """The reference cells of a run, as its exported graphs see them.

    Args:
        run: finished.
        sessions: of its exported graphs, with `encode`.
        with_projection: false to leave out the picture, which takes the most time.

    Returns:
        None where the configuration asks for no cells.
    """
    wanted, train = run.config.export.reference, run.prepared.train
    if not wanted.max_cells:
        return None
    chosen = choose(train.labels, _most(run), run.config.seed)
    cells = train.take(chosen)
    latent = encode(cells, sessions)
    labels = {level.name: cells.labels[:, i].astype(np.int32) for i, level in enumerate(run.config.labels)}
    classes = {level.name: (*level.classes, "") for level in run.config.labels}
    files = {
        CELLS: dump_cells(
            tuple(map(str, cells.names)),
            tuple(run.prepared.batches[code] for code in cells.batch),
            {name: tuple(classes[name][code] for code in codes) for name, codes in labels.items()},
        ),
        LATENT: _npy(latent),
    }
    reference = ReferenceCells(tuple(map(str, cells.names)), cells.batch.astype(np.int32), labels, latent)
    vote = choose_vote(run, reference, sessions) if run.config.labels and len(run.prepared.validation) else None
    metrics: dict[str, float] = {}
    projector = None
    if wanted.project and with_projection and len(latent) >= Projector.MIN_CELLS:
        umap, projector = fit_projection(latent, run.config.seed)
        files[UMAP] = _npy(umap)
        others = np.empty((0, latent.shape[1]), np.float32)
        if len(run.prepared.validation):
            others = encode(run.prepared.validation.take(np.arange(len(run.prepared.validation))), sessions)
        metrics = measure_projection(projector, reference.latent, umap, others, run.config.seed)
    manifest = Reference(
        latent=LATENT,
        cells=CELLS,
        umap=UMAP if projector is not None else None,
        n_cells=len(cells),
        n_training_cells=len(train),
        vote=vote,
    )
    return ReferenceSpace(manifest, files, metrics, projector)


def choose(labels: NDArray[np.int64], n_most: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `n_most` cells, ascending: all of them, or of each class of the first level the same number where it has as many.

    Small classes are kept whole, and cells without a label are a class of their own. Which cells of a large class are kept follows from
    the seed.
    """
    if len(labels) <= n_most:
        return np.arange(len(labels))
    codes = labels[:, 0] if labels.shape[1] else np.zeros(len(labels), dtype=np.int64)
    classes, n_cells = np.unique(codes, return_counts=True)
    kept = np.zeros_like(n_cells)
    left = n_most
    # The smallest class takes what it has, up to an equal share of what is left; so does the next.
    for rank, i in enumerate(np.argsort(n_cells, kind="stable")):
        kept[i] = min(n_cells[i], left // (len(classes) - rank))
        left -= kept[i]
    generator = np.random.default_rng(seed)
    drawn = [
        generator.choice(np.flatnonzero(codes == code), n, replace=False) for code, n in zip(classes, kept, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def encode(cells: Cells, sessions: Mapping[str, Session]) -> NDArray[np.float32]:
    """Latents of cells as they are served, float32 (n_cells, n_latent)."""
    return encoding.encode(sessions, cells.counts)


def choose_vote(run: Run, reference: ReferenceCells, sessions: Mapping[str, Session]) -> Vote | None:
    """How neighbours vote best (lowest Brier score on the validation cells' first level), and by level whether better than the classifier.

    None where no validation cell has a label.
    """
    cells = run.prepared.validation.take(np.arange(len(run.prepared.validation)))
    if not (cells.labels[:, 0] >= 0).any():
        return None
    n_classes = {level.name: len(level.classes) for level in run.config.labels}
    first = run.config.labels[0].name
    latent = encode(cells, sessions)
    numbers = sorted({min(number, len(reference)) for number in NEIGHBOURS})
    found = Nearest(reference).search(latent, numbers[-1])
    ways = [
        Vote(n_neighbours=number, weighting=weighting, answers={})
        for number in numbers
        for weighting in ("uniform", "distance")
    ]
    votes = [neighbours.shares(way, reference.labels, n_classes, *found) for way in ways]
    best = min(range(len(ways)), key=lambda i: _brier(votes[i][first], cells.labels[:, 0]))
    answers = {}
    classified = _classify(cells, latent, sessions) if "classify" in sessions else {}
    for i, level in enumerate(n_classes):
        has_label = cells.labels[:, i] >= 0
        truth = cells.labels[has_label, i]
        answers[level] = "vote"
        if level in classified and len(truth):
            is_better = _is_better(truth, votes[best][level][has_label], classified[level][has_label])
            answers[level] = "vote" if is_better else "classifier"
    return ways[best].model_copy(update={"answers": answers})


def score(run: Run, model: Model, query_sets: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """Accuracy and macro-F1 of the vote on the first label level of cells that were not trained on.

    Args:
        run: that the model was exported from.
        model: as it is served.
        query_sets: positions of labelled cells by name.

    Returns:
        Figures by name; those of `other_batches` leave out, for each cell, the reference cells of its own batch, as a query of an unknown
        batch would have it. Empty for a model without a vote.
    """
    reference = model.manifest.reference
    if reference is None or reference.vote is None or model.reference is None:
        return {}
    held = model.reference.cells
    genes = run.reference.var_names.get_indexer(run.prepared.var.index)
    first = run.config.labels[0].name
    n_classes = {first: len(run.config.labels[0].classes)}
    figures = {}
    truths, elsewhere = [], []
    for name, positions in query_sets.items():
        cells = encode_cells(run.config, run.reference[positions], genes, run.prepared.batches)
        latent, truth = model.encode(cells.counts), cells.labels[:, 0]
        found = _scores(truth, neighbours.vote(model, latent)[first])
        figures |= {f"{metric}_vote_{name}": value for metric, value in found.items()}
        for batch in np.unique(cells.batch):
            others, here = np.flatnonzero(held.batch != batch), cells.batch == batch
            if len(others) >= reference.vote.n_neighbours and batch >= 0:
                part = ReferenceCells(
                    tuple(held.cell_ids[at] for at in others), held.batch[others], {}, held.latent[others]
                )
                nearest = Nearest(part).search(latent[here], reference.vote.n_neighbours)
                labels = {first: held.labels[first][others]}
                elsewhere.append(neighbours.shares(reference.vote, labels, n_classes, *nearest)[first])
                truths.append(truth[here])
    if truths:
        found = _scores(np.concatenate(truths), np.concatenate(elsewhere))
        figures |= {f"{metric}_vote_other_batches": value for metric, value in found.items()}
    return figures


def _most(run: Run) -> int:
    row = 4 * (run.config.hyperparameters.n_latent + 2) + _BYTES_OF_NAMES
    return min(run.config.export.reference.max_cells, MAX_BYTES // row)


def _classify(
    cells: Cells, latent: NDArray[np.float32], sessions: Mapping[str, Session]
) -> dict[str, NDArray[np.float32]]:
    """Probabilities by label level."""
    session = sessions["classify"]
    is_of_latent = session.inputs == ("latent",)
    outputs = session.run({"latent": latent}) if is_of_latent else encoding.run_counts(session, cells.counts)
    return {name.removeprefix("probabilities_"): values for name, values in outputs.items()}


def _brier(shares: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Mean over labelled cells of the squared distance of the shares from the truth (Brier 1950)."""
    known = truth >= 0
    wanted = np.eye(shares.shape[1])[truth[known]]
    return float(np.square(shares[known] - wanted).sum(axis=1).mean())


def _is_better(truth: NDArray[np.int64], vote: NDArray[np.float32], classified: NDArray[np.float32]) -> bool:
    """Whether the vote names cells so much better than the classifier that it should answer."""
    is_right, was_right = vote.argmax(axis=1) == truth, classified.argmax(axis=1) == truth
    gained, lost = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
    margin = _scores(truth, vote)["macro_f1"] - _scores(truth, classified)["macro_f1"]
    return margin > MARGIN and gained - lost > 2.0 * np.sqrt(gained + lost)


def _scores(truth: NDArray[np.int64], probabilities: NDArray[np.float32]) -> dict[str, float]:
    found = probabilities.argmax(axis=1)
    macro_f1 = f1_score(truth, found, average="macro", labels=np.unique(truth), zero_division=0.0)
    return {"accuracy": float(accuracy_score(truth, found)), "macro_f1": float(macro_f1)}


def _npy(array: NDArray[np.float32]) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()
