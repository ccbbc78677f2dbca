"""What it costs to import the service: BentoML's parent process does so as well, and only supervises."""

import subprocess
import sys

HEAVY = ("numpy", "onnxruntime", "pyarrow", "scipy")


def test_the_parent_process_is_light() -> None:
    """Importing service.app loads none of the libraries that do the work; only a worker needs them."""
    code = f"import sys, service.app\nprint(*sorted(set({HEAVY}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
