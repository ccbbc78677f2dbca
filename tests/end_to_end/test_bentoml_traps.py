"""What goes wrong in a plain BentoML service and not here; where it is cheap, both are asked. docs/architecture.md lists all of them."""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.builders import arrow_body, counts, gene_table, json_body, write_artifact
from tests.end_to_end.collector import collecting
from tests.end_to_end.server import ROOT, Server

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
JSON = {"Content-Type": "application/json"}
GENES = gene_table().gene_symbol
LARGE = "x" * 2**18


class PlainServer(Server):
    """A server of plain_service.py."""

    service = "tests.end_to_end.plain_service:Plain"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one tiny model."""
    root = tmp_path_factory.mktemp("traps")
    write_artifact(root)
    return root


@pytest.fixture(scope="module")
def pure_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH with which uvicorn takes h11 and asyncio, as where httptools and uvloop are not installed."""
    folder = tmp_path_factory.mktemp("pure")
    for name in ("httptools", "uvloop"):
        (folder / f"{name}.py").write_text("raise ImportError('hidden by a test')\n")
    return str(folder)


@pytest.fixture(scope="module")
def plain(store: Path, pure_python: str) -> Iterator[Server]:
    """A ready plain service, on h11."""
    server = PlainServer(store, PYTHONPATH=pure_python)
    try:
        yield server.start().wait_until_ready()
    finally:
        server.close()


@pytest.fixture
def start(request: pytest.FixtureRequest, store: Path) -> Callable[..., Server]:
    """Start a server of ours; ended with the test."""

    def start(kind: type[Server] = Server, **environment: str | None) -> Server:
        server = kind(store, **environment)
        request.addfinalizer(server.close)
        return server.start()

    return start


def sample(server: Server, name: str) -> float:
    """The value of one series of /metrics."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(server.url + "/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def n_series(server: Server) -> int:
    """Series that /metrics holds."""
    return sum(not line.startswith("#") for line in httpx.get(server.url + "/metrics").text.splitlines())


class TestTraceIds:
    """Large bodies make one trace of a whole keep-alive connection, and batches belong to the first request of all."""

    def test_here(self, start, pure_python: str) -> None:
        """Also without httptools each request has a trace of its own."""
        body = arrow_body(counts(2000), GENES)
        assert len(body) > 2**16
        with collecting() as collector:
            server = start(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, PYTHONPATH=pure_python).wait_until_ready()
            with httpx.Client(base_url=server.url) as client:
                answers = [client.post("/v1/embed", content=body, headers=ARROW) for _ in range(10)]
            assert len({answer.headers["traceresponse"].split("-")[1] for answer in answers}) == 10
            assert server.stop() == 0
        batches = [span for span in collector.spans if span["name"] == "batch embed"]
        assert len({link["traceId"] for span in batches for link in span["links"]}) == 10

    def test_plain(self, plain: Server) -> None:
        """The probe notices it where it is so."""
        with httpx.Client(base_url=plain.url) as client:
            large = {client.post("/trace_of", json={"text": LARGE}).text for _ in range(10)}
            small = {httpx.post(plain.url + "/trace_of", json={"text": "x"}).text for _ in range(10)}
            batches = {httpx.post(plain.url + "/trace_of_batch", json={"texts": ["x"]}).text for _ in range(10)}
        assert len(large) < 10
        assert len(small) == 10
        assert len(batches) == 1


class TestSeries:
    """Whoever tries paths, models or methods makes series of a plain service's metrics grow without bound."""

    def test_here(self, start) -> None:
        """They grow by none, whatever is tried."""
        server = start().wait_until_ready()
        body = json_body(counts(1), GENES)

        def try_all(client: httpx.Client, number: int) -> None:
            client.get(f"/wp-admin/{number}")
            client.request(f"METHOD{number}", "/v1/embed")
            client.get(f"/v1/models/model{number}")
            client.get(f"/v2/models/model{number}/versions/{number}/ready")
            client.post(f"/v1/embed?model=model{number}", content=body, headers=JSON)
            client.post(f"/v1/embed?option{number}=1", content=body, headers=JSON)
            client.post("/v1/embed", content=body, headers={"Content-Type": f"application/x-{number}"})
            client.post(
                "/v1/embed", content=json_body(counts(1), tuple(f"{number}{name}" for name in GENES)), headers=JSON
            )

        with httpx.Client(base_url=server.url) as client:
            try_all(client, 0)
            n_series(server)  # a scrape makes series, too
            before = n_series(server)
            for number in range(1, 50):
                try_all(client, number)
        assert n_series(server) == before

    def test_plain(self, plain: Server) -> None:
        """The probe notices it where it is so."""
        before = n_series(plain)
        for number in range(20):
            httpx.get(f"{plain.url}/wp-admin/{number}")
        assert n_series(plain) >= before + 20

    def test_memory_is_exported(self, start, plain: Server) -> None:
        """Memory, CPU time and open files of the process are among the metrics, which they are not where values lie in files."""
        server = start().wait_until_ready()
        assert sample(server, "process_resident_memory_bytes") > 2**20
        assert sample(server, "process_open_fds") > 0
        assert "process_resident_memory_bytes" not in httpx.get(plain.url + "/metrics").text


class TestProbes:
    """While a model loads, a plain service accepts connections and answers none."""

    def test_here(self, tmp_path: Path) -> None:
        """From the first answer on probes are answered at once: alive, and not ready yet with the reason."""
        for number in range(25):
            write_artifact(tmp_path, version=str(number))
        server = Server(tmp_path)
        try:
            server.start().wait_until("/livez")
            seen = []
            while not seen or seen[-1] != 200:
                started = time.monotonic()
                answer = httpx.get(server.url + "/readyz", timeout=10)
                assert time.monotonic() - started < 2
                seen.append(answer.status_code)
                if answer.status_code != 200:
                    assert "being loaded" in answer.json()["detail"]
            assert seen[0] == 503
        finally:
            server.close()

    def test_plain(self, start) -> None:
        """The probe notices it where it is so."""
        server = start(PlainServer)
        silent = 0.0
        for _ in range(600):
            try:
                started = time.monotonic()
                httpx.get(server.url + "/livez", timeout=10)
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        silent = time.monotonic() - started
        assert silent > 2

    def test_under_load(self, start) -> None:
        """Probes and scrapes are answered while every thread has work."""
        server = start().wait_until_ready()
        body = arrow_body(counts(20_000), GENES)
        with ThreadPoolExecutor(4) as pool:
            work = [
                pool.submit(httpx.post, server.url + "/v1/reconstruct", content=body, headers=ARROW, timeout=60)
                for _ in range(8)
            ]
            slowest = 0.0
            while not all(done.done() for done in work):
                for path in ("/livez", "/readyz", "/metrics"):
                    answer = httpx.get(server.url + path, timeout=10)
                    assert answer.status_code == 200
                    slowest = max(slowest, answer.elapsed.total_seconds())
        assert {done.result().status_code for done in work} == {200}
        assert slowest < 2


class TestTimeouts:
    """After its 504 the work of a plain service runs on, beside that of others."""

    def test_here(self, start) -> None:
        """What timed out leaves the queue: hardly any of it runs, and nothing is held."""
        server = start(CELLSERVE_TIMEOUT_SECONDS="0.0001").wait_until_ready()
        body = arrow_body(counts(50_000), GENES)
        answer = httpx.post(server.url + "/v1/reconstruct", content=body, headers=ARROW, timeout=60)

        assert (answer.status_code, answer.json()["code"]) == (504, "timeout")
        assert sample(server, "cellserve_queue_rows") == 0
        assert sample(server, "cellserve_body_bytes_in_flight") == 0
        ran = sample(server, 'cellserve_batch_rows_sum{task="reconstruct"}')
        time.sleep(0.5)
        assert sample(server, 'cellserve_batch_rows_sum{task="reconstruct"}') <= max(ran, 256) < 5_000
        assert "never retrieved" not in server.log()

    def test_plain(self, plain: Server) -> None:
        """The probe notices it where it is so: two run in one thread's place, and both to their end."""
        with ThreadPoolExecutor(2) as pool:
            statuses = [
                done.status_code
                for done in pool.map(
                    lambda _: httpx.post(plain.url + "/work", json={"seconds": 3}, timeout=20), range(2)
                )
            ]
        time.sleep(1.2)
        httpx.post(plain.url + "/work", json={"seconds": 2}, timeout=20)
        worked = httpx.post(plain.url + "/worked").json()
        assert statuses == [504, 504]
        assert worked["most"] > 1


class TestDeadWorkers:
    """One of several workers may be dead for ever while /readyz is 200. Here there is one, and its death is noticed."""

    @staticmethod
    def worker(server: Server) -> psutil.Process:
        """The process that answers."""
        workers = [
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if any("worker" in part for part in child.cmdline())
        ]
        assert len(workers) == 1
        return workers[0]

    def test_it_is_replaced(self, start) -> None:
        """Under a supervisor of processes another takes its place."""
        server = start().wait_until_ready()
        before = self.worker(server)
        before.kill()
        before.wait(10)
        server.wait_until_ready()
        assert self.worker(server).pid != before.pid
        answer = httpx.post(server.url + "/v1/embed", content=json_body(counts(1), GENES), headers=JSON)
        assert answer.status_code == 200

    def test_a_container_ends(self, start) -> None:
        """In a container, where BentoML replaces none, the whole ends with an error, so that the container is replaced."""
        server = start(BENTOML_CONTAINERIZED="true").wait_until_ready()
        self.worker(server).kill()
        assert server.process.wait(30) != 0


class TestDrain:
    """After SIGTERM new connections to a plain service hang until it is gone. test_swap.py has what happens here."""

    def test_plain(self, start) -> None:
        """The probe notices it where it is so: work is in flight, and neither refusal nor readiness is to be had."""
        server = start(PlainServer).wait_until_ready()
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(httpx.post, server.url + "/work", json={"seconds": 0.9}, timeout=20)
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            with pytest.raises(httpx.TransportError):
                httpx.get(server.url + "/readyz", timeout=0.4)
            with contextlib.suppress(httpx.TransportError):
                work.result()


AUDIT = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["AUDIT_FILE"], "a") as file:
            file.write(f"{event} {arguments[1:] if event != 'socket.getaddrinfo' else arguments}\\n")
sys.addaudithook(note)
"""


class TestTelemetry:
    """BentoML phones home unless a variable tells it not to."""

    @pytest.fixture
    def audited(self, tmp_path: Path) -> dict[str, str]:
        """Environment with which every process of a server notes whom it wants to talk to."""
        (tmp_path / "sitecustomize.py").write_text(AUDIT)
        return {"PYTHONPATH": str(tmp_path), "AUDIT_FILE": str(tmp_path / "audit")}

    @staticmethod
    def outside(environment: dict[str, str]) -> list[str]:
        """Addresses that are not of this machine."""
        path = Path(environment["AUDIT_FILE"])
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not re.search(r"127\.0\.0\.1|localhost|'::1'|\('/|\(b?'\\x00|None", line)]

    def test_here(self, start, audited: dict[str, str]) -> None:
        """From start to end no process looks up or connects to anything outside, and nobody had to set a variable."""
        server = start(**audited, BENTOML_DO_NOT_TRACK=None).wait_until_ready()
        body = json_body(counts(1), GENES)
        for task in ("embed", "reconstruct", "annotate"):
            assert httpx.post(f"{server.url}/v1/{task}", content=body, headers=JSON).status_code == 200
        time.sleep(2)
        server.stop()
        assert self.outside(audited) == []

    def test_plain(self, start, audited: dict[str, str]) -> None:
        """The probe notices it where it is so."""
        server = start(PlainServer, **audited, BENTOML_DO_NOT_TRACK=None).wait_until_ready()
        time.sleep(2)
        server.stop()
        assert any("bentoml.com" in line for line in self.outside(audited))

    def test_the_image_and_the_bento_say_it_too(self) -> None:
        """Commands that never import our service are told as well."""
        for path in ("bentofile.yaml", "deploy/Containerfile", "Makefile"):
            assert "BENTOML_DO_NOT_TRACK" in (ROOT / path).read_text()


class TestBodies:
    """BentoML fetches a body that is a URL, unpickles between services, and takes strings for numbers."""

    def test_an_address_is_not_fetched(self, start) -> None:
        """Whatever the media type, a body that is an address is refused, and nobody is called."""
        server = start().wait_until_ready()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(0.5)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/cells.json"
            for kind in ("application/json", ARROW["Content-Type"], "text/plain"):
                for body in (address.encode(), json.dumps(address).encode(), json.dumps({"url": address}).encode()):
                    answer = httpx.post(server.url + "/v1/embed", content=body, headers={"Content-Type": kind})
                    assert answer.status_code in (400, 415, 422)
            with pytest.raises(TimeoutError):
                listener.accept()

    @pytest.mark.parametrize("kind", ["application/vnd.bentoml+pickle", "application/vnd.bentoml+parquet"])
    def test_pickles_are_refused(self, start, kind: str) -> None:
        """The media types that BentoML's services speak among themselves are none here."""
        server = start().wait_until_ready()
        answer = httpx.post(
            server.url + "/v1/embed", content=b"cos\nsystem\n(S'true'\ntR.", headers={"Content-Type": kind}
        )
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
