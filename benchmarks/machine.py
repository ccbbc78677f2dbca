"""The machine that a benchmark ran on."""

import platform
from pathlib import Path

from service.inference.session import usable_cpus


def machine() -> dict[str, str | int]:
    """Processor, usable CPUs and Python's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"processor": processor, "cpus": usable_cpus(), "python": platform.python_version()}
