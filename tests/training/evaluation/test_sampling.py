"""Cells drawn from a model: whose they are, what they are like, and who cannot draw any."""

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from training import run
from training.evaluation.sampling import CannotSample, sample

GENERATIVE = {"atlas_vae", "gmvae", "vae"}


of_generative_families = pytest.mark.parametrize("family_run", sorted(GENERATIVE), indirect=True)


def test_a_file_of_cells(family_run: tuple[run.Run, Path], tmp_path: Path, type_words) -> None:
    """Ids, latent, batch and where they come from; a family without a prior refuses with a sentence."""
    made, directory = family_run
    code, out, err = type_words(
        "sample", str(directory), "--output", str(tmp_path / "drawn.h5ad"), "-n", "30", "--seed", "5"
    )
    if made.config.family not in GENERATIVE:
        assert (code, "has no prior" in err, "vae" in err) == (2, True, True)
        assert not (tmp_path / "drawn.h5ad").exists()
        return
    assert (code, "30 cells" in out) == (0, True)
    cells = anndata.read_h5ad(tmp_path / "drawn.h5ad")
    assert list(cells.obs_names) == [f"sample-{i}" for i in range(30)]
    assert list(cells.var["gene_id"]) == list(made.prepared.var["gene_id"])
    assert cells.obsm["X_tiny"].shape == (30, 4)
    assert set(cells.obs["batch"]) <= set(made.prepared.batches)
    counts = cells.X.toarray()
    np.testing.assert_array_equal(counts, np.maximum(np.round(counts), 0))
    about = cells.uns["sample"]
    assert (about["model"], about["family"], about["seed"], about["n_cells"]) == ("tiny", made.config.family, 5, 30)
    assert about["values"] == "raw counts"
    assert about["run_created"] == made.provenance["created"]


@of_generative_families
def test_means_are_those_of_the_model(family_run: tuple[run.Run, Path]) -> None:
    """Of each gene within five standard errors, given the latents that were drawn; so are the variances' sums."""
    made = family_run[0]
    cells = sample(made, 4000, 0)
    codes = cells.obs["batch"].map(list(made.prepared.batches).index).to_numpy(dtype=np.int64)
    with torch.no_grad():
        library = torch.from_numpy(cells.obs["library_size"].to_numpy())
        said = made.family.distribution(torch.from_numpy(cells.obsm["X_tiny"]), library, torch.from_numpy(codes))
        mean, variance = said.mean.double().numpy(), said.variance.double().numpy()
    counts = cells.X.toarray().astype(float)
    error = np.sqrt(variance.sum(axis=0)) / len(counts)
    assert (np.abs(counts.mean(axis=0) - mean.mean(axis=0)) < 5 * error).all()
    assert np.square(counts - mean).sum() / variance.sum() == pytest.approx(1.0, abs=0.05)


@of_generative_families
def test_counts_are_independent_of_the_noise_of_the_latent(family_run: tuple[run.Run, Path]) -> None:
    """Residuals of counts and latents do not correlate, as they would where both came of one stream of random numbers."""
    made = family_run[0]
    cells = sample(made, 4000, 0)
    codes = cells.obs["batch"].map(list(made.prepared.batches).index).to_numpy(dtype=np.int64)
    with torch.no_grad():
        library = torch.from_numpy(cells.obs["library_size"].to_numpy())
        latent = torch.from_numpy(cells.obsm["X_tiny"])
        mean = made.family.distribution(latent, library, torch.from_numpy(codes)).mean.numpy()
    residual = cells.X.toarray() - mean
    found = np.corrcoef(residual.T, latent.numpy().T)[: residual.shape[1], residual.shape[1] :]
    assert np.abs(found).max() < 5 / np.sqrt(len(residual))


@of_generative_families
def test_the_same_seed_gives_the_same_cells(family_run: tuple[run.Run, Path]) -> None:
    """Another one gives others; the global generator is left as it was."""
    made = family_run[0]
    before = torch.random.get_rng_state()
    first, again, other = sample(made, 20, 1), sample(made, 20, 1), sample(made, 20, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())
    np.testing.assert_array_equal(first.obsm["X_tiny"], again.obsm["X_tiny"])
    assert (first.X.toarray() != other.X.toarray()).any()


@of_generative_families
def test_one_batch(family_run: tuple[run.Run, Path]) -> None:
    """All cells are of it, with library sizes of its own training cells; an unknown one is refused by name."""
    made = family_run[0]
    batch = made.prepared.batches[1]
    cells = sample(made, 25, 0, batch)
    assert set(cells.obs["batch"]) == {batch}
    train = made.prepared.train
    own = train.counts[train.batch == 1].sum(axis=1).A1
    assert set(cells.obs["library_size"]) <= set(np.maximum(own, 1.0))
    with pytest.raises(CannotSample, match=r"does not know the batch 'nowhere'. It knows tiny_a, tiny_b"):
        sample(made, 5, 0, "nowhere")
