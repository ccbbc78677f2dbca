"""Impacts: guided back-propagation is the paper's, planted genes and sets are found, classes have contrasts."""

import numpy as np
import pytest
import torch

from service.contract import artifact
from service.inference import model as serving
from service.inference.session import Runtime
from tests.training.families.test_families import N_GENES, build
from tests.training.tiny import TYPES, register, tiny_config
from training import export as exporting
from training import run, saliency
from training.families.autoencoder import Autoencoder


def test_guided_back_propagation_is_the_closed_form() -> None:
    """S_u = W1ᵀ relu(s1' relu(s2' W2_u)) of Kinalis et al. for their encoder, exactly; plain gradients are another thing."""
    family = build(
        "autoencoder",
        hidden=(12,),
        activation="softplus",
        latent_activation="softplus",
        input="counts",
        scale=False,
        clip=None,
    ).eval()
    assert isinstance(family, Autoencoder)
    counts = torch.poisson(torch.full((9, N_GENES), 1.0), generator=torch.Generator().manual_seed(2))
    first, second = family.encoder[0], family.to_latent[0]
    a1 = first(counts)
    a2 = second(torch.nn.functional.softplus(a1, beta=12))
    with saliency.guided(family):
        found = list(saliency.gradients(family, counts, list(range(4))))
    plain = list(saliency.gradients(family, counts, list(range(4))))
    for unit in range(4):
        inner = torch.relu(torch.sigmoid(4 * a2[:, unit, None]) * second.weight[unit])
        expected = torch.relu(torch.sigmoid(12 * a1) * inner) @ first.weight
        torch.testing.assert_close(found[unit], expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(plain[unit], expected, rtol=1e-2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> serving.Model:
    """The tiny sets, in which every third gene belongs to a type, looked at with the three planted sets and a mixed one."""
    folder = tmp_path_factory.mktemp("planted")
    lines = [
        "\t".join([f"{name} genes", "planted", *(f"G{i}" for i in range(k, 60, len(TYPES)))])
        for k, name in enumerate(TYPES)
    ]
    lines += ["\t".join(["MIXED", "planted", *(f"G{i}" for i in range(10, 22))])]
    (folder / "planted.gmt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        made = run.fit(
            tiny_config(
                fit={"max_epochs": 40, "rows": 32, "device": "cpu"},
                model={"hidden": [16], "n_latent": 4, "classifier_weight": 50},
                export={"n_golden": 4, "n_parity": 24, "gene_sets": [str(folder / "planted.gmt")]},
            ),
            folder / "run",
            show_progress=False,
        )
        return serving.load(artifact.read(exporting.export(made, folder / "store")), Runtime())


@pytest.mark.parametrize("label", TYPES)
def test_planted_markers_come_first(planted: serving.Model, label: str) -> None:
    """Of the ten genes that add most to a label in its cells, most are those that were made higher there."""
    at = planted.manifest.labels[0].classes.index(label)
    best = np.argsort(-planted.impact.attribution[at])[:10]
    own = [int(planted.genes.display(int(gene))[1:]) % len(TYPES) == TYPES.index(label) for gene in best]

    assert sum(own) >= 8


def test_the_manifest_says_what_was_used(planted: serving.Model) -> None:
    """File, hash, number of sets and cells; and the table has a row for every unit and class."""
    about = planted.manifest.impact
    assert about is not None
    assert [(file.name, file.n_sets) for file in about.gene_sets] == [("planted.gmt", 4)]
    # Training cells: seven tenths of 240, class by class.
    assert 160 <= about.n_cells <= 175
    assert planted.impact.impact.shape == (4 + 3, 40)
    assert planted.impact.set_names == (*(f"{name} genes" for name in TYPES), "MIXED")


def test_contrasts_have_a_sign(planted: serving.Model) -> None:
    """They are neither all positive nor all nothing, and come with p and q between 0 and 1."""
    table = planted.impact
    assert (table.set_contrast != 0).any()
    for p, q in ((table.set_p, table.set_q), (table.set_contrast_p, table.set_contrast_q)):
        assert ((p >= 0) & (p <= 1) & (q >= p - 1e-6) & (q <= 1)).all()


def test_hooks_are_gone_afterwards() -> None:
    """A family is differentiated as it is once guided back-propagation is over, even where it broke off."""
    family = build("vae").eval()
    counts = torch.ones(2, N_GENES)
    before = next(saliency.gradients(family, counts))
    with pytest.raises(RuntimeError, match="on purpose"), saliency.guided(family):
        raise RuntimeError("on purpose")
    assert next(saliency.gradients(family, counts)).equal(before)
