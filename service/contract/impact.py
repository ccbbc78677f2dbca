"""reference/impact.npz: what each gene, and each set of genes, does to every latent unit and every label of a model."""

import io
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

_NAMES = "set_names"


@dataclass(frozen=True)
class ImpactTable:
    """Rows are the latent's units and then the classes, level by level; those of class arrays the classes alone."""

    impact: NDArray[np.float32]
    """Size of the guided gradient of each gene, mean over the reference's cells, (n_units + n_classes, n_genes)."""

    gradient: NDArray[np.float32]
    """Plain gradient, mean over the same cells, (n_units + n_classes, n_genes)."""

    attribution: NDArray[np.float32]
    """What each gene adds to the log-odds of a class in its own cells, beside an empty cell, (n_classes, n_genes)."""

    set_names: tuple[str, ...]
    set_sizes: NDArray[np.int64]
    """Genes of each set in the model, (n_sets,)."""

    set_impact: NDArray[np.float32]
    """Median of `impact` over the genes of each set, (n_units + n_classes, n_sets)."""

    set_p: NDArray[np.float32]
    """Two-sided, against all sets of the same size."""

    set_q: NDArray[np.float32]
    """False discovery rate over the sets of a row."""

    set_contrast: NDArray[np.float32]
    """Median over the set of each gene's impact in cells of a class less that in other cells, (n_classes, n_sets)."""

    set_contrast_p: NDArray[np.float32]
    set_contrast_q: NDArray[np.float32]

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What the file holds; names are joined by newlines."""
        joined = np.frombuffer("\n".join(self.set_names).encode(), dtype=np.uint8)
        return {field.name: joined if field.name == _NAMES else getattr(self, field.name) for field in fields(self)}

    @classmethod
    def parse(cls, content: bytes, n_units: int, n_classes: int, n_genes: int) -> "ImpactTable":
        """Read the file of a model.

        Raises:
            ValueError: it is no such file, or of another model's shape.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if set(arrays) != {field.name for field in fields(cls)}:
            raise ValueError(f"it holds {', '.join(sorted(arrays))}")
        text = arrays.pop(_NAMES).tobytes().decode()
        names = tuple(text.split("\n")) if text else ()
        n_rows, n_sets = n_units + n_classes, len(names)
        wanted = {
            **dict.fromkeys(("impact", "gradient"), (n_rows, n_genes)),
            "attribution": (n_classes, n_genes),
            "set_sizes": (n_sets,),
            **dict.fromkeys(("set_impact", "set_p", "set_q"), (n_rows, n_sets)),
            **dict.fromkeys(("set_contrast", "set_contrast_p", "set_contrast_q"), (n_classes, n_sets)),
        }
        for name, shape in wanted.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise ValueError(f"{name} must be finite and of shape {shape}, and is of {arrays[name].shape}")
        return cls(set_names=names, **arrays)
