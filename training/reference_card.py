"""What the model card says of the reference cells that travel with a model."""

from service.contract.manifest import Manifest
from training.reference_space import MARGIN


def write(manifest: Manifest) -> list[str]:
    """Sections of Markdown; none for a model without reference cells."""
    reference = manifest.reference
    if reference is None:
        return []
    all_or_some = (
        "all that it was trained on"
        if reference.n_cells == reference.n_training_cells
        else f"drawn from the {reference.n_training_cells:,} that it was trained on, small classes whole and of large ones equally many"
    )
    lines = [
        f"## Reference cells\n\n{reference.n_cells:,} cells travel with the model, {all_or_some}: `map` names the nearest of them "
        f"({reference.metric} distance in latent space, {reference.index} search), and GET /v1/models/{manifest.name}/reference lists them."
    ]
    if reference.vote is not None:
        how = "by distance" if reference.vote.weighting == "distance" else "equally"
        lines.append(
            f"Of each cell the nearest {reference.vote.n_neighbours} vote, weighted {how}, as did best on the validation cells. `annotate` "
            f"answers with the classifier unless the vote beat it there by more than {MARGIN:g} in macro-F1 and by two standard errors: "
            + "; ".join(f"`{level}`: the {answer}" for level, answer in reference.vote.answers.items())
            + ". Figures of both on test cells are below; `other_batches` are votes without the reference cells of the query's own batch."
        )
    if reference.umap is not None:
        figures = manifest.metrics
        lines.append(
            "`project` puts cells on the reference's UMAP. "
            + " ".join(
                f"Of {name}: trustworthiness {figures[f'umap_trustworthiness_{key}']:.3f}, median distance from the middle of their 15 "
                f"nearest reference cells {figures[f'umap_distance_{key}']:.3f} of the picture's radius."
                for key, name in (
                    ("reference", "reference cells"),
                    ("held_out", "validation cells, through the network"),
                )
                if f"umap_distance_{key}" in figures
            )
            + " Distances between groups on such a picture mean little; neighbours are those of the latent space."
        )
    return ["\n\n".join(lines)]
