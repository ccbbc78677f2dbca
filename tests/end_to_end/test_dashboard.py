"""Prometheus, run for real, scrapes a real server; every query of the dashboard returns data."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import pytest
import scipy.sparse as sp
import yaml

from service import metrics
from tests.builders import PROFILE, arrow_body, counts, gene_table, write_artifact
from tests.end_to_end.conftest import STORE
from tests.end_to_end.server import ROOT, Server, free_port

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/cellserve.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
PROMETHEUS = shutil.which("prometheus")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ready server of the shipped model, and of one whose artifact describes its reference."""
    store = tmp_path_factory.mktemp("dashboard")
    shutil.copytree(STORE, store, dirs_exist_ok=True)
    write_artifact(store, profile=PROFILE)
    running = Server(store, CELLSERVE_CACHE_BYTES=str(2**24), CELLSERVE_CLIENT_BUDGET_PER_SECOND="100")
    try:
        yield running.start().wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="module")
def prometheus(server: Server, cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus that has scraped the server while it answered and refused requests."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed (a Debian package of that name)")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    shutil.copy(DEPLOY / "alerts.yml", folder)
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        n_scrapes, n_rounds = 0.0, 0
        while n_scrapes < 4:
            n_rounds += 1  # other cells in each round, or the answer cache would leave nothing to run
            body = arrow_body(with_more(sp.csr_matrix(cells.X), n_rounds), tuple(cells.var_names))
            tiny = arrow_body(with_more(counts(20), n_rounds), gene_table().gene_symbol)
            assert time.monotonic() < deadline, (folder / "log").read_text()
            for task in ("embed", "reconstruct", "annotate"):
                assert httpx.post(f"{server.url}/v1/{task}?model=pbmc", content=body, headers=ARROW).status_code == 200
                assert httpx.post(f"{server.url}/v1/{task}?model=tiny", content=tiny, headers=ARROW).status_code == 200
            assert httpx.post(f"{server.url}/v1/check?model=pbmc", content=body, headers=ARROW).status_code == 200
            assert httpx.post(f"{server.url}/v1/embed?model=pbmc", content=b"{}", headers=ARROW).status_code == 400
            with contextlib.suppress(httpx.TransportError):
                found = query(url, 'count_over_time(up{job="cellserve"}[1m])')
                n_scrapes = float(found[0]["value"][1]) if found else 0.0
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def with_more(matrix: sp.csr_matrix, n: int) -> sp.csr_matrix:
    """The counts with `n` more of the first gene in each cell, float32."""
    more = sp.csr_matrix(
        (np.full(matrix.shape[0], n), (np.arange(matrix.shape[0]), np.zeros(matrix.shape[0], int))), matrix.shape
    )
    return sp.csr_matrix(matrix + more, dtype=np.float32)


def query(url: str, expression: str) -> list[dict[str, object]]:
    """The series that an instant query returns."""
    answer = httpx.get(url + "/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{title}-{n}" for n, (title, _) in enumerate(QUERIES)])
def test_every_query_returns_data(prometheus: str, title: str, expression: str) -> None:
    """No panel is empty, and none shows only what is not a number."""
    found = query(prometheus, expression.replace("$__rate_interval", "30s"))

    assert found, f"'{title}' is empty: {expression}"
    assert any(not math.isnan(float(series["value"][1])) for series in found), (
        f"'{title}' shows no number: {expression}"
    )


def test_alert_rules_are_loaded(prometheus: str) -> None:
    """Prometheus has read the rules and evaluates each without an error; on a healthy service none fires."""
    time.sleep(1)
    groups = httpx.get(prometheus + "/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]

    assert len(rules) == (DEPLOY / "alerts.yml").read_text().count("- alert:")
    assert {rule.get("lastError", "") for rule in rules} == {""}
    assert {rule["state"] for rule in rules} == {"inactive"}


def promtool_says(rules: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What promtool says of rules under tests/end_to_end/alerts_test.yml."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (it comes with Debian's prometheus)")
    (tmp_path / "alerts.yml").write_text(rules)
    shutil.copy(ROOT / "tests/end_to_end/alerts_test.yml", tmp_path)
    return subprocess.run([promtool, "test", "rules", "alerts_test.yml"], cwd=tmp_path, capture_output=True, text=True)


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Each rule fires on what it is for, and not before; and the test notices a rule that does not."""
    rules = (DEPLOY / "alerts.yml").read_text()
    done = promtool_says(rules, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    names = re.findall(r"- alert: (\w+)", rules)
    assert set(names) == set(re.findall(r"alertname: (\w+)", (tmp_path / "alerts_test.yml").read_text()))
    for name in names:
        assert promtool_says(rules.replace(f"alert: {name}\n", "alert: Another\n"), tmp_path).returncode != 0, name


def test_the_probe_would_notice(prometheus: str) -> None:
    """A query of a metric that does not exist returns nothing."""
    assert query(prometheus, "rate(cellserve_no_such_total[30s])") == []


def test_every_metric_is_on_the_dashboard() -> None:
    """Each metric of the service has a place on the dashboard."""
    shown = " ".join(expression for _, expression in QUERIES)
    names = {family.name for collector in metrics.COLLECTORS for family in collector.describe()}

    assert {name for name in names if not re.search(rf"\b{name}(_total|_bucket|_sum|_count)?\b", shown)} == set()


def test_panels_do_not_overlap() -> None:
    """Each place of Grafana's grid, 24 columns wide, belongs to one panel."""
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_provisioning_fits(tmp_path: Path) -> None:
    """Data source, dashboard folder and scrape target are the ones that the compose file mounts and starts."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/cellserve.yaml").read_text())["providers"][0]
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]

    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    assert scrape["static_configs"][0]["targets"] == ["cellserve:3000"]
    for service in compose.values():
        for volume in service.get("volumes", ()):
            path = volume.split(":")[0]
            assert not path.startswith(".") or (DEPLOY / path).exists(), volume
