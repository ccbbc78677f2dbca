"""Ask scvi-tools for its own answer: `python ask_scvi.py MODEL_FOLDER PLACE`, run by an interpreter that has scvi-tools.

Reads <PLACE>/question.npz and writes answer.npz and answer.json beside it. Imports nothing of this project, and runs the model's pickle.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")


def main(folder: Path, place: Path) -> None:
    """Load the model, encode and decode the cells of the question."""
    import anndata as ad
    import pandas as pd
    import scvi
    import torch

    scvi.settings.verbosity = 40
    saved = torch.load(next(iter(sorted(folder.glob("*model.pt")))), map_location="cpu", weights_only=False)
    registry = saved["attr_dict"]["registry_"]
    with np.load(place / "question.npz") as arrays:
        asked = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    fields, setup = registry["field_registries"], registry["setup_args"]
    n_cells = len(asked["counts"])
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    batches = fields["batch"]["state_registry"]["categorical_mapping"]
    if setup.get("batch_key"):
        obs[setup["batch_key"]] = pd.Categorical([batches[i] for i in asked["batch"].numpy()], categories=list(batches))
    mappings = fields.get("extra_categorical_covs", {}).get("state_registry", {}).get("mappings", {})
    for key, names in mappings.items():
        obs[key] = pd.Categorical([names[0]] * n_cells, categories=list(names))
    if setup.get("labels_key"):
        names = fields["labels"]["state_registry"]["categorical_mapping"]
        obs[setup["labels_key"]] = pd.Categorical([names[-1]] * n_cells, categories=list(names))
    cells = ad.AnnData(asked["counts"].numpy(), obs=obs, var=pd.DataFrame(index=list(saved["var_names"])))
    if setup.get("layer"):
        cells.layers[setup["layer"]] = cells.X
    model = getattr(scvi.model, registry["model_name"]).load(str(folder), adata=cells, accelerator="cpu")
    module = model.module.eval()
    widths = [len(names) for names in mappings.values()]
    # scvi-tools takes a code in the place of a category: a matrix as wide as there are categories.
    covariates = list(torch.split(asked["covariates"], widths, dim=1)) if widths else []
    batch = asked["batch"].unsqueeze(1)
    with torch.no_grad():
        values = torch.log1p(asked["counts"]) if module.log_variational else asked["counts"]
        given = []
        if module.encode_covariates:
            given = [asked["encode"], *covariates]
            if getattr(module, "batch_representation", "one-hot") == "embedding":
                table = module.get_embedding("batch").weight
                values, given = torch.cat([values, asked["encode"] @ table], dim=1), covariates
        latent = module.z_encoder(values, *given)[0].loc
        library = torch.log(asked["counts"].sum(dim=1, keepdim=True))
        if getattr(module, "batch_representation", "one-hot") == "embedding":
            joined = torch.cat([latent, module.compute_embedding("batch", batch)], dim=-1)
            rate = module.decoder(module.dispersion, joined, library, *covariates)[2]
        else:
            rate = module.decoder(module.dispersion, latent, library, batch, *covariates)[2]
        answer = {"latent": latent.numpy(), "expression": rate.numpy()}
        if hasattr(module, "classifier"):
            logits = module.classifier(latent)
            is_done = torch.allclose(logits.sum(dim=1), torch.ones(n_cells), atol=1e-4) and bool((logits >= 0).all())
            answer["probabilities"] = (logits if is_done else torch.softmax(logits, dim=1)).numpy()
    np.savez(place / "answer.npz", **answer)
    (place / "answer.json").write_text(json.dumps({"version": scvi.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
