"""The examples of deploy/: nginx run for real before a real server, the systemd unit and the compose file checked by their own tools."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import httpx
import pytest
import scipy.sparse as sp
import yaml

from service.settings import Settings
from tests.builders import arrow_body
from tests.end_to_end.server import ROOT, Server, free_port

DEPLOY = ROOT / "deploy"
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
SITE = (DEPLOY / "nginx.conf").read_text()


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an nginx with our example before the server."""
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian's nginx-light)")
    folder = tmp_path_factory.mktemp("nginx")
    port = free_port()
    site = SITE.replace("127.0.0.1:3000", server.url.removeprefix("http://")).replace(
        "listen 80", f"listen 127.0.0.1:{port}"
    )
    site = site.replace("client_max_body_size 256m", "client_max_body_size 1m")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}} http {{ access_log off; {paths}\n{site}\n}}"
    )
    process = subprocess.Popen([NGINX, "-c", folder / "nginx.conf", "-p", folder, "-e", folder / "log"])
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/livez")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def test_answers_pass_through(proxy: str, server: Server, cells: ad.AnnData) -> None:
    """A task through the proxy gives what it gives without, and carries the proxy's request id."""
    body = arrow_body(sp.csr_matrix(cells.X), tuple(cells.var_names))
    headers = {**ARROW, "Accept": "application/json"}
    through, direct = (httpx.post(url + "/v1/annotate", content=body, headers=headers) for url in (proxy, server.url))

    assert through.status_code == 200
    assert through.json()["cells"] == direct.json()["cells"]
    assert re.fullmatch("[0-9a-f]{32}", through.headers["x-request-id"])


def test_idle_connections_are_not_reset(proxy: str, cells: ad.AnnData) -> None:
    """A request after the service's idle time meets no closed connection."""
    body = arrow_body(sp.csr_matrix(cells.X), tuple(cells.var_names))
    with httpx.Client(base_url=proxy) as client:
        for wait in (0, 4.5, 5.2):
            time.sleep(wait)
            assert client.post("/v1/embed", content=body, headers=ARROW).status_code == 200


def test_too_large_is_a_problem_of_ours(proxy: str) -> None:
    """Its own refusal has the form and the code of the service's."""
    answer = httpx.post(proxy + "/v1/embed", content=b"x" * (2**20 + 1), headers=ARROW)

    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "body_too_large"


def test_no_service_behind_is_a_problem_of_ours(proxy: str, server: Server, tmp_path: Path) -> None:
    """With no service behind it, nginx answers 503 in our form, with Retry-After."""
    folder, port = tmp_path, free_port()
    site = SITE.replace("127.0.0.1:3000", f"127.0.0.1:{free_port()}").replace("listen 80", f"listen 127.0.0.1:{port}")
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}} http {{ access_log off; {site} }}"
    )
    process = subprocess.Popen([NGINX, "-c", folder / "nginx.conf", "-p", folder, "-e", folder / "log"])
    try:
        answer = None
        deadline = time.monotonic() + 20
        while answer is None and time.monotonic() < deadline:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/readyz")
            except httpx.TransportError:
                time.sleep(0.05)
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["code"]) == (503, "5", "not_ready")
    finally:
        process.terminate()
        process.wait(10)


def test_limits_match_ours() -> None:
    """The proxy takes exactly the bodies that the service takes, and waits longer than the service does."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}

    def directive(name: str) -> int:
        return int(re.search(rf"^\s*{name} (\d+)[ms]?;", SITE, re.MULTILINE)[1])

    assert directive("client_max_body_size") * 2**20 == defaults["max_body_bytes"]
    assert directive("client_body_timeout") == defaults["body_timeout_seconds"]
    assert directive("proxy_read_timeout") > defaults["timeout_seconds"]
    unit = (DEPLOY / "cellserve.service").read_text()
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > defaults["timeout_seconds"]
    compose = (DEPLOY / "compose.yaml").read_text()
    assert int(re.search(r"stop_grace_period: (\d+)s", compose)[1]) > defaults["drain_seconds"]


def test_systemd_unit(tmp_path: Path) -> None:
    """systemd-analyze finds no fault in the unit, nor an unsafe one."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (DEPLOY / "cellserve.service").read_text()
    # The program must exist for the check.
    (tmp_path / "cellserve.service").write_text(re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", unit))
    done = subprocess.run(
        [analyze, "verify", "--recursive-errors=no", tmp_path / "cellserve.service"], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_compose_file() -> None:
    """podman-compose reads the file, and the service has the options of `make run-image`."""
    shown = subprocess.run(
        [sys.executable, "-m", "podman_compose", "-f", DEPLOY / "compose.yaml", "config"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "cellserve:latest" in shown.stdout
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["cellserve"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
