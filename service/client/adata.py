"""From an AnnData to bodies of requests, and from their answers to an AnnData."""

import io
import json
from collections.abc import Iterator
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp


def column_of(adata: ad.AnnData, key: str) -> list[str]:
    """A column of obs as words.

    Raises:
        KeyError: there is none.
    """
    if key not in adata.obs:
        raise KeyError(f"There is no column {key!r} in obs; there are: {', '.join(adata.obs.columns) or 'none'}.")
    return [str(value) for value in adata.obs[key]]


def bodies(
    counts: sp.csr_matrix,
    genes: list[str],
    cells_per_request: int,
    is_wide: bool = False,
    clusters: list[str] | None = None,
) -> Iterator[bytes]:
    """Arrow streams of some cells each, with the narrowest integers that hold them; if wide, counts in float32, so that all have one schema."""
    metadata = {"genes": json.dumps(genes)}
    gene_type = pa.uint16() if len(genes) <= 2**16 else pa.int32()
    for start in range(0, counts.shape[0], cells_per_request):
        piece = counts[start : start + cells_per_request]
        offsets = pa.array(piece.indptr, pa.int32())
        named = (
            {} if clusters is None else {"cluster": pa.array(clusters[start : start + cells_per_request], pa.string())}
        )
        batch = pa.record_batch(
            {
                **named,
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
        if pa.types.is_fixed_size_list(field.type) and pa.types.is_string(field.type.value_type):
            words = np.array(column.flatten().to_pylist(), dtype=object).reshape(len(column), field.type.list_size)
            names = [str(number) for number in range(1, field.type.list_size + 1)]
            answer.obsm[field.name] = pd.DataFrame(words, index=answer.obs_names, columns=names)
        elif pa.types.is_fixed_size_list(field.type):
            values = column.flatten().to_numpy().reshape(len(column), field.type.list_size)
            names = json.loads((field.metadata or {}).get(b"names", b"null"))
            if names is not None:
                answer.obsm[field.name] = pd.DataFrame(values, index=answer.obs_names, columns=names)
            else:
                answer.obsm[f"X_{head['model']['name']}" if field.name == "latent" else field.name] = values
        elif pa.types.is_list(field.type):
            # A column of obs cannot hold lists in a file.
            joined = ["|".join(words) for words in column.to_pylist()]
            answer.obs[field.name] = pd.Categorical(joined, categories=sorted(set(joined)))
        elif pa.types.is_dictionary(field.type):
            answer.obs[field.name] = pd.Categorical(column.to_pylist(), categories=column.dictionary.to_pylist())
        else:
            answer.obs[field.name] = column.to_numpy(zero_copy_only=False)
    about = json.dumps({**head, "counts_source": counts_source})
    answer.uns["cellserve"] = {**answer.uns.get("cellserve", {}), head["task"]: about}
    return answer
