"""A client: AnnData in, AnnData out, over HTTP. Needs httpx, pyarrow, anndata and numpy, and nothing else of this project.

from service.client import Client

with Client("http://localhost:3000") as client:
    adata = client.annotate(adata)          # obs: predicted_labels, conf_score, …; obsm: probabilities
    adata = client.embed(adata)             # obsm: X_pbmc
"""

import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

ARROW = "application/vnd.apache.arrow.stream"


class CellserveProblem(Exception):
    """The server refused; `code` is stable and says why, the message says what to do."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        n_before = document.get("n_cells_before")
        where = f" (counted from cell {n_before} of the stream)" if n_before else ""
        super().__init__(f"{document.get('detail', document)}{where} [{document.get('code', status)}]")
        self.status = status
        self.code: str = document.get("code", "unknown")
        self.document = document


class Client:
    """Talks to one server. Use as a context manager, or call `close`."""

    def __init__(
        self, url: str, *, model: str | None = None, cells_per_request: int = 2048, timeout: float = 120
    ) -> None:
        """Make a client.

        Args:
            url: of the server, for example http://localhost:3000.
            model: `name`, `name@version` or `name@alias`; may be left out where the server has one model.
            cells_per_request: larger data sets are sent in pieces of this many cells. Answers do not depend on it.
            timeout: seconds for one request.
        """
        self.model = model
        self.cells_per_request = cells_per_request
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The models of the server, as GET /v1/models lists them."""
        models: list[dict[str, Any]] = _checked(self._http.get("/v1/models")).json()["models"]
        return models

    def embed(self, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None) -> ad.AnnData:
        """A copy with the latent in obsm["X_<model>"]. Arguments and errors as of `run`."""
        return self.run("embed", adata, layer=layer, gene_key=gene_key)

    def annotate(self, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None) -> ad.AnnData:
        """A copy with `predicted_labels` and `conf_score` in obs. Arguments and errors as of `run`."""
        return self.run("annotate", adata, layer=layer, gene_key=gene_key)

    def reconstruct(
        self, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None, **options: Any
    ) -> ad.AnnData:
        """A copy with the expected counts in obsm["expression"], a data frame over genes. Arguments and errors as of `run`."""
        return self.run("reconstruct", adata, layer=layer, gene_key=gene_key, **options)

    def explain(
        self, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None, **options: Any
    ) -> ad.AnnData:
        """A copy with the genes that speak for each cell's label in obsm["top_genes"] and what they add in obsm["top_attributions"].

        Options as of POST /v1/explain: `label`, `unit` or `direction` (see `direction_between`), `method`, `baseline`, `steps`, `top`.
        Arguments and errors as of `run`.
        """
        return self.run("explain", adata, layer=layer, gene_key=gene_key, **options)

    def direction_between(
        self, adata: ad.AnnData, first: Any, second: Any, *, layer: str | None = None, gene_key: str | None = None
    ) -> str:
        """The direction in latent space from one group of cells to another, as `explain` takes it: positive genes speak for the second.

        Args:
            adata: cells by genes.
            first: of the cells: positions, names or a mask, as adata[first] takes them.
            second: likewise.
            layer: as of `run`.
            gene_key: as of `run`.

        Raises:
            ValueError: a group is empty; and as of `run`.
        """
        groups = [adata[first], adata[second]]
        if any(group.n_obs == 0 for group in groups):
            raise ValueError("a group has no cell")
        answers = [self.embed(group, layer=layer, gene_key=gene_key) for group in groups]
        name = json.loads(answers[0].uns["cellserve"]["embed"])["model"]["name"]
        one, other = (answer.obsm[f"X_{name}"].mean(axis=0, dtype=np.float64) for answer in answers)
        difference = other - one
        return ",".join(f"{value:.9g}" for value in difference / np.linalg.norm(difference))

    def run(
        self, task: str, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None, **options: Any
    ) -> ad.AnnData:
        """Send all cells to a task and put the answer into a copy.

        Args:
            task: a task of the server: embed, annotate, reconstruct, …
            adata: cells by genes. Counts are taken from `layer`, or else from layers["counts"], raw.X, X, the first that there is.
            layer: layer that holds the raw counts; "X" for X.
            gene_key: column of var with gene names; var_names by default.
            options: of the task, as the API documents them.

        Returns:
            A copy in the same order of cells: one column of obs per single value, one entry of obsm per vector, and
            uns["cellserve"][task] with the model, the gene-alignment report and where the counts were found.

        Raises:
            CellserveProblem: the server refused.
            KeyError: there is no such layer or column.
            ValueError: there is no cell.
        """
        counts, genes, source = find_counts(adata, layer, gene_key)
        parameters = {**options, **({"model": self.model} if self.model else {})}
        tables = []
        for body in bodies(counts, genes, self.cells_per_request):
            response = self._http.post(f"/v1/{task}", params=parameters, content=body, headers={"Content-Type": ARROW})
            tables.append(read_answer(_checked(response).content))
            # All pieces by one version, whatever becomes of the name meanwhile or to whom it is split.
            parameters["model"] = response.headers.get("X-Cellserve-Model", parameters.get("model"))
        return fill(adata, tables, source)

    def stream(
        self, task: str, pieces: Iterable[sp.csr_matrix], genes: list[str], **options: Any
    ) -> Iterator[pa.RecordBatch]:
        """Send cells of any number through one connection and give their answers as they come; neither side holds them whole.

        Args:
            task: a task of the server.
            pieces: raw counts of some cells each, over `genes`; taken one after the other, only as fast as answers are read.
            genes: names of the columns.
            options: of the task.

        Yields:
            Record batches with the answers of the cells in order, of any number of cells each; the head of the answer is JSON under
            "cellserve" of the schema's metadata.

        Raises:
            CellserveProblem: the server refused, at once or in the middle.
            ConnectionError: the answer broke off.
        """
        url = self._http.base_url
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.host, url.port, timeout=self._http.timeout.read)
        query = httpx.QueryParams({**options, **({"model": self.model} if self.model else {})})
        connection.putrequest("POST", f"{url.path}v1/{task}?{query}")
        headers = {"Content-Type": ARROW, "Accept": ARROW, "Transfer-Encoding": "chunked", "X-Cellserve-Stream": "1"}
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        sender = _Sender(connection, pieces, genes, self.cells_per_request)
        sender.start()
        try:
            response = connection.getresponse()
            if response.status != 200:
                raise CellserveProblem(response.status, json.loads(response.read()))
            yield from _streamed_batches(response)
        except (http.client.HTTPException, OSError, pa.ArrowException) as error:
            raise sender.error or ConnectionError(f"the answer broke off: {error!r}") from error
        finally:
            sender.stop()
        if sender.error is not None:
            raise sender.error


class _Sender(threading.Thread):
    """Writes the body while the answer is read."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        pieces: Iterable[sp.csr_matrix],
        genes: list[str],
        cells_per_request: int,
    ) -> None:
        super().__init__(name="cellserve-send", daemon=True)
        self._connection, self._pieces, self._genes, self._size = connection, pieces, genes, cells_per_request
        self.error: Exception | None = None

    def run(self) -> None:
        """Send all pieces as one stream."""
        try:
            header: bytes | None = None
            for piece in self._pieces:
                for body in bodies(piece, self._genes, self._size, is_wide=True):
                    # Each body is a whole stream; of the first the schema is kept, of each its cells.
                    begin = 8 + int.from_bytes(body[4:8], "little")
                    self._send(body[:-8] if header is None else body[begin:-8])
                    header = body[:begin]
            if header is not None:
                self._send(b"\xff\xff\xff\xff\x00\x00\x00\x00")
            self._connection.send(b"0\r\n\r\n")
        except OSError:
            return  # the server stopped reading: its answer says why
        except Exception as error:  # of the caller's iterator; raised where the answers are read
            self.error = error
            self.stop()

    def stop(self) -> None:
        """Break off what is still being sent."""
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, content: bytes) -> None:
        self._connection.send(b"%x\r\n" % len(content) + content + b"\r\n")


def _streamed_batches(response: http.client.HTTPResponse) -> Iterator[pa.RecordBatch]:
    with pa.ipc.open_stream(response) as reader:
        while True:
            try:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                return
            if metadata is not None and b"cellserve-problem" in metadata:
                document = json.loads(metadata[b"cellserve-problem"])
                raise CellserveProblem(document["status"], document)
            yield batch


def bodies(counts: sp.csr_matrix, genes: list[str], cells_per_request: int, is_wide: bool = False) -> Iterator[bytes]:
    """Arrow streams of some cells each, with the narrowest integers that hold them; if wide, counts in float32, so that all have one schema."""
    metadata = {"genes": json.dumps(genes)}
    gene_type = pa.uint16() if len(genes) <= 2**16 else pa.int32()
    for start in range(0, counts.shape[0], cells_per_request):
        piece = counts[start : start + cells_per_request]
        offsets = pa.array(piece.indptr, pa.int32())
        batch = pa.record_batch(
            {
                "gene": pa.ListArray.from_arrays(offsets, pa.array(piece.indices).cast(gene_type)),
                "count": pa.ListArray.from_arrays(
                    offsets, pa.array(piece.data.astype(np.float32) if is_wide else _narrow(piece.data))
                ),
            }
        ).replace_schema_metadata(metadata)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield sink.getvalue()


def find_counts(
    adata: ad.AnnData, layer: str | None = None, gene_key: str | None = None
) -> tuple[sp.csr_matrix, list[str], str]:
    """Counts, names of their genes and where they were found: `layer`, or else layers["counts"], raw.X, X, the first that there is.

    Raises:
        KeyError: there is no such layer or column.
    """
    var = adata.var
    if layer not in (None, "X"):
        if layer not in adata.layers:
            raise KeyError(f"There is no layer {layer!r}; there are: {', '.join(adata.layers) or 'none'}.")
        matrix, source = adata.layers[layer], f"layers[{layer!r}]"
    elif layer is None and "counts" in adata.layers:
        matrix, source = adata.layers["counts"], "layers['counts']"
    elif layer is None and adata.raw is not None:
        matrix, source, var = adata.raw.X, "raw.X", adata.raw.var
    else:
        matrix, source = adata.X, "X"
    if gene_key is not None and gene_key not in var:
        raise KeyError(f"There is no column {gene_key!r} in var; there are: {', '.join(var.columns) or 'none'}.")
    genes = [str(gene) for gene in (var.index if gene_key is None else var[gene_key])]
    return sp.csr_matrix(matrix), genes, source


def _narrow(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Counts in 8 or 16 bits where all are whole and fit, which makes the body small; otherwise as they are, for the server to judge."""
    if len(counts) and counts.min() >= 0 and counts.max() < 2**16:
        narrow = counts.astype(np.uint8 if counts.max() < 2**8 else np.uint16)
        if (narrow == counts).all():
            return narrow
    return counts if counts.dtype in (np.int32, np.int64, np.float32, np.float64) else counts.astype(np.float64)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
        raise CellserveProblem(response.status_code, response.json() if is_problem else {"detail": response.text[:200]})
    return response


def read_answer(content: bytes) -> pa.Table:
    """The table of an Arrow answer.

    Raises:
        pa.ArrowInvalid: it is cut off.
    """
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()


def fill(adata: ad.AnnData, answers: list[pa.Table], counts_source: str) -> ad.AnnData:
    """A copy of `adata` with the columns of its answers, which hold its cells in order, in obs and obsm.

    Raises:
        ValueError: the answers hold another number of cells.
    """
    if sum(len(table) for table in answers) != adata.n_obs or not answers:
        raise ValueError(f"{adata.n_obs} cells, but answers for {sum(len(table) for table in answers)}.")
    head = json.loads(answers[-1].schema.metadata[b"cellserve"])
    # The head differs from piece to piece (its request id), the columns do not.
    table = pa.concat_tables([answer.replace_schema_metadata(None) for answer in answers])
    answer = adata.copy()
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if pa.types.is_fixed_size_list(field.type):
            flat = column.flatten()
            is_words = pa.types.is_dictionary(flat.type)
            values = np.array(flat.to_pylist(), object) if is_words else flat.to_numpy()
            values = values.reshape(len(column), field.type.list_size)
            names = json.loads((field.metadata or {}).get(b"names", b"null"))
            if names is not None:
                answer.obsm[field.name] = pd.DataFrame(values, index=answer.obs_names, columns=names)
            else:
                answer.obsm[f"X_{head['model']['name']}" if field.name == "latent" else field.name] = values
        elif pa.types.is_dictionary(field.type):
            answer.obs[field.name] = pd.Categorical(column.to_pylist(), categories=column.dictionary.to_pylist())
        else:
            answer.obs[field.name] = column.to_numpy(zero_copy_only=False)
    about = json.dumps({**head, "counts_source": counts_source})
    answer.uns["cellserve"] = {**answer.uns.get("cellserve", {}), head["task"]: about}
    return answer
