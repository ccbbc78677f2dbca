"""ONNX Runtime: one graph, run so that a cell's bits do not depend on its company.

Three things can change them, and nothing promises otherwise: kernels that sum in another order for another number of rows; a thread that
takes over in the middle of a row, where the last few elements before it are computed by other instructions (seen here: one bit of one
cell in runs of 8 rows with 2 threads); and the last few elements of a buffer, likewise. Hence rows are padded to one of `SHAPES`, which
are multiples of every vector width; graphs to which the end of a buffer is nothing special may have fewer rows. Each run has one thread,
and threads are used to run several pieces side by side. `prove_shapes` then looks whether it is so on the machine at hand.
"""

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.contract.manifest import Graph
from service.contract.onnx_file import operators
from service.errors import InvalidArtifact, ProviderUnavailable, UnstableBits

Array = NDArray[np.float32] | NDArray[np.int64]
Output = NDArray[np.float32]
Item = TypeVar("Item")
Result = TypeVar("Result")
Provider = Literal["cpu", "cuda"]

SHAPES: tuple[int, ...] = (16, 64)
"""Numbers of rows that a graph is run with. At 64 a CPU's caches hold input and weights, and more rows are no faster per cell."""

FEWEST_ROWS = 4
"""A shape more for graphs of nothing but EXACT_OPERATORS: one cell needs no 16 rows."""

EXACT_OPERATORS = frozenset(
    """Abs Add Cast Clip Concat Constant Div Flatten Gather Gemm Identity LayerNormalization LeakyRelu MatMul Max Min Mul Neg Relu Reshape
    Slice Split Sqrt Squeeze Sub Transpose Unsqueeze""".split()  # noqa: SIM905 - read as a list of words
)
"""Those that round each number as IEEE 754 says, or work row by row: it does not matter to them where a buffer ends. Others, such as Exp,
are computed in another way for the last few numbers, of which every 16 rows have none."""

N_SMALL = 256
"""Counts below it, nearly all, have what a graph makes of each looked up."""

_PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


@dataclass(frozen=True)
class Runtime:
    """Where and how graphs run; the same for all sessions of a process."""

    provider: Provider = "cpu"
    n_threads: int = 1
    """Pieces that run side by side, each in one thread."""

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that help the one which asks."""
        return ThreadPoolExecutor(max(1, self.n_threads - 1), thread_name_prefix="cellserve-graph")

    def share(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What `work` gives of each item, in their order. The calling thread works, too, and need not wait for another to wake up."""
        results: list[Result | None] = [None] * len(items)
        left = iter(range(len(items)))  # `next` of it is one step under the interpreter's lock

        def take() -> None:
            for position in left:
                results[position] = work(items[position])

        helpers = [self.pool.submit(take) for _ in range(min(self.n_threads, len(items)) - 1)]
        try:
            take()
        finally:
            started = [helper for helper in helpers if not helper.cancel()]
            wait(started)
        for helper in started:
            helper.result()
        return cast("list[Result]", results)


def choose_runtime(provider: Provider, n_threads: int | None, allow_fallback: bool) -> Runtime:
    """The runtime for the provider that was asked for, with the CPUs that this process may use.

    Raises:
        ProviderUnavailable: it is not there and `allow_fallback` is false.
    """
    if provider == "cuda" and (reason := _cuda_obstacle()):
        if not allow_fallback:
            raise ProviderUnavailable(asked=provider, reason=reason)
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
def _cuda_obstacle() -> str | None:
    """Why CUDA cannot be used here; None where it can. onnxruntime-gpu lists its provider on machines without a GPU, too."""
    if _PROVIDERS["cuda"] not in ort.get_available_providers():
        return "this is ONNX Runtime's CPU build (make serve PROVIDER=cuda and make image-gpu have the other)"
    n_devices = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver here, libcuda.so.1 (a container gets it by `docker run --gpus all` or a CDI device)"
    if (status := driver.cuInit(0)) or (status := driver.cuDeviceGetCount(ctypes.byref(n_devices))):
        return f"the NVIDIA driver answers with error {status} (does `nvidia-smi` work?)"
    if n_devices.value == 0:
        return "the NVIDIA driver shows no GPU to this process (CUDA_VISIBLE_DEVICES?)"
    ort.preload_dlls()  # CUDA and cuDNN from the nvidia wheels, which no linker path names
    return None


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
        self._path = path
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights stay out of the arena, which gives nothing back: they go with their session.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.log_severity_level = 3
        provider = _PROVIDERS[runtime.provider]
        try:
            self._session = ort.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # ONNX Runtime has no base class for its errors
            raise InvalidArtifact(path=path, problem=f"ONNX Runtime refuses it: {str(error)[:300]}") from None
        # ONNX Runtime's Python class would keep the file's bytes, to begin anew with another provider.
        self._session.disable_fallback()
        vars(self._session).pop("_model_bytes", None)
        if provider not in self._session.get_providers():
            raise ProviderUnavailable(
                asked=runtime.provider,
                reason="its libraries do not load or do not fit the driver; ONNX Runtime's own message stands above",
            )
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
        self._runtime = runtime
        self._is_quiet = False
        self.inputs = tuple(tensor.name for tensor in graph.inputs)
        self.outputs = tuple(tensor.name for tensor in graph.outputs)
        is_exact = operators(content) <= EXACT_OPERATORS
        self._candidates = (FEWEST_ROWS, *SHAPES) if is_exact else SHAPES
        self.shapes = self._candidates

    def run(
        self, inputs: Mapping[str, Array], keep: Mapping[str, NDArray[np.intp] | None] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Run the graph over all rows.

        Args:
            inputs: by name, each with the cells as first axis.
            keep: the outputs to give, and of each the columns, or None for all; every output whole by default. What is left out is not
                held for more than `SHAPES[-1]` cells at a time, and computed only where another output needs it.

        Returns:
            Outputs by name, with the same number of rows.
        """
        n_cells = len(next(iter(inputs.values())))
        return self.run_rows(
            n_cells, lambda rows, n_rows: {name: padded(array[rows], n_rows) for name, array in inputs.items()}, keep
        )

    def run_rows(
        self,
        n_cells: int,
        inputs_of: Callable[[slice, int], Mapping[str, Array]],
        keep: Mapping[str, NDArray[np.intp] | None] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Run the graph over rows whose inputs are made piece by piece, in the threads that run them.

        Args:
            n_cells: number of cells, at least one.
            inputs_of: (which cells, rows to pad them to) → inputs by name.
            keep: as of `run`.

        Returns:
            Outputs by name, `n_cells` rows each.
        """
        largest = self.shapes[-1]
        names = self.outputs if keep is None else tuple(keep)
        options = () if len(names) == len(self.outputs) else (_partly(),)
        slices = [slice(start, min(start + largest, n_cells)) for start in range(0, n_cells, largest)]

        def run_piece(rows: slice) -> list[Output]:
            n_piece = rows.stop - rows.start
            n_rows = next(shape for shape in self.shapes if shape >= n_piece)
            arrays = self._session.run(names, inputs_of(rows, n_rows), *options)
            chosen = [None if keep is None else keep[name] for name in names]
            return [
                array[:n_piece] if columns is None else array[:n_piece].take(columns, axis=1)
                for array, columns in zip(arrays, chosen, strict=True)
            ]

        is_alone = self._is_quiet or len(slices) == 1
        pieces = [run_piece(rows) for rows in slices] if is_alone else self._runtime.share(run_piece, slices)
        joined = pieces[0] if len(pieces) == 1 else [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
        return dict(zip(names, joined, strict=True))

    def run_flat(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """The one output of a graph that takes each number for itself, padded so that all go through the same instructions.

        Args:
            inputs: by name, each (n,).

        Returns:
            (n,).
        """
        n = len(next(iter(inputs.values())))
        n_padded = max(1, -(-n // SHAPES[-1])) * SHAPES[-1]
        outputs: list[NDArray[np.float32]] = self._session.run(
            self.outputs, {name: padded(array, n_padded) for name, array in inputs.items()}
        )
        return outputs[0][:n]

    @cached_property
    def of_small_counts(self) -> NDArray[np.float32]:
        """What `run_flat` gives of 0 to 255, where the graph has one input."""
        (name,) = self.inputs
        return self.run_flat({name: np.arange(N_SMALL, dtype=np.float32)})

    def n_run(self, n_cells: int) -> int:
        """Rows that the graph runs with for so many cells, those included that only fill up."""
        n_full, n_rest = divmod(n_cells, self.shapes[-1])
        rest = next(shape for shape in self.shapes if shape >= n_rest) if n_rest else 0
        return n_full * self.shapes[-1] + rest

    def prove_shapes(self, inputs: Mapping[str, Array], is_quiet: bool = False) -> dict[str, NDArray[np.float32]]:
        """Keep the shapes under which every golden cell has one and the same bits, in every place of them.

        Args:
            inputs: of the golden cells, at least one.
            is_quiet: run in the calling thread only, while requests of other models keep the pool.

        Returns:
            The outputs of the golden cells, as every later run will give them.

        Raises:
            UnstableBits: no shape gives a cell the same bits in all its places.
        """
        self._is_quiet = is_quiet
        try:
            answers = {shape: self._in_every_place(inputs, shape) for shape in self._candidates}
        finally:
            self._is_quiet = False
        stable = [shape for shape, answer in answers.items() if answer is not None]
        if not stable:
            raise UnstableBits(graph=self._path)
        # The largest is the fastest per cell, so it sets the bits.
        reference = answers[stable[-1]]
        assert reference is not None
        self.shapes = tuple(shape for shape in stable if _same_bits(answers[shape] or {}, reference))
        return reference

    def _in_every_place(self, inputs: Mapping[str, Array], shape: int) -> dict[str, NDArray[np.float32]] | None:
        """Outputs of the golden cells in runs of `shape` rows; None if two places give a cell other bits."""
        self.shapes = (shape,)
        n_golden = len(next(iter(inputs.values())))
        # In run k, place p holds cell p + k: after as many runs as there are cells, each has been in each place.
        runs, places = np.divmod(np.arange(shape * n_golden), shape)
        order = (places + runs) % n_golden
        outputs = self.run({name: array[order] for name, array in inputs.items()})
        first = {name: array[np.argsort(order, kind="stable")[::shape]] for name, array in outputs.items()}
        return first if _same_bits(outputs, {name: array[order] for name, array in first.items()}) else None


@cache
def _share_arena() -> None:
    """Let all sessions of this process take what their operators need from one place.

    An arena keeps its peak for ever, and each session would have one of its own. Without any, each operator's output would be mapped and
    unmapped anew.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({}))


def _partly() -> ort.RunOptions:
    """Options of a run that computes what its outputs need and nothing else."""
    options = ort.RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def padded(array: Array, n_rows: int) -> Array:
    """The array with rows of zeros after its own, `n_rows` in all."""
    if len(array) == n_rows:
        return array
    longer = np.zeros((n_rows, *array.shape[1:]), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def _same_bits(one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in one)
