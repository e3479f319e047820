"""Weight files that are damaged, of something else, or hostile cost one clear line, and nothing in them is run."""

import argparse
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from osp.weights import WeightImportError
from osp.weights.files import open_checkpoint, read_checkpoint, save_weights
from osp.weights.lazy import Weights

STATE = {"a": torch.randn(4, 4), "b": torch.ones(3)}
Reader = Callable[[Path], dict]


@pytest.fixture(params=[read_checkpoint, open_checkpoint])
def read(request: pytest.FixtureRequest) -> Reader:
    """Either way to read a file."""
    return request.param


class Hostile:
    """Unpickling it with code allowed creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, read: Reader) -> None:
    sign = tmp_path / "sign"
    for name, zipped in (("new.ckpt", True), ("old.ckpt", False)):
        torch.save({"state_dict": STATE, "x": Hostile(sign)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(sign)))
    for name in ("new.ckpt", "old.ckpt", "plain.pt"):
        with pytest.raises(WeightImportError, match=f"{name}: holds more than tensors"):
            read(tmp_path / name)
    assert not sign.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert sign.exists()  # it was hostile


def test_both_torch_formats_and_safetensors_are_read(tmp_path: Path, read: Reader) -> None:
    torch.save(STATE, tmp_path / "zip.pt")
    torch.save(STATE, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "a.safetensors")
    for name in ("zip.pt", "legacy.pth", "a.safetensors"):
        loaded = read(tmp_path / name)
        assert loaded.keys() == STATE.keys()
        assert all(torch.equal(loaded[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "weights.safetensors"])
def test_files_cut_short_or_altered_are_refused(name: str, tmp_path: Path, read: Reader) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=name == "zip.pt")
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightImportError, match=f"^{path}: "):
            read(path)
    path.write_bytes(bytes(255 - byte for byte in whole[:64]) + whole[64:])
    with pytest.raises(WeightImportError, match=f"^{path}: "):
        read(path)


@pytest.mark.parametrize("name", ["none.pt", "folder", "text.bin", "text.safetensors", "list.pt"])
def test_what_is_no_checkpoint_is_refused(name: str, tmp_path: Path, read: Reader) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.bin").write_text("weights go here\n")
    (tmp_path / "text.safetensors").write_text("weights go here\n")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightImportError, match=f"^{tmp_path / name}: ") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_training_leaves_beside_the_weights_is_read(tmp_path: Path, read: Reader) -> None:
    settings = argparse.Namespace(lr=np.float64(1e-4), params_dtype=torch.bfloat16, steps=np.int64(3), sizes=[1, 2])
    states = {
        "random": random.getstate(),
        "numpy": np.random.RandomState(0).get_state(),
        "torch": torch.get_rng_state(),
    }
    extra = {"x._extra_state": io.BytesIO(b"abc"), "y._extra_state": None}
    torch.save({"model": STATE | extra, "args": settings, "rng_state": [states]}, tmp_path / "run.pt")
    loaded = read(tmp_path / "run.pt")
    assert loaded["args"] == settings
    assert np.array_equal(loaded["rng_state"][0]["numpy"][1], states["numpy"][1])


def test_what_is_refused_is_named_with_the_mend(tmp_path: Path, read: Reader) -> None:
    torch.save({"model": STATE, "place": PurePosixPath("x")}, tmp_path / "run.pt")
    with pytest.raises(
        WeightImportError, match=r"run\.pt: .* \(pathlib\.\S*PurePosixPath\).*save its state dict alone"
    ):
        read(tmp_path / "run.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_another_device_come_to_the_cpu(
    zipped: bool, tmp_path: Path, read: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.serialization, "location_tag", lambda _: "npu:3")
        torch.save(STATE, tmp_path / "npu.pt", _use_new_zipfile_serialization=zipped)
    assert b"npu:3" in (tmp_path / "npu.pt").read_bytes()
    assert torch.equal(read(tmp_path / "npu.pt")["a"], STATE["a"])


def test_a_compressed_file_is_read(tmp_path: Path, read: Reader) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name), zipfile.ZIP_DEFLATED)
    assert torch.equal(read(tmp_path / "b.pt")["a"], STATE["a"])


def test_every_dtype_and_shape_is_written(tmp_path: Path) -> None:
    whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    broken = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.half, torch.float, torch.double)
    state = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in (*whole, *broken)}
    state |= {"scalar": torch.tensor(3), "none": torch.empty(0, 4), "turned": torch.randn(3, 5).T}
    path = tmp_path / "a.safetensors"
    save_weights(path, Weights.of(state))
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key].double(), value.double())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {key: value.dtype for key, value in open_checkpoint(path).items()} == {k: v.dtype for k, v in state.items()}
