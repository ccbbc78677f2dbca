"""The reader of pickles: data come back, and nothing is ever run."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from training.importers.restricted_pickle import UnsafePickle, read_torch_file


def test_data_come_back(tmp_path: Path) -> None:
    """Tensors, views of them, arrays of every kind, and plain values, as torch reads them itself."""
    base = torch.arange(12.0).reshape(3, 4)
    document = {
        "weights": OrderedDict(a=base, b=base.T[1:3], c=torch.tensor([1, 2]), d=torch.zeros(0), e=torch.tensor(True)),
        "names": np.array(["gene_a", "Gen_b"], dtype=object),
        "fixed": np.array(["x", "yy"]),
        "numbers": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "scalar": np.float64(0.5),
        "plain": [1, 2.5, None, True, "text", b"bytes", b"", (1, "a"), {1, 2}, {"k": ["v"]}],
    }
    torch.save(document, tmp_path / "model.pt")
    found = read_torch_file(tmp_path / "model.pt")
    for name, tensor in document["weights"].items():
        assert torch.equal(found["weights"][name], tensor)
    for name in ("names", "fixed", "numbers"):
        np.testing.assert_array_equal(found[name], document[name])
    assert found["scalar"] == 0.5
    assert found["plain"] == document["plain"]


def test_tables_of_the_history_are_passed_over(tmp_path: Path) -> None:
    """Pandas objects are not needed, and none of its code is reached."""
    torch.save({"history": {"loss": pd.DataFrame({"loss": [1.0, 2.0]})}, "kept": 1}, tmp_path / "model.pt")
    assert read_torch_file(tmp_path / "model.pt")["kept"] == 1


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(path: Path, value: Any) -> Path:
    """A file of torch's layout around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", value if isinstance(value, bytes) else pickle.dumps(value, protocol=2))
    return path


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, getattr, __import__, open, print, io.open, np.load, torch.load, pickle.loads, os.getcwd],
    ids=lambda function: function.__name__,
)
def test_what_could_run_is_refused(function: Any, tmp_path: Path) -> None:
    """With the name that it wanted."""
    marker = tmp_path / "ran"
    path = saved(tmp_path / "model.pt", {"x": Calls(function, f"touch {marker}")})
    with pytest.raises(UnsafePickle, match=r"the name \w+(\.\w+)*.*Nothing of it was run"):
        read_torch_file(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cpandas\nread_pickle\n(S'http://127.0.0.1/x'\ntR.",  # named, but a stand-in that does nothing
        b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"c__builtin__\nbytes\n(I1000000000000\ntR.",
        b"cnumpy\nnotthere\n.",
        b"ctraining.importers.restricted_pickle\nread_torch_file\n.",
        b"ctorch\nFloatTensor\n.",
        b"\x80\x02X\x04\x00\x00\x00abc",
        b"not a pickle",
        b"",
    ],
)
def test_hand_written_pickles(content: bytes, tmp_path: Path) -> None:
    """A program, a truncated pickle, a name that is nearly right; pandas' functions are stand-ins that call nothing."""
    path = saved(tmp_path / "model.pt", content)
    if content.startswith(b"cpandas"):
        assert type(read_torch_file(path)).__name__ == "Ignored"
        return
    with pytest.raises(UnsafePickle, match="model"):
        read_torch_file(path)


def test_weights_that_reach_beyond_their_storage(tmp_path: Path) -> None:
    """A tensor cannot be made to show other memory."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "model.pt", "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:4] if name.endswith("data/0") else content)
    with pytest.raises(UnsafePickle, match="4 bytes for 4 values"):
        read_torch_file(tmp_path / "model.pt")
    pickled = zipfile.ZipFile(tmp_path / "whole.pt").read("whole/data.pkl")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "far.pt", "w") as far:
        for name in whole.namelist():
            content = whole.read(name)
            # The size of the tensor, (4,), becomes (9,); its storage keeps four values.
            far.writestr(
                name, pickled.replace(b"QK\x00K\x04\x85", b"QK\x00K\x09\x85") if name.endswith("data.pkl") else content
            )
    assert b"QK\x00K\x04\x85" in pickled
    with pytest.raises(UnsafePickle, match="not a file of torch"):
        read_torch_file(tmp_path / "far.pt")


def test_other_files(tmp_path: Path) -> None:
    """No zip, no file, several pickles, another byte order, a claim of many bytes."""
    (tmp_path / "text.pt").write_text("hello")
    for name in ("text.pt", "absent.pt"):
        with pytest.raises(UnsafePickle, match=rf"{name} is not a file of torch"):
            read_torch_file(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    with pytest.raises(UnsafePickle, match="2 pickles"):
        read_torch_file(tmp_path / "two.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(UnsafePickle, match="byte order"):
        read_torch_file(tmp_path / "big.pt")
