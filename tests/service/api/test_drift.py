"""Metrics of what is sent and what it is taken for."""

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import REGISTRY, CellHistogram
from tests.builders import counts, gene_table, json_body

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
