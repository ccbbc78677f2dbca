"""Ask a running server for the answers that README and docs show, and write them to docs/examples/.

    make examples

Starts the real service with the shipped models, in the environment without torch.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx

from service.contract import artifact
from service.contract.store import Store
from tests.end_to_end.server import running_server
from training.data import registry

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs/examples"
# Held out when the shipped model was trained; Seurat calls it a CD14+ monocyte.
CELL = "AAAGTTTGTAGCGT"
WIDTH = 140
GENES = "MS4A1,CD3D,NKG7,LYZ"
REQUESTS = {
    "describe.json": "/v1/describe",
    "embed.json": "/v1/embed",
    "reconstruct.json": f"/v1/reconstruct?genes={GENES}",
}


def cell_json() -> str:
    """The cell as a body: the model's genes, and the counts that are not zero."""
    store = Store(ROOT / "models_store")
    genes = artifact.read(store.path(store.resolve("pbmc"))).genes.gene_symbol
    data = registry.read("pbmc3k")
    column_of = {symbol: column for column, symbol in enumerate(data.var["gene_symbol"])}
    counts = data[CELL, [column_of[gene] for gene in genes]].X.toarray().astype(int)[0]
    cell = {gene: int(count) for gene, count in zip(genes, counts, strict=True) if count}
    body = {"cell_ids": [CELL], "genes": genes, "cells": [cell]}
    return "{\n" + ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in body.items()) + "\n}\n"


def shown(answer: httpx.Response) -> str:
    """An answer as it came, on one screen: lines are broken between members, the request id is replaced by a fixed word."""
    document: dict[str, Any] = answer.json()
    if "request_id" in document:
        document["request_id"] = "readme"
    cells = document.pop("cells", None)
    text = ",\n ".join(_broken(f'"{name}": {json.dumps(value)}') for name, value in document.items())
    if cells is not None:
        text += ',\n "cells": [\n  ' + ",\n  ".join(_broken(_short(json.dumps(cell))) for cell in cells) + "]"
    return "{" + text + "}\n"


def _short(cell: str) -> str:
    # Arithmetic in the last bits is the machine's own, and 32 numbers say no more to a reader than four.
    return re.sub(r'("latent": \[[^,]+, [^,]+, [^,]+, [^,]+)[^\]]*\]', r"\1, …]", cell)


def _broken(line: str) -> str:
    lines = [""]
    for piece in re.split(r"(?<=,) (?=[\"\[{])", line):
        if lines[-1] and len(lines[-1]) + len(piece) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {piece}" if lines[-1].strip() else piece
    return "\n".join(lines)


def main() -> int:
    """Write the answers."""
    (EXAMPLES / "cell.json").write_text(cell_json())
    body = (EXAMPLES / "cell.json").read_bytes()
    mouse = json.dumps({"genes": ["Cd3d", "Ms4a1", "Lyz2", "Nkg7"], "cells": [[3, 0, 1, 0]]}).encode()
    with running_server(ROOT / "models_store") as url, httpx.Client(base_url=url) as client:
        headers = {"Content-Type": "application/json"}
        for name, path in REQUESTS.items():
            answer = client.post(path, content=body, headers=headers).raise_for_status()
            (EXAMPLES / name).write_text(shown(answer))
        (EXAMPLES / "problem.json").write_text(shown(client.post("/v1/annotate", content=mouse, headers=headers)))
        (EXAMPLES / "models.json").write_text(shown(client.get("/v1/models")))
        (EXAMPLES / "ready.json").write_text(client.get("/readyz").text + "\n")
    sys.stdout.write(f"wrote {EXAMPLES.relative_to(ROOT)}/\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
