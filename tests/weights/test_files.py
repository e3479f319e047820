"""Weight files that are damaged, of something else, or hostile cost one clear line, and nothing in them is run."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from osp.weights import WeightImportError
from osp.weights.files import read_checkpoint

STATE = {"a": torch.randn(4, 4), "b": torch.ones(3)}


class Hostile:
    """Unpickling it with code allowed creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    for name, zipped in (("new.ckpt", True), ("old.ckpt", False)):
        torch.save({"state_dict": STATE, "x": Hostile(sign)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(sign)))
    for name in ("new.ckpt", "old.ckpt", "plain.pt"):
        with pytest.raises(WeightImportError, match=f"{name}: holds more than tensors"):
            read_checkpoint(tmp_path / name)
    assert not sign.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert sign.exists()  # it was hostile


def test_both_torch_formats_and_safetensors_are_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "zip.pt")
    torch.save(STATE, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "a.safetensors")
    for name in ("zip.pt", "legacy.pth", "a.safetensors"):
        loaded = read_checkpoint(tmp_path / name)
        assert loaded.keys() == STATE.keys()
        assert all(torch.equal(loaded[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "weights.safetensors"])
def test_files_cut_short_or_altered_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=name == "zip.pt")
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightImportError, match=f"^{path}: "):
            read_checkpoint(path)
    path.write_bytes(bytes(255 - byte for byte in whole[:64]) + whole[64:])
    with pytest.raises(WeightImportError, match=f"^{path}: "):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["none.pt", "folder", "text.bin", "text.safetensors", "list.pt"])
def test_what_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.bin").write_text("weights go here\n")
    (tmp_path / "text.safetensors").write_text("weights go here\n")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightImportError, match=f"^{tmp_path / name}: ") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)
