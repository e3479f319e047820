"""Weights are found where people have them, and nothing is guessed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from osp.errors import UsageError
from osp.weights import WeightImportError
from osp.weights.folders import read_config, read_weights, write_model
from osp.weights.lazy import Weights, unwrapped

ONE = {"a": torch.ones(2), "b": torch.zeros(3)}


def shards(folder: Path, weight_map: dict[str, str], files: dict[str, dict[str, Tensor]]) -> Path:
    for name, tensors in files.items():
        save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
    suffix = ".bin" if any(name.endswith(".bin") for name in files) else ".safetensors"
    index = folder / f"diffusion_pytorch_model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
    return index


def same(weights: Weights) -> bool:
    return weights.keys() == ONE.keys() and all(torch.equal(weights[key], value) for key, value in ONE.items())


@pytest.mark.parametrize(
    "wrapped",
    [
        ONE,
        {"ema_state_dict": {}, "state_dict": ONE, "epoch": 3},
        {"ema_state_dict": {f"module.{key}": value for key, value in ONE.items()}, "state_dict": {"a": torch.ones(9)}},
        {"state_dict": {"gen_model": ONE, "dis_model": {"c": torch.ones(1)}}, "optimizer_state": {}},
        {"ema_state_dict": {}, "state_dict": {"gen_model": {f"module.{key}": value for key, value in ONE.items()}}},
        {**ONE, "layer._extra_state": None},
    ],
)
def test_weights_are_unwrapped(wrapped: dict, tmp_path: Path) -> None:
    assert same(unwrapped(wrapped))
    torch.save(wrapped, tmp_path / "merged.ckpt")
    assert same(read_weights(tmp_path / "merged.ckpt"))
    assert same(read_weights(tmp_path))


def test_a_state_dict_that_holds_itself_ends() -> None:
    endless: dict = {}
    endless["state_dict"] = endless
    assert unwrapped(endless) == {}


def test_safetensors_come_first_and_several_files_are_told(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save({"a": torch.ones(7)}, tmp_path / "merged.ckpt")
    (tmp_path / ".hidden.safetensors").write_text("left over")
    assert same(read_weights(tmp_path))
    save_file(ONE, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(WeightImportError, match=r"several.*model\.fp16\.safetensors, diffusion_pytorch_model\.safet"):
        read_weights(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightImportError, match=f"{tmp_path}: holds no weights"):
        read_weights(tmp_path)
    with pytest.raises(WeightImportError, match="none: no such file or folder"):
        read_weights(tmp_path / "none")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WeightImportError, match=r"empty\.safetensors: holds no tensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_put_together(suffix: str, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    index = shards(
        tmp_path, dict(zip("ab", names, strict=True)), {names[0]: {"a": ONE["a"]}, names[1]: {"b": ONE["b"]}}
    )
    assert same(read_weights(tmp_path))
    assert same(read_weights(index))


BROKEN = [
    ({"a": "1.safetensors", "b": "../out.safetensors"}, "names the shard '../out.safetensors'"),
    ({"a": "1.safetensors", "b": "/etc/passwd"}, "names the shard '/etc/passwd'"),
    ({"a": "1.safetensors", "b": ".."}, "names the shard '..'"),
    ({"a": "1.safetensors", "b": "sub/2.safetensors"}, "names the shard"),
    ({"a": "1.safetensors", "b": "9.safetensors"}, r"9\.safetensors: no such file"),
    ({"a": "1.safetensors", "b": "both.safetensors"}, "another shard hold a"),
    ({"a": "1.safetensors", "b": "1.safetensors"}, r"1\.safetensors lacks b"),
    ({"a": 1}, "no weight_map"),
    (None, "no weight_map"),
]


@pytest.mark.parametrize(("weight_map", "message"), BROKEN)
def test_an_index_that_is_wrong_is_refused(weight_map: dict, message: str, tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "out.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    shards(folder, weight_map, {"1.safetensors": {"a": ONE["a"]}, "both.safetensors": ONE})
    if "both" not in message and weight_map != BROKEN[5][0]:
        (folder / "both.safetensors").unlink()
    with pytest.raises(WeightImportError, match=message):
        read_weights(next(folder.glob("*.index.json")))


def test_configurations_are_found_and_checked(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    config = tmp_path / "config.json"
    config.write_text('{"latent_dim": 4}')
    assert read_config(tmp_path) == read_config(tmp_path / "merged.ckpt") == {"latent_dim": 4}
    for text in ("{latent_dim: 4}", "", "[" * 100_000, "[1]", "3"):
        config.write_text(text)
        with pytest.raises(WeightImportError, match=f"^{config}: "):
            read_config(tmp_path)
    config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightImportError, match="not readable as JSON"):
        read_config(tmp_path)


def test_a_model_is_written_whole_and_only_over_its_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, config: dict) -> None:
        write_model(folder, "model.safetensors", Weights.of(ONE), config, is_alike=lambda other: "model" in other)

    write(tmp_path / "new" / "model", {"model": "x", "n": 1})
    write(tmp_path / "new" / "model", {"model": "x", "n": 2})
    assert read_config(tmp_path / "new" / "model") == {"model": "x", "n": 2}
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == ["config.json", "model.safetensors"]

    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(UsageError, match=r"config\.json is of something else"):
        write(tmp_path, {"model": "x"})
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="is there already"):
        write(tmp_path, {"model": "x"})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr("osp.weights.folders.save_weights", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "new" / "model", {"model": "x", "n": 3})
    assert read_config(tmp_path / "new" / "model") == {"model": "x", "n": 2}
    assert same(read_weights(tmp_path / "new" / "model"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        ("<!DOCTYPE html><html>", "is a web page"),
        ("\n<html><body>not found</body></html>", "is a web page"),
        ('{"error": "Repository is gated"}', "is JSON text.*a server that refused"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin"])
def test_what_stands_in_the_place_of_weights_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(WeightImportError, match=rf"{name}: {message}"):
            read_weights(source)


def test_weights_in_a_folder_below_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    save_file(ONE, folder / "model.safetensors")
    with pytest.raises(WeightImportError, match=f"holds no weights.*there are some in {folder}: give that folder"):
        read_weights(tmp_path)
