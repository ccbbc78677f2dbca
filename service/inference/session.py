"""ONNX Runtime: one graph, run in a few fixed shapes so that a cell's bits do not depend on its company.

Matrix kernels may sum in another order for another number of rows. Nothing promises otherwise, so nothing is assumed: rows are padded
to one of `SHAPES`, and `prove_shapes` keeps those that give the golden cells the very same bits on this machine.
"""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.contract.manifest import Graph
from service.errors import InvalidArtifact, ProviderUnavailable

Array = NDArray[np.float32] | NDArray[np.int64]
Provider = Literal["cpu", "cuda"]

SHAPES: tuple[int, ...] = (1, 8, 64, 256)
"""Numbers of rows that a graph is run with. 64 to 256 is where CPUs are fastest on graphs of this kind (larger inputs leave the cache)."""

_PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


@dataclass(frozen=True)
class Runtime:
    """Where and how graphs run; the same for all sessions of a process."""

    provider: Provider = "cpu"
    n_threads: int = 1


def choose_runtime(provider: Provider, n_threads: int | None, allow_fallback: bool) -> Runtime:
    """The runtime for the provider that was asked for, with the CPUs that this process may use.

    Raises:
        ProviderUnavailable: it is not there and `allow_fallback` is false.
    """
    available = ort.get_available_providers()
    if _PROVIDERS[provider] not in available or (provider == "cuda" and not _cuda_works()):
        if not allow_fallback:
            raise ProviderUnavailable(asked=provider, offered=", ".join(available))
        provider = "cpu"
    return Runtime(provider=provider, n_threads=n_threads or usable_cpus())


@cache
def usable_cpus() -> int:
    """CPUs that this process may really use: its affinity, cut by the quota of its control group (v2 or v1)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, int(_quota(Path("/sys/fs/cgroup")) or affinity)))


def _quota(cgroup: Path) -> float | None:
    """CPUs granted by the control group below `cgroup`, None where there is no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else max(1.0, int(quota) / int(period))


@cache
def _cuda_works() -> bool:
    """Whether a CUDA driver with a device is there; onnxruntime-gpu lists its provider on machines without one, too."""
    n_devices = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n_devices)) == 0 and n_devices.value > 0
    except OSError:
        return False
    if works and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the nvidia wheels, which no linker path names
    return works


class Session:
    """One graph, loaded and checked against its signature in the manifest. Safe to call from several threads."""

    def __init__(self, content: bytes, graph: Graph, runtime: Runtime, path: str) -> None:
        """Load a graph.

        Args:
            content: the ONNX file's bytes.
            graph: its signature.
            runtime: provider and threads.
            path: of the file, for messages.

        Raises:
            InvalidArtifact: ONNX Runtime refuses it, or its inputs and outputs are not those of the manifest.
            ProviderUnavailable: ONNX Runtime fell back to another provider.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = runtime.n_threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.enable_cpu_mem_arena = False  # the arena keeps its peak for ever
        options.log_severity_level = 3
        # Idle threads that spin take the CPUs from the event loop and the parsers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = _PROVIDERS[runtime.provider]
        try:
            self._session = ort.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # ONNX Runtime has no base class for its errors
            raise InvalidArtifact(path=path, problem=f"ONNX Runtime refuses it: {str(error)[:300]}") from None
        if provider not in self._session.get_providers():
            raise ProviderUnavailable(asked=runtime.provider, offered=", ".join(self._session.get_providers()))
        for kind, found, wanted in (
            ("inputs", self._session.get_inputs(), graph.inputs),
            ("outputs", self._session.get_outputs(), graph.outputs),
        ):
            is_same = [(tensor.name, tensor.type, len(tensor.shape)) for tensor in found] == [
                (tensor.name, _DTYPES[tensor.dtype], len(tensor.shape)) for tensor in wanted
            ] and all(
                axis == size or (size == "n" and not isinstance(axis, int))
                for tensor, other in zip(found, wanted, strict=True)
                for axis, size in zip(tensor.shape, other.shape, strict=True)
            )
            if not is_same:
                described = ", ".join(f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in found)
                raise InvalidArtifact(path=path, problem=f"its {kind} are {described}, not those of the manifest")
        self.outputs = tuple(tensor.name for tensor in graph.outputs)
        self.shapes = SHAPES

    def n_rows(self, n_cells: int) -> int:
        """Rows that `n_cells` are padded to; the largest shape where they need more than one run."""
        return next((shape for shape in self.shapes if shape >= n_cells), self.shapes[-1])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Run the graph over all rows.

        Args:
            inputs: by name, each with the cells as first axis.

        Returns:
            Outputs by name, with the same number of rows.
        """
        n_cells = len(next(iter(inputs.values())))
        largest = self.shapes[-1]
        pieces = [
            self._run_piece({name: array[start : start + largest] for name, array in inputs.items()})
            for start in range(0, n_cells, largest)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self.outputs}

    def _run_piece(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        n_cells = len(next(iter(inputs.values())))
        n_rows = self.n_rows(n_cells)
        arrays = self._session.run(self.outputs, {name: _padded(array, n_rows) for name, array in inputs.items()})
        return {name: array[:n_cells] for name, array in zip(self.outputs, arrays, strict=True)}

    def prove_shapes(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Keep the shapes under which every golden cell has one and the same bits, wherever it stands in them.

        Args:
            inputs: of the golden cells, at least one.

        Returns:
            The outputs of the golden cells, as every later run will give them.
        """
        n_golden = len(next(iter(inputs.values())))
        answers = {shape: self._in_every_place(inputs, n_golden, shape) for shape in SHAPES}
        # The largest shape is the fastest per cell, so it sets the bits, unless it disagrees with itself: then each cell runs alone.
        reference = answers[SHAPES[-1]] or answers[SHAPES[0]]
        assert reference is not None
        self.shapes = tuple(shape for shape, answer in answers.items() if answer and _same_bits(answer, reference))
        return reference

    def _in_every_place(
        self, inputs: Mapping[str, Array], n_golden: int, shape: int
    ) -> dict[str, NDArray[np.float32]] | None:
        """Outputs of the golden cells in runs of `shape` rows; None if two places give a cell other bits."""
        self.shapes = (shape,)
        # One more golden cell than a multiple shifts each cell to another place in the next round.
        order = np.arange(max(shape, n_golden) + n_golden) % n_golden
        outputs = self.run({name: array[order] for name, array in inputs.items()})
        first = {name: array[:n_golden] for name, array in outputs.items()}
        return first if _same_bits(outputs, {name: array[order] for name, array in first.items()}) else None


def _padded(array: Array, n_rows: int) -> Array:
    if len(array) == n_rows:
        return array
    padded = np.zeros((n_rows, *array.shape[1:]), dtype=array.dtype)
    padded[: len(array)] = array
    return padded


def _same_bits(one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in one)
