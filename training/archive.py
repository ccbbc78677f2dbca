"""npz files whose bytes depend on nothing but the arrays."""

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest date that a zip can hold; numpy would write the current one."""


def dump(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """Compressed npz of `arrays`, the same bytes each time; `np.load(…, allow_pickle=False)` reads it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), content.getvalue(), zipfile.ZIP_DEFLATED, 6)
    return buffer.getvalue()
