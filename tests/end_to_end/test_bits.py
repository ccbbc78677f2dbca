"""The same cell has the same bits, whatever surrounds it."""

import asyncio
import json
from collections.abc import Callable

import anndata as ad
import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from tests.builders import arrow_body, json_body
from tests.end_to_end.conftest import STORE, many
from tests.end_to_end.server import Server

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
JSON = {"Content-Type": "application/json"}
COMPANY = 4096


def latent_of(answer: httpx.Response) -> NDArray[np.float32]:
    """The latent of an answer in either format, float32 of shape (n_cells, n_latent)."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        return np.array([cell["latent"] for cell in answer.json()["cells"]], dtype=np.float32)
    table = pa.ipc.open_stream(answer.content).read_all()
    column = table.column("latent").combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


@pytest.fixture(scope="module")
def genes(cells: ad.AnnData) -> tuple[str, ...]:
    return tuple(cells.var_names)


@pytest.fixture(scope="module")
def alone(server: Server, cells: ad.AnnData, genes: tuple[str, ...]) -> NDArray[np.float32]:
    """Each cell's latent when it is sent by itself: what all other ways are compared with."""
    counts = sp.csr_matrix(cells.X)
    return np.concatenate(
        [
            latent_of(httpx.post(server.url + "/v1/embed", content=arrow_body(counts[row], genes), headers=ARROW))
            for row in range(cells.n_obs)
        ]
    )


def embed(server: Server, counts: sp.csr_matrix, genes: tuple[str, ...]) -> NDArray[np.float32]:
    """The latent of cells sent in one Arrow request."""
    return latent_of(httpx.post(server.url + "/v1/embed", content=arrow_body(counts, genes), headers=ARROW, timeout=60))


@pytest.mark.parametrize("position", [0, COMPANY // 2 - 3, COMPANY - 1], ids=["first", "middle", "last"])
def test_in_company(
    server: Server, cells: ad.AnnData, genes: tuple[str, ...], alone: NDArray[np.float32], position: int
) -> None:
    """A cell first, in the middle and last of 4,096 has the bits that it has alone."""
    counts = sp.csr_matrix(cells.X)
    company = many(cells, COMPANY - 1)
    everyone = sp.vstack([company[:position], counts[3], company[position:]], format="csr")

    assert embed(server, everyone, genes)[position].tobytes() == alone[3].tobytes()


def test_all_at_once(server: Server, cells: ad.AnnData, genes: tuple[str, ...], alone: NDArray[np.float32]) -> None:
    """Cells sent together have the bits that they have alone, in the order sent."""
    assert embed(server, sp.csr_matrix(cells.X), genes).tobytes() == alone.tobytes()


def test_json_and_arrow(server: Server, cells: ad.AnnData, genes: tuple[str, ...], alone: NDArray[np.float32]) -> None:
    """JSON and Arrow, in and out in all four combinations, give the same bits."""
    counts = sp.csr_matrix(cells.X)
    for body, sent in ((json_body(counts, genes), JSON), (arrow_body(counts, genes), ARROW)):
        for wanted in (JSON, ARROW):
            headers = {**sent, "Accept": wanted["Content-Type"]}
            assert (
                latent_of(httpx.post(server.url + "/v1/embed", content=body, headers=headers)).tobytes()
                == alone.tobytes()
            )


def test_dense_json(server: Server, cells: ad.AnnData, genes: tuple[str, ...], alone: NDArray[np.float32]) -> None:
    """A dense list of counts and a map of the counts that are not zero give the same bits."""
    body = json.dumps({"genes": genes, "cells": cells.X.toarray().astype(int).tolist()})

    assert latent_of(httpx.post(server.url + "/v1/embed", content=body, headers=JSON)).tobytes() == alone.tobytes()


def shuffled(counts: sp.csr_matrix, genes: tuple[str, ...]) -> tuple[sp.csr_matrix, tuple[str, ...]]:
    order = np.random.default_rng(1).permutation(len(genes))
    return counts[:, order], tuple(genes[column] for column in order)


def with_strangers(counts: sp.csr_matrix, genes: tuple[str, ...]) -> tuple[sp.csr_matrix, tuple[str, ...]]:
    strangers = sp.csr_matrix(np.full((counts.shape[0], 3), 7.0))
    return sp.hstack([strangers, counts], format="csr"), ("not-a-gene", "nor-this", "ENSG99999999999", *genes)


def split_columns(counts: sp.csr_matrix, genes: tuple[str, ...]) -> tuple[sp.csr_matrix, tuple[str, ...]]:
    half = counts.copy()
    half.data = np.floor(half.data / 2)
    return sp.hstack([half, counts - half], format="csr"), (*genes, *genes)


@pytest.mark.parametrize("change", [shuffled, with_strangers, split_columns])
def test_genes(
    server: Server,
    cells: ad.AnnData,
    genes: tuple[str, ...],
    alone: NDArray[np.float32],
    change: Callable[[sp.csr_matrix, tuple[str, ...]], tuple[sp.csr_matrix, tuple[str, ...]]],
) -> None:
    """Genes in another order, genes that the model does not use, and counts split over two columns of one gene change nothing."""
    counts, names = change(sp.csr_matrix(cells.X), genes)

    assert embed(server, counts, names).tobytes() == alone.tobytes()


def test_ensembl_ids_with_versions(server: Server, cells: ad.AnnData, alone: NDArray[np.float32]) -> None:
    """Ensembl ids with a version give the bits that symbols give."""
    names = tuple(f"{gene_id}.7" for gene_id in cells.var["gene_id"])

    assert embed(server, sp.csr_matrix(cells.X), names).tobytes() == alone.tobytes()


async def test_32_concurrent_clients(
    server: Server, cells: ad.AnnData, genes: tuple[str, ...], alone: NDArray[np.float32]
) -> None:
    """32 clients at once, each with its own cells in its own format, all get the bits that the cells have alone."""
    counts = sp.csr_matrix(cells.X)

    async def client(number: int) -> None:
        random = np.random.default_rng(number)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            for _ in range(6):
                rows = random.integers(0, cells.n_obs, random.integers(1, 40))
                body, headers = (
                    (arrow_body(counts[rows], genes), ARROW) if number % 2 else (json_body(counts[rows], genes), JSON)
                )
                answer = await http.post("/v1/embed", content=body, headers=headers)
                assert latent_of(answer).tobytes() == alone[rows].tobytes()

    await asyncio.gather(*(client(number) for number in range(32)))


def test_after_a_restart(cells: ad.AnnData, genes: tuple[str, ...], alone: NDArray[np.float32]) -> None:
    """Another process of the same service gives the same bits, with another number of threads too."""
    other = Server(STORE, CELLSERVE_THREADS="1", CELLSERVE_BATCH_ROWS="64")
    try:
        other.start().wait_until_ready()
        assert embed(other, sp.csr_matrix(cells.X), genes).tobytes() == alone.tobytes()
        assert other.stop() == 0
    finally:
        other.close()
