"""What an image is made of, as CycloneDX 1.6 JSON on standard output: the distributions of this interpreter and Debian's packages.

    python sbom.py VERSION

Standard library only: it runs inside the build.
"""

import json
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG_STATUS = Path("/var/lib/dpkg/status")


def python_packages() -> list[dict[str, Any]]:
    """One component per distribution, with its licence where the metadata state one."""
    components = []
    for distribution in distributions():
        name, version = distribution.metadata["Name"], distribution.version
        component: dict[str, Any] = {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version)}",
        }
        if expression := distribution.metadata.get("License-Expression"):
            component["licenses"] = [{"expression": expression}]
        components.append(component)
    return components


def debian_packages(status: Path = DPKG_STATUS) -> list[dict[str, Any]]:
    """One component per installed package; none where the system is not Debian's."""
    components = []
    for paragraph in status.read_text().split("\n\n") if status.exists() else ():
        lines = (line for line in paragraph.split("\n") if not line.startswith(" "))
        fields = dict(line.split(": ", 1) for line in lines if ": " in line)
        if fields.get("Status", "").endswith(" installed"):
            name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
            components.append({"type": "library", "name": name, "version": version, "purl": purl})
    return components


def document(version: str) -> dict[str, Any]:
    """The whole list; the same packages give the same bytes (no serial number, no time)."""
    components = {component["purl"]: component for component in (*python_packages(), *debian_packages())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "cellserve", "version": version}},
        "components": [{"bom-ref": purl, **components[purl]} for purl in sorted(components)],
    }


if __name__ == "__main__":
    json.dump(document(sys.argv[1]), sys.stdout, indent=1)
