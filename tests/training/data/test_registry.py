"""The registry: each thing that can be wrong with a file has its own error, and a cached file needs no network."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from training.data import registry
from training.data.registry import DATASETS, RemoteFile

CONTENT = b"counts" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Publisher(BaseHTTPRequestHandler):
    """Serves CONTENT whole, cut short (with the true length announced, or with the short one), changed, or not at all."""

    def do_GET(self) -> None:
        content = {"/changed": b"x" * len(CONTENT)}.get(self.path, CONTENT)
        if self.path == "/missing":
            self.send_error(404)
            return
        sent = content[:100] if self.path in ("/cut", "/short") else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent if self.path == "/short" else content)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        pass


class LocalFile(RemoteFile):
    """A file with an address of this machine."""

    url: str

    @property
    def address(self) -> str:
        return self.url


@pytest.fixture(scope="module")
def publisher() -> Iterator[str]:
    """Address of a server that publishes well and badly."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def local(url: str) -> LocalFile:
    """The file that should be CONTENT."""
    return LocalFile(name="folder/counts.bin", n_bytes=len(CONTENT), sha256=DIGEST, url=url)


def test_a_file_is_downloaded_once(publisher: str, tmp_path: Path) -> None:
    """It lies under its name in the cache directory, and the next time no network is needed."""
    path = registry.fetch(local(f"{publisher}/whole"), tmp_path)
    assert path == tmp_path / "folder/counts.bin"
    assert path.read_bytes() == CONTENT
    assert registry.fetch(local("http://127.0.0.1:1/nowhere"), tmp_path) == path


def test_a_changed_file_is_refused(publisher: str, tmp_path: Path) -> None:
    """The file, the expected and the found sha256 are named, and nothing is kept."""
    found = hashlib.sha256(b"x" * len(CONTENT)).hexdigest()
    with pytest.raises(registry.HashMismatch, match=f"counts.bin.*|{found}.*{DIGEST}"):
        registry.fetch(local(f"{publisher}/changed"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("way", ["cut", "short"])
def test_a_truncated_download_is_refused(publisher: str, tmp_path: Path, way: str) -> None:
    """Whether the connection broke or the server announced too little: bytes that came and bytes that should have come are named."""
    with pytest.raises(registry.TruncatedDownload, match=r"of 6,000 bytes came"):
        registry.fetch(local(f"{publisher}/{way}"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_missing_network_is_said(tmp_path: Path) -> None:
    """With the address and the way out."""
    with pytest.raises(registry.NetworkUnavailable, match=r"127\.0\.0\.1:1/nowhere.*CELLSERVE_DATA"):
        registry.fetch(local("http://127.0.0.1:1/nowhere"), tmp_path)


def test_a_file_that_is_gone_is_said(publisher: str, tmp_path: Path) -> None:
    """With the server's answer."""
    with pytest.raises(registry.NetworkUnavailable, match="HTTP 404"):
        registry.fetch(local(f"{publisher}/missing"), tmp_path)


def test_a_changed_cached_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    """It may be somebody's own file, so it is not overwritten."""
    path = tmp_path / "folder/counts.bin"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(registry.HashMismatch, match="Delete it"):
        registry.fetch(local("http://127.0.0.1:1/nowhere"), tmp_path)
    assert path.read_bytes() == b"mine"


def test_a_file_without_address_has_to_be_put_there(tmp_path: Path) -> None:
    """Not everything is published."""
    file = RemoteFile(name="own.tsv", n_bytes=1, sha256=DIGEST)
    with pytest.raises(registry.NoAddress, match="by hand"):
        registry.fetch(file, tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """Typing errors are met by the list."""
    with pytest.raises(registry.UnknownDataset, match="pbmc_facs, pbmc3k"):
        registry.find("pbmc")


@pytest.mark.parametrize("name", DATASETS)
def test_every_address_is_at_a_full_commit(name: str) -> None:
    """An address never points to a branch, whose bytes may change, and is quoted."""
    for file in DATASETS[name].files:
        if file.address is None:
            assert name == "cell_ontology"
        else:
            assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/raw/[0-9a-f]{40}/[\w./%-]+", file.address)
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)


@pytest.mark.parametrize("name", DATASETS)
def test_every_cached_file_has_the_published_bytes(name: str) -> None:
    """The table's sums are those of the files that we have."""
    for file in DATASETS[name].files:
        path = registry.cache_directory() / file.name
        if not path.is_file():
            pytest.skip(f"{file.name} is not in {registry.cache_directory()}")
        assert path.stat().st_size == file.n_bytes
        assert registry.fetch(file) == path
