"""Train and save small models with scvi-tools: `python save_with_scvi.py FOLDER`, run by an interpreter that has it (make bench).

Each becomes <FOLDER>/<name>/model.pt. Imports nothing of this project.
"""

import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

warnings.filterwarnings("ignore")
N_CELLS, N_GENES = 160, 40
SCVI: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "default": ({}, {}),
    "covariates": (
        {"n_layers": 2, "encode_covariates": True, "use_layer_norm": "both", "use_batch_norm": "none"},
        {"categorical_covariate_keys": ["donor"]},
    ),
    "first_layer_only": ({"n_layers": 2, "encode_covariates": True, "deeply_inject_covariates": False}, {}),
    "embedding": ({"batch_representation": "embedding", "encode_covariates": True, "gene_likelihood": "nb"}, {}),
    "one_batch": (
        {"gene_likelihood": "poisson", "dispersion": "gene-cell", "use_batch_norm": "decoder"},
        {"batch_key": None},
    ),
    "raw_input": ({"log_variational": False, "dispersion": "gene-batch", "use_layer_norm": "encoder"}, {}),
    "library_encoder": ({"use_observed_lib_size": False}, {}),
    "logistic_normal": ({"latent_distribution": "ln"}, {}),
    "normal": ({"gene_likelihood": "normal"}, {}),
    "size_factor": ({}, {"size_factor_key": "size"}),
    "continuous": ({}, {"continuous_covariate_keys": ["size"]}),
}
"""Arguments of the model, and of setup_anndata, by name."""

SCANVI: dict[str, dict[str, object]] = {"scanvi": {}, "scanvi_linear": {"linear_classifier": True}}


def cells() -> ad.AnnData:
    """Poisson cells of three types in three batches."""
    generator = np.random.default_rng(0)
    kind, batch = generator.integers(3, size=N_CELLS), generator.integers(3, size=N_CELLS)
    mean = generator.gamma(1.0, 1.0, N_GENES) * np.where(np.arange(N_GENES) % 3 == kind[:, None], 5.0, 1.0)
    obs = pd.DataFrame(
        {
            "batch": [f"plate{b}" for b in batch],
            "donor": [f"donor{d}" for d in generator.integers(2, size=N_CELLS)],
            "kind": np.where(generator.random(N_CELLS) < 0.2, "Unknown", [("T", "B", "NK")[k] for k in kind]),
            "size": 0.5 + generator.random(N_CELLS),
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    return ad.AnnData(sp.csr_matrix(generator.poisson(mean).astype(np.float32)), obs=obs, var=var)


def main(folder: Path) -> None:
    """Save every model."""
    import scvi

    scvi.settings.verbosity = 40
    for name, (model, setup) in SCVI.items():
        scvi.settings.seed = 0
        data = cells()
        scvi.model.SCVI.setup_anndata(data, **{"batch_key": "batch", **setup})
        made = scvi.model.SCVI(data, n_hidden=16, n_latent=4, **model)
        made.train(2, accelerator="cpu", enable_progress_bar=False, logger=False, batch_size=64)
        made.save(str(folder / name), overwrite=True)
    for name, model in SCANVI.items():
        scvi.settings.seed = 0
        data = cells()
        scvi.model.SCANVI.setup_anndata(data, labels_key="kind", unlabeled_category="Unknown", batch_key="batch")
        made = scvi.model.SCANVI(data, n_hidden=16, n_latent=4, **model)
        made.train(2, accelerator="cpu", enable_progress_bar=False, logger=False, batch_size=64)
        made.save(str(folder / name), overwrite=True, save_anndata=name == "scanvi")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
