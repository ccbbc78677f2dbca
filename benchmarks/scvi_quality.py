"""The scvi-tools side of quality.py; runs in an environment of its own (requirements/benchmark.txt) and knows nothing of this project.

Arguments: cells.h5ad answers.npz mode seed n_threads. `obs` has batch, label and part ("reference" or "query"). Modes:

    scarches    SCVI and SCANVI on the reference, then SCANVI.load_query_data on the query: the settings of scvi-tools' own tutorial
    soft        the probability of every class: arrays `probabilities` (n_query, n_classes) and `classes`. The query is mapped as above where it
                brings a batch of its own, and predicted as it is elsewhere
    joint       SCVI on all cells; SCANVI from it with the query's labels hidden, and SCANVI from it with all labels

Every model is trained for the epochs that scvi-tools chooses, SCVI with its early stopping. Answers: arrays (n_cells, n_latent) called
SCVI and SCANVI, and predicted labels (n_query,) called labels, or labels/<task> in joint mode, where obs["part_<task>"] says which cells
are whose.
"""

import logging
import sys
import time
import warnings

import anndata as ad
import numpy as np
import scvi

HIDDEN = "Unknown"
SCARCHES = {
    "use_layer_norm": "both",
    "use_batch_norm": "none",
    "encode_covariates": True,
    "dropout_rate": 0.2,
    "n_layers": 2,
}
QUIET = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}


def supervised(model: scvi.model.SCVI, adata: ad.AnnData, labels: str) -> scvi.model.SCANVI:
    """SCANVI that goes on from SCVI, as the tutorials train it."""
    made = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category=HIDDEN, adata=adata, labels_key=labels)
    made.train(max_epochs=20, n_samples_per_label=100, **QUIET)
    return made


def divided(adata: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
    """Reference, and query without its labels."""
    reference, query = (adata[adata.obs["part"] == part].copy() for part in ("reference", "query"))
    query.obs["label"] = HIDDEN
    return reference, query


def learned(reference: ad.AnnData) -> scvi.model.SCANVI:
    """A model of the reference that a query can be mapped onto."""
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch")
    base = scvi.model.SCVI(reference, **SCARCHES)
    base.train(early_stopping=True, **QUIET)
    return supervised(base, reference, "label")


def mapped(query: ad.AnnData, model: scvi.model.SCANVI) -> scvi.model.SCANVI:
    """The query mapped onto a model of the reference."""
    found = scvi.model.SCANVI.load_query_data(query, model)
    found.train(max_epochs=100, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    return found


def scarches(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """Labels of the query."""
    reference, query = divided(adata)
    return {"labels": mapped(query, learned(reference)).predict().astype(str)}


def soft(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """Probabilities of the query's classes."""
    reference, query = divided(adata)
    model = learned(reference)
    if set(query.obs["batch"]) <= set(reference.obs["batch"]):
        found = model.predict(query, soft=True)
    else:
        found = mapped(query, model).predict(soft=True)
    return {"probabilities": found.to_numpy(), "classes": found.columns.to_numpy().astype(str)}


def joint(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """One SCVI of all cells, and what SCANVI makes of it when labels are hidden, task by task."""
    adata.obs["known"] = adata.obs["label"].astype(str)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    base = scvi.model.SCVI(adata)
    base.train(early_stopping=True, **QUIET)
    answers = {"SCVI": base.get_latent_representation()}
    answers["SCANVI"] = supervised(base, adata, "known").get_latent_representation()
    for column in [name for name in adata.obs if name.startswith("part_")]:
        kept = adata[(adata.obs[column] != "unused").to_numpy()].copy()
        kept.obs["shown"] = np.where(kept.obs[column] == "query", HIDDEN, kept.obs["label"].astype(str))
        found = supervised(base, kept, "shown").predict()
        answers[f"labels/{column.removeprefix('part_')}"] = found[(kept.obs[column] == "query").to_numpy()].astype(str)
    return answers


def main(path: str, output: str, mode: str, seed: str, n_threads: str) -> None:
    """Train and write."""
    started = time.perf_counter()
    scvi.settings.num_threads = int(n_threads)
    scvi.settings.seed = int(seed)
    np.savez(output, **{"scarches": scarches, "soft": soft, "joint": joint}[mode](ad.read_h5ad(path)))
    print(f"{mode} {seed}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    main(*sys.argv[1:])
