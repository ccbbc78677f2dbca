"""Metrics of what is sent and what it is taken for."""

from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats

from service import metrics
from service.inference.profile import entropy
from service.metrics import REGISTRY, CellHistogram
from tests.builders import PROFILE, counts, gene_table, json_body, write_artifact
from tests.conftest import serving

JSON = {"Content-Type": "application/json"}
GENES = gene_table().gene_symbol


async def values(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics."""
    text = (await client.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted({"model": "tiny", "version": "1", **labels}.items()))


async def test_each_cell_is_counted_once(client: httpx.AsyncClient) -> None:
    """Labels, confidence and library sizes of all cells of an answer; missing genes once per request."""
    matrix = counts(300)[:, :30]
    before = await values(client)
    answer = (await client.post("/v1/annotate", content=json_body(matrix, GENES[:30]), headers=JSON)).json()
    after = await values(client)

    def grown(name: str, **labels: str) -> float:
        return after[key(name, **labels)] - before.get(key(name, **labels), 0.0)

    given = [cell["predicted_labels"] for cell in answer["cells"]]
    for label in set(given):
        assert grown("cellserve_labels_total", column="predicted_labels", label=label) == given.count(label)
    assert grown("cellserve_confidence_ratio_count", column="conf_score") == 300
    confidence = np.array([cell["conf_score"] for cell in answer["cells"]], np.float32)
    assert grown("cellserve_confidence_ratio_sum", column="conf_score") == pytest.approx(float(confidence.sum()))
    assert grown("cellserve_confidence_ratio_bucket", column="conf_score", le="0.5") == (confidence <= 0.5).sum()
    library = np.asarray(matrix.sum(axis=1)).ravel()
    assert grown("cellserve_library_size_sum") == library.sum()
    assert grown("cellserve_library_size_bucket", le="100.0") == (library <= 100).sum()
    assert grown("cellserve_missing_genes_ratio_count") == 1
    assert grown("cellserve_missing_genes_ratio_sum") == pytest.approx(1 - answer["genes"]["gene_overlap"])
    assert grown("cellserve_missing_weight_ratio_sum") == pytest.approx(answer["genes"]["missing_weight"])


def test_a_histogram_of_cells_counts_as_prometheus_does() -> None:
    """A value on a bound belongs to the bucket below it, and the last bucket holds everything."""
    histogram = CellHistogram("cellserve_test_cells", "For this test.", ("model",), (1.0, 2.0))
    try:
        histogram.observe(("m",), np.array([0.5, 1.0, 1.5, 2.0, 99.0], np.float32))
        histogram.observe(("m",), np.array([2.0], np.float32))
        (family,) = histogram.collect()
        found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    finally:
        REGISTRY.unregister(histogram)

    assert found == {"1.0": 2, "2.0": 5, "+Inf": 6, "cellserve_test_cells_count": 6, "cellserve_test_cells_sum": 106.0}


async def test_entropy(client: httpx.AsyncClient) -> None:
    """The entropy of each cell's probabilities is counted once, as scipy has it."""
    before = await values(client)
    answer = (await client.post("/v1/annotate", content=json_body(counts(50), GENES), headers=JSON)).json()
    after = await values(client)
    probabilities = np.array([list(cell["probabilities"].values()) for cell in answer["cells"]])
    name = key("cellserve_entropy_ratio_sum", column="probabilities")

    assert after[name] - before.get(name, 0) == pytest.approx(
        stats.entropy(probabilities, axis=1, base=3).sum(), rel=1e-5
    )


def test_entropy_of_the_certain_and_the_clueless() -> None:
    """One label that is certain has none, as many as there are have all; one class says nothing."""
    found = entropy(np.array([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]], np.float32))

    assert found.tolist() == pytest.approx([0, 1, 0.5])
    assert entropy(np.ones((2, 1), np.float32)).tolist() == [0, 0]


async def test_the_reference_beside_it(tmp_path: Path) -> None:
    """What the artifact says of its reference is exported under the columns' names, and goes with the version."""
    write_artifact(tmp_path, name="described", profile=PROFILE)
    async with serving(tmp_path) as client:
        found = {
            name: value for name, value in (await values(client)).items() if name[0].startswith("cellserve_reference")
        }
        levels = PROFILE["labels"]["cell_type"]
        for metric, labels, value in (
            ("library_size", {"quantile": "0.5"}, PROFILE["library_size"]["quantiles"]["0.5"]),
            ("library_size", {"quantile": "mean"}, PROFILE["library_size"]["mean"]),
            (
                "confidence_ratio",
                {"column": "conf_score", "quantile": "0.05"},
                levels["conf_score"]["quantiles"]["0.05"],
            ),
            ("entropy_ratio", {"column": "probabilities", "quantile": "mean"}, levels["entropy"]["mean"]),
            ("labels_ratio", {"column": "predicted_labels", "label": "B"}, 0.75),
        ):
            assert found[key(f"cellserve_reference_{metric}", model="described", **labels)] == pytest.approx(value)
        n_bytes = key("cellserve_graph_bytes", model="described")
        assert (await values(client))[n_bytes] == sum(path.stat().st_size for path in tmp_path.glob("*/*/*.onnx"))
        metrics.forget("described", "1")
        assert not any(("model", "described") in labels for _, labels in await values(client))


def test_a_version_that_comes_back_is_counted_again() -> None:
    """What is counted after a version was forgotten is in the exposition, from zero on."""
    for n_cells in (5, 7):
        metrics.series(metrics.CELLS, "returning", "1", "embed").inc(n_cells)
        line = f'cellserve_cells_total{{model="returning",task="embed",version="1"}} {n_cells}.0'
        assert line in metrics.exposition().decode()
        metrics.forget("returning", "1")
        assert "returning" not in metrics.exposition().decode()
