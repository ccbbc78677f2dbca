"""What is done with a finished run and more cells: map a query, fine-tune on it, retrain on the genes it has, join two atlases."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray

from service.cells.columns import Labels, Vectors
from service.cells.counts import Cells
from service.contract import artifact
from service.inference import TASKS
from service.inference import model as serving
from service.inference.query import prepare
from service.inference.session import Runtime
from training.config import Config, DataFile, Level, Start
from training.data import registry
from training.data.prepared import encode_obsm
from training.data.splits import HELD_OUT
from training.manifest import build
from training.run import Run

_ROWS = 4096


class CannotIntegrate(Exception):
    """Two runs cannot be joined."""


def find_data(text: str, columns: dict[str, str] | None = None) -> str | DataFile:
    """A registered data set by its name, or else a file; the data set is then called as the file is.

    Args:
        text: a name or a path.
        columns: of a file: column of `obs` that the configuration knows → the file's own.
    """
    if text in registry.DATASETS and not columns:
        return text
    path = Path(text)
    return DataFile(name=path.name.split(".")[0], path=path, columns=columns or {})


def map_query(run: Run, query: AnnData) -> AnnData:
    """Embed, annotate and impute cells with the code that serves; nothing is trained.

    Args:
        run: a finished run.
        query: raw counts with gene_id and gene_symbol in `var`, as `source.read` gives them. Where it has measured what the run's model
            imputes, and its encoder can use it, the embedding of both is given beside that of the counts alone.

    Returns:
        A copy with obsm["X_<model>"], the columns of annotate, what is imputed, and uns["cellserve"] with the gene-alignment report.

    Raises:
        TooFewGenes, NotRawCounts: as a server would say it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        manifest, contents = build(run, "mapped", for_serving=False)
        model = serving.load(artifact.read(artifact.write(Path(scratch), manifest, contents)), Runtime())
    names = tuple(map(str, np.where(query.var["gene_id"] != "", query.var["gene_id"], query.var["gene_symbol"])))
    ready = prepare(model, Cells(genes=names, counts=query.X.tocsr(), cell_ids=tuple(query.obs_names)))
    answer = query.copy()
    latent = model.encode(ready.counts)
    answer.obsm[f"X_{manifest.name}"] = latent
    if manifest.labels:
        columns = TASKS["annotate"].run(model, ready.counts, TASKS["annotate"].options())
        for name, column in columns.items():
            if isinstance(column, Labels):
                answer.obs[name] = pd.Categorical.from_codes(column.codes, list(column.words))
            elif isinstance(column, Vectors):
                answer.obsm[name] = pd.DataFrame(
                    column.values, index=answer.obs_names, columns=list(column.names or ())
                )
            else:
                answer.obs[name] = column.values
    if manifest.modalities:
        library = np.asarray(ready.counts.sum(axis=1, dtype=np.float32)).ravel()
        decoded = model.decode_all(latent, library)
        for modality in manifest.modalities:
            answer.obsm[f"imputed_{modality.name}"] = pd.DataFrame(
                decoded[modality.name], index=answer.obs_names, columns=list(modality.features)
            )
    joint = _embed_with_measured(run, ready.counts, query)
    if joint is not None:
        answer.obsm[f"X_{manifest.name}_joint"] = joint
    about = {"model": manifest.name, "genes": ready.genes_report.as_dict(), "counts": ready.counts_report.as_dict()}
    about["modalities"] = [modality.model_dump() for modality in manifest.modalities]
    answer.uns["cellserve"] = {"map": json.dumps(about)}
    return answer


def _embed_with_measured(run: Run, counts: sp.csr_matrix, query: AnnData) -> NDArray[np.float32] | None:
    """Embedding from counts and from what the query has measured beside them; None where it has not, or the family cannot use it."""
    keys = [imputed.obsm_key for imputed in run.family.imputes if imputed.obsm_key in query.obsm]
    if not keys or not hasattr(run.family, "encode_both"):
        return None
    measured = encode_obsm(query, {key: run.prepared.dimensions.obsm[key] for key in keys})[keys[0]]
    with torch.no_grad():
        pieces = [
            run.family.encode_both(
                torch.from_numpy(counts[i : i + _ROWS].toarray()), torch.from_numpy(measured[i : i + _ROWS])
            )
            for i in range(0, query.n_obs, _ROWS)
        ]
    return torch.cat(pieces).numpy()


def fine_tuning(run: Run, directory: Path, data: Sequence[str | DataFile], only_batches: bool) -> Config:
    """The configuration of a run that goes on from another with the cells of a query.

    Args:
        run: a finished run.
        directory: where it is.
        data: the query; with the data sets of the run itself in it, the model does not forget them.
        only_batches: fit the codes of the query's batches and nothing else.
    """
    start = Start(run=str(directory), train="batches" if only_batches else "all")
    changes: dict[str, Any] = {"data": list(data), "start": start.model_dump()}
    if only_batches:
        changes["fit"] = {"weight_decay": 0.0}
    return _changed(run.config, changes)


def retraining(run: Run, directory: Path, data: Sequence[str | DataFile], constraint_weight: float) -> Config:
    """The configuration of a run on the genes that the run's data share with a query, its latent held to the run's embedding."""
    start = Start(run=str(directory), keep_genes=False)
    model = {"constraint_key": "X_start", "constraint_weight": constraint_weight}
    return _changed(
        run.config,
        {"data": [*run.config.data, *data], "start": start.model_dump(), "model": {**run.config.model, **model}},
    )


def integration(one: Run, other: Run) -> Config:
    """The configuration of a run on the data of two, over their common genes, with the label levels of both.

    A level is learned from the cells of the run that has it, so that the two may call cell types differently; a level that both have by
    name is told apart by the run's. Family, hyper-parameters and fit are those of `one`.

    Raises:
        CannotIntegrate: the runs tell batches apart by other columns, or are of other species.
    """
    for field in ("batch_key", "species"):
        if getattr(one.config, field) != getattr(other.config, field):
            raise CannotIntegrate(
                f"{one.config.name} has {field} {getattr(one.config, field)!r} and {other.config.name} "
                f"{getattr(other.config, field)!r}: two runs can be joined if they have the same."
            )
    taken = {level.name for level in one.config.labels} & {level.name for level in other.config.labels}
    levels = []
    for i, found in enumerate((one, other), start=1):
        for level in found.config.labels:
            name = f"{level.name}_{i}" if level.name in taken else level.name
            own = Level(
                name=name,
                classes=level.classes,
                column=level.column or level.name,
                data=level.data or found.config.datasets,
                values=level.values,
                parent=f"{level.parent}_{i}" if level.parent in taken else level.parent,
                parents=level.parents,
            )
            levels.append(own.model_dump())
    known = one.config.datasets
    data = [*one.config.data, *(data for data in other.config.data if _name(data) not in known)]
    return _changed(
        one.config,
        {
            "name": f"{one.config.name}-{other.config.name}",
            "summary": "",
            "data": data,
            "labels": levels,
            "start": None,
        },
    )


def label_alignment(run: Run) -> pd.DataFrame:
    """How the classes of the first two label levels correspond: the heads of both, on all cells of the run.

    Returns:
        One row per pair of classes that share a cell: number of cells, its share of each class's cells, and whether the pair is a match
        (a tenth of the cells of both, as scAtlasVAE's cell_type_alignment draws it).
    """
    first, second = run.config.labels[:2]
    graphs = run.family.eval().graphs()
    counts = run.reference[:, run.prepared.var.index].X.tocsr()
    found = []
    with torch.no_grad():
        for i in range(0, counts.shape[0], _ROWS):
            latent = graphs["encode"].module(torch.from_numpy(counts[i : i + _ROWS].toarray()))
            found.append(torch.stack([p.argmax(dim=1) for p in graphs["classify"].module(latent)[:2]], dim=1))
    codes = torch.cat(found).numpy()
    names = [np.array(list(level.classes))[codes[:, i]] for i, level in enumerate((first, second))]
    table = pd.crosstab(pd.Series(names[0], name=first.name), pd.Series(names[1], name=second.name))
    rows = table.stack().rename("n_cells").reset_index()
    rows = rows[rows["n_cells"] > 0]
    for level in (first.name, second.name):
        rows[f"share_of_{level}"] = rows["n_cells"] / rows.groupby(level)["n_cells"].transform("sum")
    rows["is_match"] = (rows[[f"share_of_{level}" for level in (first.name, second.name)]] >= 0.1).all(axis=1)
    return rows.sort_values("n_cells", ascending=False).reset_index(drop=True)


def _name(data: str | DataFile) -> str:
    return data if isinstance(data, str) else data.name


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with members replaced, checked again; a split by held-out batches is not carried over."""
    document = config.model_dump()
    if document["split"]["method"] == HELD_OUT:
        document["split"] |= {"method": "stratified", "held_out": ()}
    fit = {**document["fit"], **changes.pop("fit", {})}
    return Config.model_validate({**document, **changes, "fit": fit})
