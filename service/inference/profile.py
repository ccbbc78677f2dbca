"""What the reference's own cells look like, as metrics beside those of what is sent, so that a dashboard can compare the two."""

import numpy as np
from numpy.typing import NDArray

from service import metrics
from service.contract.annotation import LabelLevel
from service.contract.manifest import Distribution, Manifest


def column_suffix(manifest: Manifest, level: LabelLevel) -> str:
    """What the columns of a label level are called after `predicted_labels`, `conf_score` and so on; "" for the first."""
    return "" if level is manifest.labels[0] else f"_{level.name}"


def entropy(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shannon's entropy of each row over that of equal probabilities: 0 to 1.

    Args:
        probabilities: shape (n_cells, n_classes), rows with the sum 1.

    Returns:
        Shape (n_cells,); 0 where there is one class only.
    """
    n_classes = probabilities.shape[1]
    if n_classes < 2:
        return np.zeros(len(probabilities), dtype=np.float32)
    # 0 log 0 is 0: at the smallest normal number the product is far below the last bit of any other.
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    bits: NDArray[np.float32] = -np.einsum("ij,ij->i", probabilities, logs) / np.float32(np.log(n_classes))
    return np.clip(bits, 0, 1)


def export_profile(manifest: Manifest) -> None:
    """Set the gauges of the reference, as far as the artifact knows it."""
    profile, names = manifest.profile, (manifest.name, manifest.version)
    if profile is None:
        return
    for quantile, value in _values(profile.library_size):
        metrics.REFERENCE_LIBRARY_SIZE.labels(*names, quantile).set(value)
    for level in manifest.labels:
        suffix, known = column_suffix(manifest, level), profile.labels.get(level.name)
        if known is None:
            continue
        for label, share in known.shares.items():
            metrics.REFERENCE_LABELS.labels(*names, f"predicted_labels{suffix}", label).set(share)
        for quantile, value in _values(known.conf_score):
            metrics.REFERENCE_CONFIDENCE.labels(*names, f"conf_score{suffix}", quantile).set(value)
        for quantile, value in _values(known.entropy):
            metrics.REFERENCE_ENTROPY.labels(*names, f"probabilities{suffix}", quantile).set(value)


def _values(distribution: Distribution) -> list[tuple[str, float]]:
    return [("mean", distribution.mean), *distribution.quantiles.items()]
