"""What the model card says of calibration, prediction sets and unknown cells."""

from collections.abc import Iterable, Sequence

from service.contract.annotation import Conformal, LevelCalibration, UnknownDetection
from service.contract.manifest import Manifest

_METHODS = {
    "none": "The network's own probabilities were the best",
    "temperature": "All logarithmic probabilities were multiplied by one number",
    "vector": "The logarithmic probability of each class was multiplied by a number and shifted",
    "dirichlet": "Logarithmic probabilities were mixed by a matrix and shifted",
}


def sections(manifest: Manifest) -> list[str]:
    """Parts of the card, in Markdown; none for a model without labels."""
    found = [_calibration(name, level) for name, level in manifest.calibration.items()]
    if manifest.labels and not found:
        found.append(
            "## Calibration\n\nProbabilities are as the network gives them: `python -m training calibrate` was not run."
        )
    if manifest.conformal is not None:
        found.append(
            _conformal(manifest.conformal, next((level.n_folds for level in manifest.calibration.values()), None))
        )
    if manifest.unknown is not None:
        found.append(_unknown(manifest.unknown))
    return found


def _calibration(name: str, level: LevelCalibration) -> str:
    figures = [
        (what, f"{one.log_loss:.4f}", f"{one.expected_calibration_error:.4f}")
        for what, one in (("of the network", level.before), ("as served", level.after))
    ]
    bins = [(f"{one.n_cells:,}", f"{one.confidence:.3f}", f"{one.accuracy:.3f}") for one in level.after.bins]
    tried = ", ".join(f"{method} {loss:.4f}" for method, loss in level.candidates.items())
    among = " among the children of the true parent" if _is_conditional(level) else ""
    judged = "which the network's weights were not fitted on"
    if level.n_folds is not None:
        judged = (
            f"each judged by one of {level.n_folds} networks that was trained without its fold, and made as sure as this model's is of cells "
            "that both have met; this one was trained on more of them, so that the figures are of networks nearly like it"
        )
    return (
        f"## Calibration: {name}\n\n{_METHODS[level.method]} (`{level.method}`), fitted on {level.n_cells:,} {level.cells} cells, {judged}. "
        f"Log-loss{among} of what was tried: {tried}. Figures are cross-validated.\n\n"
        + _table(("probabilities", "log-loss", "expected calibration error"), figures)
        + "\n\nConfidence of the predicted class against how often it was right:\n\n"
        + _table(("cells", "mean confidence", "accuracy"), bins)
    )


def _is_conditional(level: LevelCalibration) -> bool:
    # On a level with a parent the methods are compared by the class's share of its parent, and the figures are of the whole.
    return abs(level.candidates[level.method] - level.after.log_loss) > 1e-9


def _conformal(conformal: Conformal, n_folds: int | None) -> str:
    rows = [
        (one.level, f"{one.asked:.0%}", f"{one.coverage:.3f}", f"{one.mean_size:.2f}")
        for one in conformal.sizes
        if one.score == conformal.score
    ]
    others = "; ".join(
        f"{one.score} {one.mean_size:.2f} for {one.level}"
        for one in conformal.sizes
        if one.score != conformal.score and one.asked == max(size.asked for size in conformal.sizes)
    )
    kind = "Split conformal"
    if n_folds is not None:
        kind = f"Cross-conformal in {n_folds} folds, with a network that was trained on all of them"
    return (
        f"## Prediction sets\n\n{kind}; a class with at least {conformal.min_class} calibration cells has a quantile of its "
        "own. Cross-validated coverage and size:\n\n"
        + _table(("level", "asked", "coverage", "mean size"), rows)
        + f"\n\nOther scores give larger sets at the highest coverage: {others}."
    )


def _unknown(unknown: UnknownDetection) -> str:
    names = sorted(unknown.mean_auroc, key=lambda name: -unknown.mean_auroc[name])
    rows = [
        (one.name, f"{one.n_unknown:,}", *(f"{one.auroc[name]:.3f}" for name in names), f"{one.detected:.0%}")
        for one in unknown.left_out
    ]
    rows.append(("mean", "", *(f"{unknown.mean_auroc[name]:.3f}" for name in names), ""))
    judged = ""
    if unknown.n_folds is not None:
        judged = f", each judged by one of {unknown.n_folds} networks that was trained without its fold"
    return (
        f"## Unknown cells\n\n`mapping_score` is `{unknown.score}` as a share of {unknown.n_cells:,} {unknown.cells} cells{judged}; below "
        f"{unknown.threshold:g} a cell is `Unknown`, as about that share of cells of the reference is. AUROC of telling cells of a type from "
        f"all others, by networks that never met that type (trained for {unknown.share_of_epochs:.0%} of the epochs), for each score that was "
        "tried:\n\n" + _table((unknown.level, "cells", *names, "detected"), rows)
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
