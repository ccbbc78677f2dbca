"""The client and its connection."""

import contextlib
import http.client
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from service.client.adata import bodies, column_of, fill, find_counts, read_answer
from service.client.clusters import majority_labels, over_cluster

ARROW = "application/vnd.apache.arrow.stream"
HDF5 = "application/x-hdf5"
OnProgress = Callable[[int, int | None], None]
"""Called with the number of cells that are answered, and of all where it is known."""


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

    def progress(self, request_id: str) -> dict[str, Any]:
        """How far a streamed or long request is, as GET /v1/requests/{request_id} says.

        Raises:
            CellserveProblem: the server knows none of this id, or not any more.
        """
        progress: dict[str, Any] = _checked(self._http.get(f"/v1/requests/{quote(request_id)}")).json()
        return progress

    def embed(
        self,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> ad.AnnData:
        """A copy with the latent in obsm["X_<model>"]. Arguments and errors as of `run`."""
        return self.run("embed", adata, layer=layer, gene_key=gene_key, on_progress=on_progress)

    def annotate(
        self,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> ad.AnnData:
        """A copy with `predicted_labels` and `conf_score` in obs. Arguments and errors as of `run`."""
        return self.run("annotate", adata, layer=layer, gene_key=gene_key, on_progress=on_progress)

    def describe(
        self, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None, **options: Any
    ) -> ad.AnnData:
        """A copy with all that is known of each cell: what `annotate`, `map` and `explain` say.

        Options as of POST /v1/describe: `top_k`, `coverage`, `unknown_threshold`, `k`, `top`. Arguments and errors as of `run`.
        """
        return self.run("describe", adata, layer=layer, gene_key=gene_key, **options)

    def vote(self, adata: ad.AnnData, *, cluster_key: str | None = None, min_share: float = 0.0) -> ad.AnnData:
        """A copy of annotated cells with `majority_labels` in obs: the label that most cells of a cell's cluster have.

        Args:
            adata: what `annotate` gave; without `cluster_key` what `embed` gave of it, too.
            cluster_key: column of obs with clusters; by default they are made of the latent by `over_cluster`, into obs["over_clustering"].
            min_share: a cluster whose most frequent label has a smaller share is `Heterogeneous`.

        Raises:
            KeyError: a column, or the latent, is not there.
        """
        answer = adata.copy()
        if cluster_key is None:
            key = next((key for key in adata.obsm if key.startswith("X_") and self._is_of_model(adata, key)), None)
            if key is None:
                raise KeyError(
                    "There is no latent in obsm. Call embed first, or name a column of obs with cluster_key."
                )
            answer.obs["over_clustering"] = over_cluster(adata.obsm[key])
        clusters = column_of(answer, cluster_key or "over_clustering")
        labels, shares = majority_labels(column_of(answer, "predicted_labels"), clusters, min_share)
        answer.obs["majority_labels"] = pd.Categorical(labels)
        about = {
            "depends_on": "all cells of the data set",
            "clusters": cluster_key or "over_clustering",
            "min_share": min_share,
        }
        answer.uns["cellserve"] = {**answer.uns.get("cellserve", {}), "vote": json.dumps({**about, "shares": shares})}
        return answer

    @staticmethod
    def _is_of_model(adata: ad.AnnData, key: str) -> bool:
        """Whether an entry of obsm is the latent that `embed` wrote."""
        about = adata.uns.get("cellserve", {}).get("embed")
        return about is not None and key == f"X_{json.loads(about)['model']['name']}"

    def reconstruct(
        self, adata: ad.AnnData, *, layer: str | None = None, gene_key: str | None = None, **options: Any
    ) -> ad.AnnData:
        """A copy with the expected counts in obsm["expression"], a data frame over genes. Arguments and errors as of `run`."""
        return self.run("reconstruct", adata, layer=layer, gene_key=gene_key, **options)

    def check_genes(self, genes: Iterable[str]) -> dict[str, Any]:
        """What would happen to these genes: the answer of POST /v1/genes/check. No cell is sent, and nothing is refused for its genes.

        Raises:
            CellserveProblem: the server refused.
        """
        content = json.dumps([str(gene) for gene in genes]).encode()
        return self._ask("genes/check", content, "application/json", {})

    def check(
        self,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        cluster_key: str | None = None,
        max_cells: int = 20_000,
        **options: Any,
    ) -> dict[str, Any]:
        """How these cells map all together: `verdict` green, amber or red, `reasons`, and the figures; POST /v1/check.

        Args:
            adata: cells by genes.
            layer: as of `run`.
            gene_key: as of `run`.
            cluster_key: column of obs with clusters; the answer then has their `majority_labels`.
            max_cells: of a larger data set so many are sent, drawn with a fixed seed; `n_cells_drawn_from` then says of how many.
            options: as the API documents them.

        Raises:
            CellserveProblem, KeyError: as of `run`.
        """
        return self._ask_about("check", adata, layer, gene_key, cluster_key, max_cells, options)

    def markers(
        self,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        cluster_key: str | None = None,
        max_cells: int = 20_000,
        **options: Any,
    ) -> pd.DataFrame:
        """The genes that separate each predicted label, or each cluster of `cluster_key`, from all other cells; POST /v1/markers.

        Returns:
            One row per group and gene: group, gene_id, gene_symbol, score, p_value, q_value, log2_fold_change, share_in, share_rest. Other
            arguments and errors as of `check`.
        """
        wanted = {"group_by": "labels" if cluster_key is None else "clusters", **options}
        answer = self._ask_about("markers", adata, layer, gene_key, cluster_key, max_cells, wanted)
        rows = [{"group": name, **gene} for name, group in answer["groups"].items() for gene in group["genes"]]
        return pd.DataFrame(rows)

    def _ask_about(
        self,
        question: str,
        adata: ad.AnnData,
        layer: str | None,
        gene_key: str | None,
        cluster_key: str | None,
        max_cells: int,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """The answer to a question about all cells together."""
        counts, genes, source = find_counts(adata, layer, gene_key)
        clusters = None if cluster_key is None else column_of(adata, cluster_key)
        drawn: dict[str, Any] = {}
        if adata.n_obs > max_cells:
            chosen = np.sort(np.random.default_rng(0).choice(adata.n_obs, max_cells, replace=False))
            counts, drawn = counts[chosen], {"n_cells_drawn_from": adata.n_obs}
            clusters = [clusters[at] for at in chosen] if clusters is not None else None
        if not counts.shape[0]:
            raise ValueError("there is no cell")
        body = next(bodies(counts, genes, counts.shape[0], clusters=clusters))
        return {**self._ask(question, body, ARROW, options), "counts_source": source, **drawn}

    def _ask(self, path: str, content: bytes, content_type: str, options: dict[str, Any]) -> dict[str, Any]:
        parameters = {**options, **({"model": self.model} if self.model else {})}
        response = self._http.post(
            f"/v1/{path}", params=parameters, content=content, headers={"Content-Type": content_type}
        )
        answer: dict[str, Any] = _checked(response).json()
        return answer

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
        self,
        task: str,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> ad.AnnData:
        """Send all cells to a task and put the answer into a copy.

        Args:
            task: a task of the server: embed, annotate, reconstruct, …
            adata: cells by genes. Counts are taken from `layer`, or else from layers["counts"], raw.X, X, the first that there is.
            layer: layer that holds the raw counts; "X" for X.
            gene_key: column of var with gene names; var_names by default.
            on_progress: called after each piece with the cells answered and the cells of all.
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
            if on_progress is not None:
                on_progress(sum(map(len, tables)), adata.n_obs)
            # All pieces by one version, whatever becomes of the name meanwhile or to whom it is split.
            parameters["model"] = response.headers.get("X-Cellserve-Model", parameters.get("model"))
        return fill(adata, tables, source)

    def upload(
        self,
        path: str | os.PathLike[str],
        task: str,
        *,
        layer: str | None = None,
        use_raw: bool = False,
        gene_key: str | None = None,
        output: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> ad.AnnData:
        """Send an .h5ad file as it is, read from disk as it goes out; nothing of its counts is held here.

        Args:
            path: of the file.
            task: a task of the server.
            layer: layer that holds the raw counts; "X" for X. By default the server looks in layers["counts"], raw.X and X.
            use_raw: whether they are in raw.X.
            gene_key: column of var with gene names; var_names by default.
            output: where to write the answer as an .h5ad file, as it arrives.
            options: of the task.

        Returns:
            The answer without X: cells in the order of the file, what was asked for in obs and obsm, the head in uns["cellserve"][task]. Where
            the counts were found is `counts.source` of the head.

        Raises:
            CellserveProblem: the server refused.
        """
        parameters = {
            **options,
            **{
                name: value
                for name, value in (("layer", layer), ("gene_key", gene_key), ("model", self.model))
                if value
            },
            **({"use_raw": "true"} if use_raw else {}),
        }
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(open(path, "rb"))  # noqa: PTH123 - any path-like
            target = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answer.h5ad"
            headers = {"Content-Type": HDF5, "Accept": HDF5}
            response = stack.enter_context(
                self._http.stream("POST", f"/v1/{task}", params=parameters, content=source, headers=headers)
            )
            if response.is_error:
                response.read()
            _checked(response)
            with open(target, "wb") as file:  # noqa: PTH123 - any path-like
                file.writelines(response.iter_bytes())
            return ad.read_h5ad(target)

    def stream(
        self,
        task: str,
        pieces: Iterable[sp.csr_matrix],
        genes: list[str],
        /,
        *,
        on_progress: OnProgress | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> Iterator[pa.RecordBatch]:
        """Send cells of any number through one connection and give their answers as they come; neither side holds them whole.

        Args:
            task: a task of the server.
            pieces: raw counts of some cells each, over `genes`; taken one after the other, only as fast as answers are read.
            genes: names of the columns.
            on_progress: called before each record batch is given, with the cells answered and None: how many will come is not known.
            request_id: X-Request-ID of the request, under which `progress` knows it.
            options: of the task; `genes=` there is the option of reconstruct.

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
        if request_id is not None:
            headers["X-Request-ID"] = request_id
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        sender = _Sender(connection, pieces, genes, self.cells_per_request)
        sender.start()
        try:
            response = connection.getresponse()
            if response.status != 200:
                raise CellserveProblem(response.status, json.loads(response.read()))
            n_answered = 0
            for batch in _streamed_batches(response):
                n_answered += len(batch)
                if on_progress is not None:
                    on_progress(n_answered, None)
                yield batch
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


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
        raise CellserveProblem(response.status_code, response.json() if is_problem else {"detail": response.text[:200]})
    return response
