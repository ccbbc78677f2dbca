"""What holds for every family: hyper-parameters reach the model, cells do not depend on each other, zeros are finite."""

from typing import Any

import pytest
import torch

from training.families import FAMILIES
from training.families.family import BatchLevel, Dimensions, Example, Family, Hyperparameters, Statistics

N_GENES = 30
# A base in which every hyper-parameter matters, and for each of them another value.
BASE: dict[str, Any] = {
    "hidden": (12, 8),
    "n_latent": 4,
    "dropout": 0.1,
    "input_dropout": 0.1,
    "scale": True,
    "min_std": 0.1,
    "clip": 2.0,
    "kl_warmup_epochs": 4,
    "class_weight_power": 0.5,
    "constraint_weight": 1.0,
    "mmd_weight": 1.0,
}
OTHER: dict[str, Any] = {
    "hidden": (12,),
    "n_latent": 5,
    "dropout": 0.5,
    "input_dropout": 0.5,
    "layer_norm": True,
    "target_sum": 1e3,
    "scale": False,
    "min_std": 2.0,
    "clip": 0.5,
    "classifier_weight": 2.0,
    "classifier_hidden": (6,),
    "class_weight_power": 1.0,
    "label_smoothing": 0.2,
    "latent_activation": "softplus",
    "orthogonality": 1.0,
    "orthogonality_published": True,
    "input_noise": 0.5,
    "input": "log_counts",
    "batch_norm": True,
    "activation": "softplus",
    "softplus_beta": 0.5,
    "mean_activation": "softplus",
    "n_components": 4,
    "k_max": 2,
    "posterior": "unit_variance",
    "n_importance": 2,
    "n_monte_carlo": 2,
    "linear_decoder": True,
    "count_sum": True,
    "n_clusters": 4,
    "covariance": "full",
    "prior": "inferred",
    "prior_probabilities": (0.5, 0.3, 0.2),
    "free_nats": 0.0,
    "decoder_uses_batch": True,
    "reconstruction_weight": 3.0,
    "kl_weight": 3.0,
    "kl_warmup_epochs": 2,
    "classify_draws": True,
    "classifier_from_epoch": 3,
    "encoder": "tabnet",
    "tabnet_steps": 2,
    "tabnet_gamma": 2.0,
    "tabnet_sparsity": 1.0,
    "encode_library": True,
    "decode_library": False,
    "batch_code": "one_hot",
    "batch_width": 3,
    "likelihood": "poisson",
    "dispersion": "gene_batch",
    "gate": "cell",
    "gate_weight": 3.0,
    "mmd": "hierarchical",
    "mmd_weight": 2.0,
    "constraint": "normal",
    "constraint_weight": 2.0,
    "constraint_key": "X_other",
    "protein_hidden": (5,),
    "decoder_hidden": (7,),
    "protein_key": "antibodies",
    "protein_weight": 3.0,
    "protein_dropout": 0.1,
}
WITH: dict[str, dict[str, Any]] = {
    **{key: {"encoder": "tabnet"} for key in ("tabnet_steps", "tabnet_gamma", "tabnet_sparsity")},
    "input": {"scale": False},
    "softplus_beta": {"activation": "softplus"},
    "orthogonality_published": {"orthogonality": 1.0},
    "decode_library": {"likelihood": "poisson"},
    "mean_activation": {"likelihood": "poisson", "decode_library": False},
    "n_components": {"likelihood": "gaussian_mixture"},
    "k_max": {"likelihood": "poisson", "decode_library": False},
    "dispersion": {"likelihood": "negative_binomial"},
    "gate": {"likelihood": "zero_inflated_poisson"},
    "gate_weight": {"likelihood": "zero_inflated_poisson"},
    "prior_probabilities": {"prior": "custom", "prior_probabilities": (0.2, 0.3, 0.5), "free_nats": 0.0},
}
"""What a hyper-parameter needs beside it."""
PAIRS = [(name, key) for name, family in FAMILIES.items() for key in family.defaults.model_fields]


def build(name: str, **changes: Any) -> Family:
    """A family with seeded weights, over 30 genes, three batches of two levels and three classes."""
    family = FAMILIES[name]
    known = {key: value for key, value in {**BASE, **changes}.items() if key in family.defaults.model_fields}
    statistics = Statistics(
        mean=torch.linspace(0.1, 2, N_GENES),
        std=torch.linspace(0.05, 1, N_GENES),
        n_cells={"cell_type": torch.tensor([50.0, 10.0, 5.0])},
        obsm={key: beside_counts(40)[key] for key in PROTEINS},
    )
    hyperparameters = family.defaults(**known)
    obsm = {**dict.fromkeys(PROTEINS, ("CD3", "CD19")), **dict.fromkeys(LATENTS, range(hyperparameters.n_latent))}
    levels = (BatchLevel("study", ("A", "B"), (0, 0, 1)), BatchLevel("donor", ("one", "two", "three"), (0, 1, 2)))
    torch.manual_seed(0)
    return family(hyperparameters, Dimensions(N_GENES, 3, {"cell_type": 3}, levels, obsm), statistics)


PROTEINS, LATENTS = ("protein_counts", "antibodies"), ("X_start", "X_other")


def beside_counts(n_cells: int, n_latent: int = 4) -> dict[str, torch.Tensor]:
    """Seeded values for every key of obsm that a family may need."""
    generator = torch.Generator().manual_seed(3)
    found = {key: torch.poisson(torch.full((n_cells, 2), 20.0), generator=generator) for key in PROTEINS}
    return found | {key: torch.randn(n_cells, n_latent, generator=generator) for key in LATENTS}


def example(n_cells: int = 6, n_latent: int = 4) -> Example:
    """Seeded counts; the last label is unknown."""
    counts = torch.poisson(torch.full((n_cells, N_GENES), 2.0), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, -1])[:n_cells, None]
    return Example(counts, counts, torch.arange(n_cells) % 3, labels, 0, beside_counts(n_cells, n_latent))


def behaviour(family: Family) -> list[bytes]:
    """Loss while training, after a step of gradient descent too, and then all outputs while serving, as bytes."""
    torch.manual_seed(2)
    family.train()
    cells = example(n_latent=family.hyperparameters.n_latent)
    optimizer = torch.optim.SGD(family.parameters(), lr=1e-3)
    first = family.loss(cells)["loss"]
    first.backward()
    optimizer.step()
    second = family.loss(cells)["loss"]
    family.eval()
    return [tensor.detach().numpy().tobytes() for tensor in (first, second, *outputs(family, cells).values())]


def outputs(family: Family, cells: Example) -> dict[str, torch.Tensor]:
    """Of all graphs, by name."""
    known = {"counts": cells.counts, "library": cells.counts.sum(dim=1), "batch": cells.batch}
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for graph in family.graphs().values():
            values = graph.module(*(({**known, **found})[name] for name in graph.inputs))
            found |= dict(zip(graph.outputs, values if isinstance(values, tuple) else (values,), strict=True))
    return found


def test_every_hyperparameter_is_tested() -> None:
    """A new one needs another value here."""
    assert {key for _, key in PAIRS} <= set(OTHER)


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_every_hyperparameter_reaches_the_model(name: str, key: str) -> None:
    """A value other than the base's changes the loss or an output."""
    base = WITH.get(key, {})
    usual = getattr(build(name, **base).hyperparameters, key)
    other = OTHER[key] if OTHER[key] != usual else not usual
    assert behaviour(build(name, **{**base, key: other})) != behaviour(build(name, **base))
    assert behaviour(build(name, **base)) == behaviour(build(name, **base))


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_hyperparameters_are_refused(name: str) -> None:
    """A typing error is not a silent default."""
    with pytest.raises(ValueError, match="n_latents"):
        FAMILIES[name].defaults.model_validate({"n_latents": 3})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cell_does_not_depend_on_its_company(name: str) -> None:
    """Neither in training mode's layers nor while serving: there is no statistic over the minibatch."""
    family = build(name, dropout=0.0, input_dropout=0.0).train()
    cells = example()
    with torch.no_grad():
        together = family.graphs()["encode"].module(cells.counts)
        alone = torch.cat([family.graphs()["encode"].module(cell[None]) for cell in cells.counts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_empty_and_huge_cells_are_finite(name: str, scale: float) -> None:
    """Nothing divides by a library size of zero, and nothing overflows."""
    counts = torch.ones(2, N_GENES) * scale
    cells = Example(counts, counts, torch.tensor([0, 1]), torch.tensor([[0], [1]]), 0)
    found = outputs(build(name).eval(), cells)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert (found["expression"] >= 0).all()
    torch.testing.assert_close(found["probabilities_cell_type"].sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gmvae"])
def test_unlabelled_cells_teach_the_classifier_nothing(name: str) -> None:
    """With no label at all the loss is finite and the heads get no gradient."""
    family = build(name)
    cells = example()
    unlabelled = Example(cells.counts, cells.target, cells.batch, torch.full_like(cells.labels, -1), 0, cells.obsm)
    family.loss(unlabelled)["loss"].backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in family.classifier.heads.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_gene_weight_is_per_unit_of_log_normalised_expression(name: str) -> None:
    """Scaling is undone: a gene that is divided by a small deviation weighs more."""
    scaled, plain = build(name, min_std=0.0), build(name, scale=False)
    expected = plain.gene_weight() / torch.linspace(0.05, 1, N_GENES)
    torch.testing.assert_close(scaled.gene_weight(), expected)
    assert scaled.gene_weight().shape == (12, N_GENES)


def test_the_table_is_keyed_by_name() -> None:
    """Configurations and manifests use these names."""
    assert set(FAMILIES) >= {"autoencoder", "vae"}
    assert all(
        name == family.name and issubclass(family.defaults, Hyperparameters) for name, family in FAMILIES.items()
    )


def test_the_default_autoencoder_is_sc_autoencoders() -> None:
    """256-128-64 to 32 and back."""
    family = FAMILIES["autoencoder"]
    statistics = Statistics(torch.zeros(N_GENES), torch.ones(N_GENES), {})
    built = family(family.defaults(), Dimensions(N_GENES, 1, {}), statistics)
    widths = [layer.weight.shape[0] for layer in built.modules() if isinstance(layer, torch.nn.Linear)]
    assert widths == [256, 128, 64, 32, 64, 128, 256, N_GENES]
    assert built.classifier is None
