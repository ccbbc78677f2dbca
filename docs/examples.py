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

from tests.end_to_end.server import running_server

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs/examples"
GENES = "MS4A1,CD3D,NKG7,LYZ"
REQUESTS = {
    "annotate.json": "/v1/annotate",
    "embed.json": "/v1/embed",
    "reconstruct.json": f"/v1/reconstruct?genes={GENES}",
}


def shown(answer: httpx.Response) -> str:
    """An answer as it came, the request id replaced by a fixed word and the head's long lists by the first entries."""
    document: dict[str, Any] = answer.json()
    if "request_id" in document:
        document["request_id"] = "readme"
    cells = document.pop("cells", None)
    text = json.dumps(document, indent=1)
    if cells is None:
        return text + "\n"
    # One line per cell, as the server writes them.
    lines = ",\n  ".join(_short(cell) for cell in cells)
    return f'{text[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n'


def _short(cell: dict[str, Any]) -> str:
    line = json.dumps(cell)
    return re.sub(r'("latent": \[[^,]+, [^,]+, [^,]+, [^,]+)[^\]]*\]', r"\1, …]", line)


def main() -> int:
    """Write the answers."""
    body = (EXAMPLES / "cells.json").read_bytes()
    wrong = json.dumps({"genes": ["Cd3d", "Lyz2"], "cells": [[3, 0]]}).encode()
    with running_server(ROOT / "models_store") as url, httpx.Client(base_url=url) as client:
        headers = {"Content-Type": "application/json"}
        for name, path in REQUESTS.items():
            answer = client.post(path, content=body, headers=headers).raise_for_status()
            (EXAMPLES / name).write_text(shown(answer))
        (EXAMPLES / "problem.json").write_text(shown(client.post("/v1/annotate", content=wrong, headers=headers)))
        (EXAMPLES / "models.json").write_text(json.dumps(client.get("/v1/models").json(), indent=1) + "\n")
        (EXAMPLES / "ready.json").write_text(client.get("/readyz").text + "\n")
    sys.stdout.write(f"wrote {EXAMPLES.relative_to(ROOT)}/\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
