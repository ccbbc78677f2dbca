"""The card of an imported scvi-tools model, from its manifest and file."""

from service.contract.manifest import Manifest
from training.importers.scvi_file import SavedScvi
from training.importers.scvi_network import AVERAGE, BatchChoice


def write(manifest: Manifest, saved: SavedScvi, choice: BatchChoice) -> str:
    """README.md of the artifact."""
    genes, provenance = manifest.genes, manifest.provenance
    batch = {
        None: "The encoder knows no batches: a new cell is embedded without training, as after scArches' surgery.",
        AVERAGE: "The encoder was trained with batches. New cells are encoded with the mean of the codes of all of them.",
    }.get(
        choice.encoder_batch,
        f"The encoder was trained with batches. New cells are encoded as those of '{choice.encoder_batch}'.",
    )
    covariates = "".join(f" `{key}` is taken for '{value}'." for key, value in choice.covariates.items())
    asked = {name: value for name, value in manifest.metrics.items() if name.startswith("scvi_tools_")}
    rows = [
        f"| {name} | {d.absolute:.2e} | {d.relative:.2e} | {d.tolerance:.2e} |"
        for name, d in manifest.parity.outputs.items()
    ]
    sections = [
        f"# {manifest.id}\n\n{manifest.summary or f'A {saved.kind} of scvi-tools.'}",
        f"- {saved.kind} saved by scvi-tools {saved.version}, {manifest.n_latent} latent units, trained on {saved.n_cells:,} cells\n"
        f"- Input: raw counts of {genes.n_genes:,} genes ({genes.id_type} ids, {genes.species}); at least "
        f"{genes.min_gene_overlap:.0%} of them must be present\n"
        f"- Graphs: {', '.join(f'`{name}`' for name in manifest.graphs)}\n"
        f"- Licence of the weights: {manifest.licence}",
        f"## Batches\n\n{batch}{covariates} The decoder knows {len(saved.batches)} batches of `{saved.batch_key}`; what is "
        "reconstructed is scvi-tools' `px_rate`, the mean before zero inflation.",
    ]
    if saved.labels:
        sections.append(
            f"## Labels\n\nOf `{saved.labels_key}`: {', '.join(saved.labels)}. The probabilities are those of the posterior's mean, "
            "as `predict(soft=True)` gives them. Models from before scvi-tools 1.1 were trained on probabilities in the place of "
            "logits and are badly calibrated."
        )
    if manifest.graphs["encode"].precision == "int8":
        sections.append(
            "## Precision\n\nThe encoder's first layer is multiplied in 8 bits, so embeddings and labels differ from scvi-tools'; by how much "
            "is said in the last table below."
        )
    sections.append(
        "## Served against scvi-tools\n\n"
        + (
            "Largest differences from scvi-tools itself, both in float32 (of expression: as a share of its largest value):\n\n"
            + "\n".join(
                f"- {name.removeprefix('scvi_tools_').removesuffix('_difference')}: {value:.2e}"
                for name, value in asked.items()
            )
            if asked
            else "scvi-tools was not asked when this was imported (`--scvi-python`)."
        )
        + f"\n\nLargest differences between ONNX Runtime (float32) and torch (float64) over {manifest.parity.n_cells} cells:\n\n"
        + "\n".join(("| output | absolute | relative | allowed |", "| --- | --- | --- | --- |", *rows))
    )
    sections.append(
        f"## Made by\n\n`{provenance.command}` at commit `{provenance.code_commit}`, from "
        + ", ".join(
            f"`{name}` (sha256 `{digest[:12]}…`)" for data in provenance.data for name, digest in data.sha256.items()
        )
        + "."
    )
    return "\n\n".join(sections) + "\n"
