"""A client: AnnData in, AnnData out, over HTTP. Needs httpx, pyarrow, anndata and numpy, and nothing else of this project.

from service.client import Client

with Client("http://localhost:3000") as client:
    adata = client.annotate(adata)          # obs: predicted_labels, conf_score, …; obsm: probabilities
    adata = client.embed(adata)             # obsm: X_pbmc
"""

from service.client.adata import bodies, column_of, fill, find_counts, read_answer
from service.client.client import CellserveProblem, Client, OnProgress
from service.client.clusters import majority_labels, over_cluster

__all__ = [
    "CellserveProblem",
    "Client",
    "OnProgress",
    "bodies",
    "column_of",
    "fill",
    "find_counts",
    "majority_labels",
    "over_cluster",
    "read_answer",
]
