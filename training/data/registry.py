"""Named data sets: where each file is published, what its bytes must hash to, and how it is read. The table is sources.yaml."""

import hashlib
import os
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pooch
import requests
import yaml
from anndata import AnnData
from pydantic import BaseModel, ConfigDict

from training.data.readers import READERS

CACHE_VARIABLE = "CELLSERVE_DATA"
"""Environment variable with the cache directory; without it the user's own cache directory is used."""


class UnknownDataset(Exception):
    """No data set has that name."""


class HashMismatch(Exception):
    """A file is whole, but its bytes are not those that were published."""


class TruncatedDownload(Exception):
    """A download ended before the published number of bytes had come."""


class NetworkUnavailable(Exception):
    """A file is not in the cache and its address cannot be reached."""


class NoAddress(Exception):
    """A file is not in the cache and is published nowhere that we know of."""


class RemoteFile(BaseModel):
    """One published file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Where it lies below the cache directory."""

    n_bytes: int
    sha256: str
    repository: str | None = None
    commit: str | None = None
    path: str | None = None

    @property
    def address(self) -> str | None:
        """The URL at its full commit, None where it is published nowhere."""
        return f"https://github.com/{self.repository}/raw/{self.commit}/{quote(self.path)}" if self.path else None


class Dataset(BaseModel):
    """One data set: its files and how they become cells."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    shape: str
    licence: str
    files: tuple[RemoteFile, ...]
    reader: str | None = None
    """Key of READERS; None for tables and files that are not cells."""


def _load_table() -> dict[str, Dataset]:
    table = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text())
    return {name: Dataset(name=name, **entry) for name, entry in table.items()}


DATASETS: dict[str, Dataset] = _load_table()


def find(name: str) -> Dataset:
    """The data set called `name`.

    Raises:
        UnknownDataset: with the names that there are.
    """
    if name not in DATASETS:
        raise UnknownDataset(f"There is no data set '{name}'. Known: {', '.join(DATASETS)}.")
    return DATASETS[name]


def cache_directory() -> Path:
    """Where files are kept: $CELLSERVE_DATA, or the user's cache directory."""
    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("cellserve"))


def is_cached(dataset: Dataset, directory: Path | None = None) -> bool:
    """Whether all files of a data set lie in the cache with their published size."""
    directory = directory or cache_directory()
    paths = [(directory / file.name, file.n_bytes) for file in dataset.files]
    return all(path.is_file() and path.stat().st_size == n_bytes for path, n_bytes in paths)


def fetch(file: RemoteFile, directory: Path | None = None) -> Path:
    """The path of a file with the published bytes, downloaded if it is not in the cache.

    A file in the cache with the right sha256 is used as it is: nothing is written and no network is needed.

    Raises:
        HashMismatch: the cached or downloaded bytes are others than the published ones.
        TruncatedDownload: fewer bytes came than were published.
        NetworkUnavailable: the address cannot be reached.
        NoAddress: it is not cached and has no address.
    """
    directory = directory or cache_directory()
    path = directory / file.name
    if path.is_file():
        _check(path, file, "Delete it, and it will be downloaded again.")
        return path
    if file.address is None:
        raise NoAddress(f"{file.name} is not in {directory} and has no public address. Put it there by hand.")
    try:
        # pooch writes to a temporary file and renames it, so a broken download never takes the file's place.
        pooch.retrieve(file.address, f"sha256:{file.sha256}", path.name, path.parent, downloader=_download(file))
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, requests.exceptions.HTTPError) as error:
        reason = f"HTTP {error.response.status_code}" if error.response is not None else type(error).__name__
        raise NetworkUnavailable(
            f"{file.name} is not in {directory} and cannot be had from {file.address} ({reason}). Connect to the network, or "
            f"set {CACHE_VARIABLE} to a directory that holds the file."
        ) from None
    return path


def fetch_all(dataset: Dataset, directory: Path | None = None) -> dict[str, Path]:
    """Paths of a data set's files, by name; raises as `fetch` does."""
    return {file.name: fetch(file, directory) for file in dataset.files}


@cache
def _read(name: str, directory: Path) -> AnnData:
    dataset = find(name)
    if dataset.reader is None:
        raise UnknownDataset(f"'{name}' holds {dataset.shape}, not cells.")
    return READERS[dataset.reader](fetch_all(dataset, directory))


def read(name: str, directory: Path | None = None) -> AnnData:
    """The cells of a data set, as training/data/readers documents them.

    Raises:
        UnknownDataset: no such data set, or it holds no cells.
        as `fetch` does.
    """
    return _read(name, directory or cache_directory()).copy()


def _download(file: RemoteFile) -> pooch.HTTPDownloader:
    """A downloader that checks what came before pooch moves it into place."""
    fetch_over_http = pooch.HTTPDownloader(progressbar=False, timeout=60)

    def download(url: str, output: str, mover: pooch.Pooch) -> None:
        try:
            fetch_over_http(url, output, mover)
        except requests.exceptions.ChunkedEncodingError:
            raise _truncated(file, Path(output)) from None
        if Path(output).stat().st_size < file.n_bytes:
            raise _truncated(file, Path(output))
        _check(Path(output), file, f"{url} does not give the published file.")

    return download


def _truncated(file: RemoteFile, path: Path) -> TruncatedDownload:
    n_bytes = path.stat().st_size if path.is_file() else 0
    return TruncatedDownload(
        f"{file.name}: {n_bytes:,} of {file.n_bytes:,} bytes came from {file.address}. Nothing was kept; run the command again."
    )


def _check(path: Path, file: RemoteFile, advice: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file.sha256:
        raise HashMismatch(f"{path}: sha256 is {found}, expected {file.sha256}. {advice}")
