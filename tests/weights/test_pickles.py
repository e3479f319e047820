"""Forged torch files: no name in them does more than make plain values, and none larger than the file."""

import argparse
import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp.weights import WeightImportError
from osp.weights.files import open_checkpoint, read_checkpoint

HUGE = 1 << 40


class Forged:
    """Pickles as a call of a function with chosen arguments, and then with a chosen state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced

    def __call__(self) -> None:
        """The pickler asks for something that can be called."""


class Stored:
    """Pickles as a storage of so many float32."""

    def __init__(self, numel: Any = 4, key: Any = "0", kind: Any = torch.FloatStorage) -> None:
        self.id = ("storage", kind, key, "cpu", numel)


class Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what torch.save writes of storages."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, Stored) else None


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def write(path: Path, data: bytes, compress: int = zipfile.ZIP_STORED, storage: bytes = bytes(16)) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", storage)
    return path


def tensor(numel: Any = 4, offset: Any = 0, shape: Any = (4,), stride: Any = (1,), **storage: Any) -> Forged:
    return Forged(
        torch._utils._rebuild_tensor_v2, Stored(numel, **storage), offset, shape, stride, False, OrderedDict()
    )


def array(kind: Any, shape: Any = (1,), data: Any = b"A" * 8) -> Forged:
    make = np.empty(0).__reduce__()[0]
    return Forged(make, np.ndarray, (0,), b"b", state=(1, shape, kind, False, data))


OBJECT = np.dtype("O")
FORGED: dict[str, Any] = {
    # Memory is read where the file says.
    "pointers": Forged(np.ndarray, Forged(np.ndarray, (1,), OBJECT, b"A" * 8)),
    "array of a buffer": Forged(np.ndarray, (1,), np.dtype("f8"), b"A" * 8, 1 << 40),
    "array with strides": Forged(np.ndarray, (9,), np.dtype("f8"), b"A" * 8, 0, (1 << 40,)),
    "array of objects": array(OBJECT),
    "scalar of an object": Forged(np.float64(0).__reduce__()[0], OBJECT, b"A" * 8),
    "type of fields": array(np.dtype([("a", "O")])),
    "type of bytes": array(np.dtype("V8")),
    "type with a shape": array(Forged(np.dtype, "3f8", False, True)),
    "type by a function": Forged(np.dtype, Forged(argparse.Namespace)),
    "type with fields": Forged(np.dtype, "f8", False, True, state=(3, "<", None, ("a",), {"a": 1}, 8, 1, 0)),
    # What is said is larger than what is there.
    "array beyond its bytes": array(np.dtype("f8"), (2,)),
    "array of a negative size": array(np.dtype("f8"), (-1, -1)),
    "array of a huge size": array(np.dtype("f8"), (HUGE, HUGE)),
    "bytes by their number": Forged(bytearray, HUGE),
    "tensor by its size": Forged(torch.Tensor, HUGE),
    "storage by its size": Forged(torch.UntypedStorage, HUGE),
    "tensor repeated": tensor(shape=(1 << 36,), stride=(0,)),
    "tensor beyond its end": tensor(shape=(5,)),
    "tensor beyond its end by an offset": tensor(offset=1),
    "tensor beyond its end by strides": tensor(shape=(2, 2), stride=(1 << 61, 1)),
    "tensor of a huge size": tensor(shape=(1 << 61, 1 << 61)),
    "tensor of a negative size": tensor(shape=(-4,)),
    "tensor of negative strides": tensor(offset=3, stride=(-1,)),
    "tensor of a negative offset": tensor(offset=-1),
    "tensor of many dimensions": tensor(shape=(1,) * 4000, stride=(1,) * 4000),
    "tensor of truths": tensor(shape=(True,), stride=(True,)),
    "tensor of text": tensor(shape="4"),
    "storage beyond its end": tensor(numel=5, shape=(5,)),
    "storage of a negative size": tensor(numel=-4),
    "storage that is not there": tensor(key="1"),
    "storage outside": tensor(key="../../../etc/passwd"),
    "storage without a name": tensor(key=("0",)),
    "storage of a class": tensor(kind=argparse.Namespace),
    # What torch makes of other names
    "tensor set anew": Forged(torch.Tensor, state=(Stored(), 0, (HUGE,), (1,))),
    "wrapper": Forged(
        torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (HUGE,), (1,), 0, 1, "cpu", 0
    ),
    "tensor of a class": Forged(
        torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_tensor_v2, argparse.Namespace, (), {}
    ),
    "call by a class": Forged(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (HUGE,), {}),
    "parameter of a mapping": Forged(torch._utils._rebuild_parameter, {}, False, OrderedDict()),
    "meta": Forged(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (HUGE,), (1,), False),
    "nested": Forged(torch._utils._rebuild_nested_tensor, tensor(), tensor(), tensor(), tensor()),
    # What Python makes
    "settings that are no names": Forged(argparse.Namespace, state={1: 2}),
    "settings of a call": Forged(argparse.Namespace, ("a",)),
    "mapping of no pairs": Forged(OrderedDict, [(1, 2, 3)]),
    "set of lists": Forged(set, [[1]]),
    "bytes in another encoding": Forged(__import__("_codecs").encode, "a", "hex"),
    "file without bytes": Forged(io.BytesIO, state=("a", 0, None)),
    "call of a call": Forged(Forged(set)),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("read", [read_checkpoint, open_checkpoint])
def test_a_forged_file_is_refused_in_one_line(
    name: str, read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle, "whichmodule", lambda obj, name: getattr(obj, "__module__", None) or "builtins")
    path = write(tmp_path / "forged.ckpt", pickled({"state_dict": {"w": FORGED[name]}}))
    with pytest.raises(WeightImportError, match=f"^{path}: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def deep(levels: int) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * levels + b"a" * (levels - 1) + b"s."


def laughs(levels: int) -> bytes:
    """A list that is there ten times in another, which is ten times in another ..."""
    data = b"\x80\x02}X\x01\x00\x00\x00a]]K\x01aq\x00a"
    for i in range(levels):
        data += b"](" + bytes((ord("h"), i)) * 10 + bytes((ord("e"), ord("q"), i + 1)) + b"a"
    return data + b"s."


def hashed(levels: int) -> bytes:
    """A tuple of itself twice, again and again, as a key."""
    return b"\x80\x02}K\x01\x85q\x00" + b"h\x00\x86q\x00" * levels + b"K\x01s."


ENDLESS = {
    "deep": deep(100_000),
    "laughs": laughs(9),
    "hashed": hashed(60),
    "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "text again and again": b"\x80\x02X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x00X\x06\x00\x00\x00latin1q\x01]q\x02"
    b"(" + b"c_codecs\nencode\nh\x00h\x01\x86R" * 20_000 + b"e.",
    "text that is not there": b"\x80\x02X\xff\xff\xff\xffabc.",
    "memo": b"\x80\x02}r\xff\xff\xff\xff\x94.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "nothing left": b"\x80\x02.",
    "tuple of too few": b"\x80\x02\x87.",
    "other protocols": pickle.dumps({"a": 1}, protocol=5),
    "old protocols": pickle.dumps({"a": 1}, protocol=0),
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(iargparse\nNamespace\n.",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_pickle_that_would_not_end_or_fit_is_refused(name: str, tmp_path: Path) -> None:
    tracemalloc.start()
    for path in (write(tmp_path / "a.ckpt", ENDLESS[name]), tmp_path / "b.pkl"):
        path.write_bytes(ENDLESS[name]) if path.name == "b.pkl" else None
        with pytest.raises(WeightImportError, match=f"^{path}: "):
            read_checkpoint(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100e6


def test_an_archive_that_swells_is_refused(tmp_path: Path) -> None:
    zeros = bytes(80 << 20)
    path = write(tmp_path / "a.ckpt", pickled({"w": tensor()}), zipfile.ZIP_DEFLATED, zeros)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(WeightImportError, match=r"a\.ckpt: .* is said to hold 83886080 bytes"):
        read_checkpoint(path)


def test_a_storage_in_more_tensors_than_it_bears_out_is_refused(tmp_path: Path) -> None:
    state = torch.zeros(1 << 18)
    torch.save({f"tied.{i}": state for i in range(3)}, tmp_path / "tied.pt")
    assert read_checkpoint(tmp_path / "tied.pt").keys() == {"tied.0", "tied.1", "tied.2"}
    torch.save({f"w.{i}": state[:] for i in range(30)}, tmp_path / "forged.pt")
    with pytest.raises(WeightImportError, match=r"forged\.pt: .*tensors that are larger than the file"):
        read_checkpoint(tmp_path / "forged.pt")


def old_format(value: Any, keys: list[str], *storages: tuple[int, bytes]) -> bytes:
    machine = {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}
    parts = [0x1950A86A20F9469CFC6C, 1001, machine, value, keys]
    return b"".join(map(pickled, parts)) + b"".join(struct.pack("<q", count) + data for count, data in storages)


@pytest.mark.parametrize(
    ("value", "keys", "storages"),
    [
        (tensor(), ["0"], [(4, bytes(15))]),
        (tensor(), ["0"], [(5, bytes(20))]),
        (tensor(), ["0"], [(-4, bytes(16))]),
        (tensor(), [], []),
        (tensor(), ["1"], [(4, bytes(16))]),
        (tensor(numel=HUGE, shape=(HUGE,)), ["0"], [(HUGE, bytes(16))]),
        ([tensor(), tensor(numel=3, shape=(3,))], ["0"], [(4, bytes(16))]),
        (tensor(), "0", [(4, bytes(16))]),
    ],
)
def test_the_old_format_is_read_within_its_bytes(value: Any, keys: Any, storages: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    path.write_bytes(old_format({"w": tensor()}, ["0"], (4, struct.pack("<4f", 1, 2, 3, 4))))
    assert read_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]
    path.write_bytes(old_format({"w": value}, keys, *storages))
    with pytest.raises(WeightImportError, match=f"^{path}: "):
        read_checkpoint(path)


@pytest.mark.parametrize("read", [read_checkpoint, open_checkpoint])
@pytest.mark.parametrize("zipped", [True, False])
def test_all_plain_values_come_back(zipped: bool, read: Callable[[Path], Any], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "numbers": (1, -2, 1 << 70, 0.5, float("inf"), True, None, 1j),
        "texts": ["a", "视频", "\ud800", b"bytes", bytearray(b"more")],
        "groups": {"set": {1, 2}, "counts": Counter(a=2), "ordered": OrderedDict(a=1), 3: (4, [5, {}])},
        "size": torch.Size((2, 3)),
        "type": torch.bfloat16,
        "settings": argparse.Namespace(lr=np.float32(0.1), inner=argparse.Namespace(a=[1])),
        "file": io.BytesIO(b"abc"),
    }
    torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    loaded = read(tmp_path / "a.pt")
    assert loaded["file"].read() == b"abc"
    assert {key: value for key, value in loaded.items() if key != "file"} == {
        k: v for k, v in values.items() if k != "file"
    }


@pytest.mark.parametrize("dtype", ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "F", "D"])
def test_arrays_of_numbers_come_back(dtype: str, tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3).astype(dtype)
    torch.save({"rows": values, "columns": values.T, "one": values[1, 2], "none": values[:0]}, tmp_path / "a.pt")
    loaded = read_checkpoint(tmp_path / "a.pt")
    for key, expected in (("rows", values), ("columns", values.T), ("one", values[1, 2]), ("none", values[:0])):
        assert loaded[key].dtype == expected.dtype
        assert np.array_equal(loaded[key], expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_all_kinds_come_back(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    learned = torch.nn.Parameter(base.clone())
    learned.note = "kept by torch beside the tensor"  # type: ignore[attr-defined]
    values: dict[str, Tensor] = {
        "whole": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "none": base[:0],
        "scalar": torch.tensor(3.0),
        "learned": torch.nn.Parameter(base.clone()),
        "noted": learned,
        "half": base.bfloat16(),
        "complex": base.to(torch.complex64),
        "truths": base > 3,
    }
    if zipped:
        values |= {"eighth": base.to(torch.float8_e4m3fn), "unsigned": base.to(torch.uint16)}
    torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for read in (read_checkpoint, open_checkpoint):
        loaded = read(tmp_path / "a.pt")
        for key, value in values.items():
            assert loaded[key].dtype == value.dtype
            assert loaded[key].shape == value.shape
            assert torch.equal(loaded[key].to(torch.complex64), value.detach().to(torch.complex64))
    whole = read_checkpoint(tmp_path / "a.pt")
    assert whole["whole"].untyped_storage().data_ptr() == whole["turned"].untyped_storage().data_ptr()


def test_an_ordered_mapping_of_python_2_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"pairs": Forged(OrderedDict, [["b", 1], ["a", 2]])}, path)
    assert read_checkpoint(path)["pairs"] == OrderedDict(b=1, a=2)
    torch.save({"pairs": Forged(OrderedDict, [["b", 1, 2]])}, path)
    with pytest.raises(WeightImportError, match="something else than pairs"):
        read_checkpoint(path)


def test_what_is_no_longer_what_was_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"first": torch.randn(500), "second": torch.randn(500), "n": 3}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[-1].header_offset - 1000
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightImportError, match=r"a\.pt: .*is not what was written"):
        read_checkpoint(path)
    opened = open_checkpoint(path)  # nothing of the tensors is read here
    assert opened["n"] == 3
    assert opened["first"].shape == (500,)
    with pytest.raises(WeightImportError, match=r"a\.pt: .*is not what was written"):
        opened["second"]
