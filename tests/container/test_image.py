"""The image, run for real: safe by default, with the bits of a server outside, and with clean ends. `make test-image` runs this."""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import scipy.sparse as sp

from tests.builders import arrow_body, counts, gene_table, write_artifact
from tests.container.container import URL, Container, engine, image, image_config, running
from tests.end_to_end.conftest import STORE, VERSION
from tests.end_to_end.server import ROOT, running_server
from training.data import registry

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
GRACE_SECONDS = 30


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    with running() as container:
        yield container


@pytest.fixture(scope="module")
def cells() -> tuple[sp.csr_matrix, tuple[str, ...]]:
    """2,638 real cells and their genes."""
    data = registry.read("pbmc3k")
    return sp.csr_matrix(data.X), tuple(data.var["gene_symbol"].astype(str))


def post(task: str, body: bytes, url: str = URL, model: str = "pbmc") -> httpx.Response:
    headers = {**ARROW, "Accept": ARROW["Content-Type"]}
    return httpx.post(f"{url}/v1/{task}?model={model}", content=body, headers=headers, timeout=60)


def values(answer: httpx.Response) -> dict[str, bytes | list[str]]:
    """The bits of each column of an answer in Arrow, however it is cut into record batches."""
    assert answer.status_code == 200, answer.text
    table = pa.ipc.open_stream(answer.content).read_all().combine_chunks()
    bits: dict[str, bytes | list[str]] = {}
    for name, column in zip(table.column_names, table.itercolumns(), strict=True):
        array = column.chunk(0)
        while pa.types.is_fixed_size_list(array.type) or pa.types.is_list(array.type):
            array = array.flatten()
        bits[name] = array.to_numpy().tobytes() if pa.types.is_floating(array.type) else array.to_pylist()
    return bits


def test_image_says_what_it_is() -> None:
    """Labels, a fixed user that is not root, a health check, no shell around the process."""
    described = image_config(image())
    config = described["Config"]

    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "cellserve"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d+\.\d+\.\d+", labels["org.opencontainers.image.version"])
    assert re.fullmatch(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
    assert f"pbmc@{VERSION}" in labels["cellserve.models"].split(",")
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert config["Entrypoint"][:2] == ["/usr/bin/tini", "--"]
    health = config.get("Healthcheck") or described["Healthcheck"]  # where docker and where podman have it
    assert health["Test"] == ["CMD", "python", "-m", "service.probe"]


def test_nothing_that_serving_does_not_need(container: Container) -> None:
    """No compiler, git, package installer, torch, test suites or package caches; nothing gives more rights."""
    found = container.run(
        "sh",
        "-c",
        "for name in gcc cc g++ make git pip pip3 uv; do command -v $name; done; "
        "find /var/lib/apt/lists /var/cache /root -type f 2>/dev/null; true",
    )
    assert found == ""
    script = "import importlib.util as u; print([n for n in ('torch', 'pip', 'setuptools', 'onnx', 'pandas', 'anndata') if u.find_spec(n)])"
    assert container.run("python", "-c", script) == "[]"
    assert container.run("sh", "-c", "find / -xdev -type f -perm /6000 2>/dev/null; true") == ""


def test_safe_options_hold(container: Container) -> None:
    """Not root, no capabilities, a root file system that cannot be written, no route but loopback, memory limited where it can be."""
    status = container.run("sh", "-c", "id -u; grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status")
    assert status.split() == ["10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1"]
    assert "Read-only" in container.run("sh", "-c", "touch /app/x /models/x 2>&1; true")
    assert container.run("sh", "-c", "tail -n +2 /proc/net/route; tail -n +3 /proc/net/dev | cut -d: -f1").split() == [
        "lo"
    ]
    limit = container.run(
        "sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true"
    )
    assert limit.split() == [str(512 * 2**20)], "this engine does not enforce the memory limit"


@pytest.mark.parametrize("task", ["embed", "reconstruct", "annotate"])
def test_same_bits_as_outside(
    container: Container, cells: tuple[sp.csr_matrix, tuple[str, ...]], task: str, outside: str
) -> None:
    """Real cells have the bits inside that they have outside, where the whole packages are installed and nothing is limited."""
    body = arrow_body(cells[0][:300], cells[1])
    with container.network():
        inside = post(task, body)
    reference = post(task, body, outside)

    assert len(inside.content) > 300 * 8
    assert values(inside) == values(reference)


@pytest.fixture(scope="module")
def outside() -> Iterator[str]:
    with running_server(STORE) as url:
        yield url


def test_metrics(container: Container, cells: tuple[sp.csr_matrix, tuple[str, ...]]) -> None:
    """/metrics counts the cells answered."""
    name = re.compile(
        rf'^cellserve_cells_total\{{model="pbmc",task="embed",version="{VERSION}"\}} (\S+)$', re.MULTILINE
    )
    with container.network():
        before = httpx.get(URL + "/metrics").text
        assert post("embed", arrow_body(cells[0][:7], cells[1])).status_code == 200
        after = httpx.get(URL + "/metrics").text

    assert float(name.search(after)[1]) - (float(found[1]) if (found := name.search(before)) else 0) == 7


def test_health_check(container: Container, tmp_path: Path) -> None:
    """The probe says ready of a ready service, and why not of one that has no model."""
    assert json.loads(container.run("python", "-m", "service.probe"))["status"] == "ready"
    tmp_path.chmod(0o755)
    empty = Container("-v", f"{tmp_path}:/models:ro")
    try:
        deadline = time.monotonic() + 30
        answer = ""
        while "models" not in answer and time.monotonic() < deadline:
            with pytest.raises(AssertionError) as failed:
                empty.run("python", "-m", "service.probe")
            answer = str(failed.value)
            time.sleep(0.2)
        assert "not_ready" in answer, answer
    finally:
        empty.close()


def test_orphans_are_reaped(container: Container) -> None:
    """A process whose parent has ended is waited for by process 1."""
    container.run("sh", "-c", "(sh -c 'sleep 0.3 & exec true') ; true")
    time.sleep(1)
    states = container.run("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null | awk '{print $3}' | sort | uniq -c")
    assert "Z" not in states


@pytest.mark.parametrize("signal", ["TERM", "INT"])
def test_stop_with_requests_in_flight(cells: tuple[sp.csr_matrix, tuple[str, ...]], signal: str) -> None:
    """What has begun completes, nothing new is let in, and the exit is clean and within the grace time."""
    body = arrow_body(cells[0][:1200], cells[1])
    answers: list[httpx.Response] = []
    failures: list[str] = []

    def ask() -> None:
        try:
            answers.append(post("reconstruct", body))
        except httpx.TransportError as error:
            failures.append(repr(error))

    with running() as container:
        with container.network():
            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            in_flight = re.compile(r"^cellserve_requests_in_flight (\S+)$", re.MULTILINE)
            deadline = time.monotonic() + 20
            # This request is one of those in flight itself.
            while (
                float(in_flight.search(httpx.get(URL + "/metrics", timeout=20).text)[1]) < 6
                and time.monotonic() < deadline
            ):
                pass
            n_answered_before = len(answers)
            stopped = time.monotonic()
            engine("kill", "--signal", signal, container.id)
            for thread in threads:
                thread.join(GRACE_SECONDS)
        assert engine("wait", container.id, seconds=GRACE_SECONDS) == "0", container.log()
        assert time.monotonic() - stopped < GRACE_SECONDS
        assert not failures, (failures, container.log())
        assert [answer.status_code for answer in answers] == [200] * 6
        assert all(values(answer) == values(answers[0]) for answer in answers)
        assert n_answered_before < 6, "nothing was in flight when the signal came"


def test_memory_limit(cells: tuple[sp.csr_matrix, tuple[str, ...]]) -> None:
    """With the settings that docs/deploy.md gives for 512 MB, the largest bodies from 8 clients at once kill nothing."""
    row = re.search(r"^\| 512 MB \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE)
    names = ("MAX_BODY_BYTES", "MAX_BODY_BYTES_IN_FLIGHT", "MAX_DECODED_BYTES")
    settings = dict(zip(names, map(int, row.groups()), strict=True))
    options = [part for name, value in settings.items() for part in ("-e", f"CELLSERVE_{name}={value}")]
    bodies = []
    for compression in (None, "zstd"):
        n_cells = 100
        while len(arrow_body(cells[0][: n_cells + 50], cells[1])) < settings["MAX_BODY_BYTES"]:
            n_cells += 50
        bodies.append(arrow_body(cells[0][:n_cells], cells[1], compression=compression))

    with running(*options) as container, container.network():
        too_large = post("embed", b"x" * (settings["MAX_BODY_BYTES"] + 1))
        assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")
        with ThreadPoolExecutor(8) as clients:
            jobs = [
                clients.submit(lambda task, body: post(task, body).status_code, task, body)
                for task in ("embed", "annotate", "reconstruct")
                for body in bodies
                for _ in range(16)
            ]
            statuses = [job.result() for job in jobs]
        assert set(statuses) <= {200, 429}, statuses
        assert statuses.count(200) >= 16, statuses
        assert container.state["Running"]
        assert not container.state.get("OOMKilled")
        assert httpx.get(URL + "/readyz").status_code == 200


def test_early_signal() -> None:
    """A signal that comes before the service has started is obeyed, too."""
    container = Container()
    try:
        engine("kill", "--signal", "TERM", container.id)
        assert int(engine("wait", container.id, seconds=10)) in (0, 128 + 15)
    finally:
        container.close()


def test_mounted_model(tmp_path: Path) -> None:
    """A second model, mounted below /models, is served beside the one that was baked in."""
    path = write_artifact(tmp_path, version="1")
    for part in (tmp_path, *path.parent.rglob("*")):
        part.chmod(0o755 if part.is_dir() else 0o644)
    path.parent.chmod(0o755)
    with running("-v", f"{path.parent}:/models/tiny:ro") as container, container.network():
        listed = httpx.get(URL + "/v1/models").json()
        assert {model["name"] for model in listed["models"]} == {"pbmc", "tiny"}
        assert post("embed", arrow_body(counts(3), gene_table().gene_symbol), model="tiny@1").status_code == 200


def test_provider_that_is_not_there() -> None:
    """Asked for CUDA without a GPU, it ends at once and says so in a sentence."""
    container = Container("-e", "CELLSERVE_PROVIDER=cuda")
    try:
        assert int(engine("wait", container.id, seconds=30)) == 1
        last = container.log().strip().splitlines()[-1]
        assert last.startswith("cellserve cannot start:")
        assert "cuda" in last
        assert "CELLSERVE_ALLOW_PROVIDER_FALLBACK" in last
    finally:
        container.close()


def test_list_of_parts(container: Container) -> None:
    """The list of parts is valid CycloneDX and names exactly what is installed."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = container.run("cat", "/opt/cellserve/sbom.cdx.json")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    listed = {
        (part["name"].lower(), part["version"])
        for part in json.loads(text)["components"]
        if part["purl"].startswith("pkg:pypi/")
    }
    script = (
        "import importlib.metadata as m; print(*sorted(f'{d.name.lower()}=={d.version}' for d in m.distributions()))"
    )
    assert listed == {tuple(line.split("==")) for line in container.run("python", "-c", script).split()}
    locked = (ROOT / "requirements/serving.txt").read_text()
    locked = {
        f"{name.replace('_', '-')}=={version}" for name, version in re.findall(r"^(\S+)==(\S+)", locked, re.MULTILINE)
    }
    assert {f"{name.replace('_', '-').replace('.', '-')}=={version}" for name, version in listed} <= locked
