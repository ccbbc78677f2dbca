"""Files as bodies and answers, within one process: every format into every other, bounds, and what is left on the disk."""

import asyncio
import csv
import io
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest

from service import metrics
from service.cells.formats import BODIES, FORMATS
from service.inference import TASKS
from tests.builders import CLASSES, arrow_body, counts, gene_table, json_body
from tests.conftest import serving
from tests.service.api.test_tasks import code_of

H5AD, CSV = "application/x-hdf5", "text/csv"
JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
GENES = gene_table().gene_symbol
COUNTS = counts(30)
IDS = tuple(f"cell-{number}" for number in range(30))


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """An .h5ad file of 30 cells."""
    adata = ad.AnnData(COUNTS)
    adata.var_names, adata.obs_names = list(GENES), list(IDS)
    adata.write_h5ad(tmp_path / "a.h5ad")
    return (tmp_path / "a.h5ad").read_bytes()


def opened(answer: httpx.Response, path: Path) -> ad.AnnData:
    """The .h5ad answer, as anndata reads it."""
    assert answer.status_code == 200, answer.text
    path.write_bytes(answer.content)
    return ad.read_h5ad(path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("body_type", BODIES)
async def test_every_format_into_every_other(
    client: httpx.AsyncClient, content: bytes, tmp_path: Path, task: str, body_type: str
) -> None:
    """The same cells have the same answer, to the bit, in whatever form they come and go."""
    body = {JSON: json_body(COUNTS, GENES, IDS), ARROW: arrow_body(COUNTS, GENES, IDS), H5AD: content}[body_type]
    answers = {
        form: await client.post(f"/v1/{task}", content=body, headers={"Content-Type": body_type, "Accept": form})
        for form in FORMATS
    }

    assert {form: answer.headers["content-type"].split(";")[0] for form, answer in answers.items()} == {
        form: form for form in FORMATS
    }
    table = pa.ipc.open_stream(answers[ARROW].content).read_all()
    adata = opened(answers[H5AD], tmp_path / "answer.h5ad")
    rows = list(csv.DictReader(io.StringIO(answers[CSV].text, newline="")))
    assert list(adata.obs_names) == [row["cell_id"] for row in rows] == table.column("cell_id").to_pylist() == list(IDS)
    for number, cell in enumerate(answers[JSON].json()["cells"]):
        for name, value in cell.items():
            if name == "cell_id":
                continue
            if isinstance(value, list) and isinstance(value[0], str):
                assert adata.obsm[name][number].tolist() == value
                assert [rows[number][f"{name}_{place}"] for place in range(len(value))] == value
            elif isinstance(value, dict | list):
                found = adata.obsm["X_tiny" if name == "latent" else name][number]
                names = list(value) if isinstance(value, dict) else range(len(value))
                numbers = np.array(list(value.values()) if isinstance(value, dict) else value, np.float32)
                assert found.tobytes() == numbers.tobytes()
                assert [np.float32(rows[number][f"{name}_{part}"]) for part in names] == list(numbers)
            elif isinstance(value, bool | str):
                assert adata.obs[name].iloc[number] == value
                assert rows[number][name] == str(value if isinstance(value, str) else str(value).lower())
            else:
                assert adata.obs[name].iloc[number] == np.float32(value) == np.float32(rows[number][name])
    (head,) = adata.uns["cellserve"].values()
    assert '"n_cells": 30' in head


async def test_the_answer_is_anndata(client: httpx.AsyncClient, content: bytes, tmp_path: Path) -> None:
    """Labels are categories with all classes, names of vectors stand in uns, and what is read can be written again."""
    answer = await client.post("/v1/annotate", content=content, headers={"Content-Type": H5AD})
    adata = opened(answer, tmp_path / "answer.h5ad")

    assert int(answer.headers["content-length"]) == len(answer.content)
    assert list(adata.obs["predicted_labels"].cat.categories) == [*CLASSES, "Unknown"]
    assert adata.obs["conf_score"].dtype == np.float32
    assert list(adata.obs.columns) == ["predicted_labels", "conf_score", "is_empty"]
    assert list(adata.uns["cellserve_names"]["probabilities"]) == list(CLASSES)
    adata.write_h5ad(tmp_path / "again.h5ad")


async def test_options(client: httpx.AsyncClient, content: bytes) -> None:
    """Where counts and genes are can be said; what is not there, contradicts itself or belongs to another format is refused."""
    headers = {"Content-Type": H5AD, "Accept": JSON}
    answer = await client.post("/v1/embed?layer=X&use_raw=false", content=content, headers=headers)
    assert answer.json()["counts"]["source"] == "X"
    for query, found in (
        ("layer=nope", "Option 'layer': the file has no 'layers/nope'. It has: X."),
        ("use_raw=true", "Option 'use_raw': the file has no 'raw/X'"),
        ("use_raw=perhaps", "Option 'use_raw'"),
        ("layer=X&use_raw=true", "give either layer or use_raw"),
        ("gene_key=nope", "Option 'gene_key': 'var' has no column 'nope'"),
        ("surprise=1", "Option 'surprise'"),
    ):
        answer = await client.post(f"/v1/embed?{query}", content=content, headers=headers)
        assert code_of(answer) == (400, "invalid_option")
        assert found in answer.json()["detail"]
    answer = await client.post("/v1/embed?layer=X", content=json_body(COUNTS, GENES), headers={"Content-Type": JSON})
    assert code_of(answer) == (400, "invalid_option")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda adata: adata.X.data.__setitem__(200, 0.5), (422, "not_raw_counts")),
        (lambda adata: adata.X.data.__setitem__(200, -1), (422, "not_raw_counts")),
        (lambda adata: adata.X.data.__setitem__(200, np.nan), (422, "not_raw_counts")),
        (lambda adata: setattr(adata, "var_names", [f"x{number}" for number in range(40)]), (422, "too_few_genes")),
        (lambda adata: setattr(adata, "obs_names", [f"\n{number}" for number in range(30)]), (422, "invalid_cells")),
    ],
)
async def test_wrong_cells(
    client: httpx.AsyncClient, tmp_path: Path, change: object, expected: tuple[int, str]
) -> None:
    """What is wrong with cells is what is wrong with them in other formats; the next file is answered."""
    adata = ad.AnnData(COUNTS.copy())
    adata.var_names, adata.obs_names = list(GENES), list(IDS)
    adata.write_h5ad(tmp_path / "good.h5ad")
    change(adata)  # type: ignore[operator]
    adata.write_h5ad(tmp_path / "wrong.h5ad")
    headers = {"Content-Type": H5AD, "Accept": JSON}

    wrong = await client.post("/v1/embed", content=(tmp_path / "wrong.h5ad").read_bytes(), headers=headers)
    good = await client.post("/v1/embed", content=(tmp_path / "good.h5ad").read_bytes(), headers=headers)

    assert code_of(wrong) == expected
    assert good.status_code == 200


async def test_a_wrong_cell_far_behind(
    client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell is named by its place in the file, however many were read before it."""
    many = counts(4_000, n_genes=1_000)
    many.data[-3] = 0.5
    adata = ad.AnnData(many)
    adata.var_names = [*GENES, *(f"other{number}" for number in range(960))]
    adata.write_h5ad(tmp_path / "a.h5ad")

    answer = await client.post(
        "/v1/embed", content=(tmp_path / "a.h5ad").read_bytes(), headers={"Content-Type": H5AD, "Accept": JSON}
    )

    assert code_of(answer) == (422, "not_raw_counts")
    assert answer.json()["cell"] == "Cell 3999 ('3999')"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_upload_bytes": 1024}, (413, "body_too_large")),
        ({"max_upload_bytes_in_flight": 30_000}, (429, "too_many_bytes")),
        ({"max_cells": 29}, (413, "too_many_cells")),
        ({"parse_seconds": 0.001}, (413, "file_needs_too_much")),
    ],
)
async def test_bounds(tiny_path: Path, content: bytes, changes: dict[str, float], expected: tuple[int, str]) -> None:
    """Each bound has its answer, before or after the body, and nothing stays held."""
    before = metrics.UPLOAD_BYTES_IN_FLIGHT._value.get()
    async with serving(tiny_path, **changes) as client:
        answer = await client.post("/v1/embed", content=content, headers={"Content-Type": H5AD, "Accept": JSON})

    assert code_of(answer) == expected
    assert metrics.UPLOAD_BYTES_IN_FLIGHT._value.get() == before


async def test_nothing_stays(tiny_path: Path, content: bytes, tmp_path: Path) -> None:
    """After answers and refusals no file is left, none is open, and no byte is held."""
    directory = tmp_path / "uploads"
    directory.mkdir()
    async with serving(tiny_path, upload_directory=directory) as client:
        for body in (content, content[:2000], b"nothing"):
            for accept in (H5AD, JSON):
                await client.post("/v1/embed", content=body, headers={"Content-Type": H5AD, "Accept": accept})
        held = client.state.uploads.intake._n_bytes
        open_files = [file.path for file in psutil.Process().open_files() if file.path.startswith(str(directory))]

    assert (list(directory.iterdir()), open_files, held) == ([], [], 0)


async def test_a_full_disk(tiny_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be written for want of space, that is said as such."""
    async with serving(tiny_path) as client:
        with monkeypatch.context() as patch:
            full = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115 - closed by the service
            patch.setattr("tempfile.TemporaryFile", lambda dir: full)  # noqa: A006 - tempfile's own name
            answer = await client.post("/v1/embed", content=content, headers={"Content-Type": H5AD, "Accept": JSON})

    assert code_of(answer) == (507, "no_disk_space")


def children() -> list[psutil.Process]:
    """Processes that read files, of this one."""
    return [child for child in psutil.Process().children() if "service.cells.hdf5.process" in " ".join(child.cmdline())]


async def test_a_reader_that_is_killed(tiny_path: Path, content: bytes) -> None:
    """What kills the process that reads is an answer to that client; the others, and the next file, get theirs."""
    before = {child.pid for child in children()}
    async with serving(tiny_path) as client:
        headers = {"Content-Type": H5AD, "Accept": JSON}
        assert (await client.post("/v1/embed", content=content, headers=headers)).status_code == 200
        (reader,) = (child for child in children() if child.pid not in before)
        os.kill(reader.pid, signal.SIGSTOP)
        upload = asyncio.create_task(client.post("/v1/embed", content=content, headers=headers))
        await asyncio.sleep(0.2)
        other = await client.post("/v1/embed", content=json_body(COUNTS, GENES), headers={"Content-Type": JSON})
        os.kill(reader.pid, signal.SIGKILL)
        refused = await upload
        again = await client.post("/v1/embed", content=content, headers=headers)

    assert (other.status_code, again.status_code) == (200, 200)
    assert code_of(refused) == (400, "file_reader_ended")
    assert "SIGKILL" in refused.json()["detail"]
    assert {child.pid for child in children()} == before


async def test_a_writer_that_is_killed(tiny_path: Path, content: bytes) -> None:
    """What kills the process that writes an answer is an error of the server, before the status is sent."""
    before = {child.pid for child in children()}
    async with serving(tiny_path) as client:
        headers = {"Content-Type": JSON, "Accept": H5AD}
        body = json_body(COUNTS, GENES)
        assert (await client.post("/v1/embed", content=body, headers=headers)).status_code == 200
        (writer,) = (child for child in children() if child.pid not in before)
        os.kill(writer.pid, signal.SIGSTOP)
        answer = asyncio.create_task(client.post("/v1/embed", content=body, headers=headers))
        await asyncio.sleep(0.2)
        os.kill(writer.pid, signal.SIGKILL)

        assert code_of(await answer) == (500, "answer_not_written")


async def test_a_client_that_leaves(tiny_path: Path, content: bytes) -> None:
    """The process that reads for a client is ended when the client leaves: nobody waits for what it would say."""
    before = {child.pid for child in children()}
    async with serving(tiny_path) as client:
        headers = {"Content-Type": H5AD, "Accept": JSON}
        await client.post("/v1/embed", content=content, headers=headers)
        (reader,) = (child for child in children() if child.pid not in before)
        os.kill(reader.pid, signal.SIGSTOP)
        upload = asyncio.create_task(client.post("/v1/embed", content=content, headers=headers))
        await asyncio.sleep(0.2)
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        await asyncio.sleep(0.2)

        assert reader.pid not in {child.pid for child in children()}
        assert client.state.uploads.intake._n_bytes == 0


async def test_a_slow_body(tiny_path: Path, content: bytes) -> None:
    """A body that does not arrive in time is given up."""

    async def slow() -> AsyncIterator[bytes]:
        yield content[:100]
        await asyncio.sleep(5)

    async with serving(tiny_path, upload_timeout=0.2) as client:
        answer = await client.post("/v1/embed", content=slow(), headers={"Content-Type": H5AD})

    assert code_of(answer) == (408, "body_timeout")


async def test_pieces_join(tiny_path: Path, content: bytes, tmp_path: Path) -> None:
    """An answer that comes in many pieces is the answer in one piece."""
    found = []
    for batch_rows in (256, 7):
        async with serving(tiny_path, batch_rows=batch_rows) as client:
            headers = {"Content-Type": H5AD, "X-Request-ID": "same"}
            adata = opened(await client.post("/v1/annotate", content=content, headers=headers), tmp_path / "a.h5ad")
            lines = await client.post("/v1/annotate", content=content, headers={**headers, "Accept": CSV})
            found.append((adata, lines.text))

    assert found[0][1] == found[1][1]
    assert found[0][0].obs.equals(found[1][0].obs)
    assert found[0][0].uns["cellserve"] == found[1][0].uns["cellserve"]
    assert np.array_equal(found[0][0].obsm["probabilities"], found[1][0].obsm["probabilities"])
