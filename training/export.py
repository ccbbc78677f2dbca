"""Write a run as an artifact, after the code that will serve it has proved it."""

import tempfile
from pathlib import Path

from service.contract import artifact
from service.contract.store import DEFAULT, ModelId, Store
from service.errors import VersionExists
from service.inference import model as serving
from service.inference.session import Runtime
from training import card, card_page, reference_space
from training.evaluation.annotation import query_sets, score_within
from training.held_out import measure
from training.manifest import build
from training.onnx_graph import Precision
from training.profile import profile
from training.quantise import variant_name
from training.run import Run

MAX_BYTES = 15_000_000
"""Of a whole version; a repository and an image carry it."""


class ArtifactTooLarge(Exception):
    """The files of a version are larger than is allowed."""


def export(
    run: Run, root: Path, version: str | None = None, alias: str | None = None, precision: Precision = "float32"
) -> Path:
    """Write a run into the store.

    Args:
        run: a finished run.
        root: the models_store.
        version: its name; None for the next integer.
        alias: to point to this version afterwards. The first version becomes `default` in any case.
        precision: of the encoder's first layer. int8 gives another model, `<name>-int8`.

    Returns:
        The version directory.

    Raises:
        OutsideTolerance: ONNX Runtime and torch in float64 disagree on held-out cells.
        NothingToQuantise: int8 is wanted of an encoder without a layer.
        ArtifactTooLarge: more than 15 MB.
        VersionExists: the version is there already.
    """
    store = Store(root)
    name = variant_name(run.config.name, precision)
    version = version or next_version(store, name)
    if (path := store.path(ModelId(name, version))).exists():  # said before minutes of work
        raise VersionExists(path=str(path))
    with tempfile.TemporaryDirectory() as scratch:
        # Proved elsewhere first, so that a failure leaves nothing in the store.
        manifest, contents = build(run, version, precision)
        staged = artifact.write(Path(scratch), manifest, contents)
        served = serving.load(artifact.read(staged), Runtime())
        metrics = {**manifest.metrics, **score_within(run, served)}
        if run.config.labels:
            metrics |= reference_space.score(run, served, query_sets(run))
        reference = profile(run, served)
        held_out = measure(run, served)
    text = card.write(manifest.model_copy(update={"metrics": metrics}), run, held_out)
    contents |= {artifact.CARD: text.encode(), artifact.PAGE: card_page.write(text, held_out).encode()}
    manifest = manifest.model_copy(
        update={"profile": reference, "metrics": metrics, "files": artifact.describe(contents)}
    )
    n_bytes = sum(len(content) for content in contents.values())
    if n_bytes > MAX_BYTES:
        raise ArtifactTooLarge(
            f"{name}@{version} has {n_bytes:,} bytes, {MAX_BYTES:,} are allowed. Take fewer genes or units."
        )
    is_first = not store.versions(name)
    path = artifact.write(root, manifest, contents)
    for wanted in dict.fromkeys(([DEFAULT] if is_first else []) + ([alias] if alias else [])):
        store.set_alias(ModelId(name, version), wanted)
    return path


def next_version(store: Store, name: str) -> str:
    """One more than the largest integer version."""
    return str(1 + max((int(version) for version in store.versions(name) if version.isdigit()), default=0))
