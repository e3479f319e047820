"""A model is read and written tensor by tensor: there is one copy of it, and the files may change afterwards."""

import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from osp.weights import (
    WeightImportError,
    load_pretrained,
    load_published,
    save_pretrained,
    to_published,
)
from osp.weights.families import find_kind
from osp.weights.files import _read_tensor, save_weights
from osp.weights.lazy import Stored, Weights

Case = tuple[str, dict, dict[str, Tensor]]


class Counted(Weights):
    """Gives copies of tensors and counts the bytes of those that still live, and the reads."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.alive, self.most, self.reads = 0, 0, 0
        super().__init__({key: Stored(tuple(v.shape), v.dtype, lambda v=v: self._copy(v)) for key, v in values.items()})

    def _copy(self, value: Tensor) -> Tensor:
        array = np.array(value)
        self.reads += 1
        self.alive += array.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._gone, array.nbytes)
        return torch.from_numpy(array)

    def _gone(self, size: int) -> None:
        self.alive -= size


def test_published_tensors_are_let_go_one_after_another(case: Case) -> None:
    kind, config, weights = case
    counted = Counted(weights)
    model = load_published(kind, counted, config)
    assert counted.alive == 0
    assert len(weights) <= counted.reads <= len(weights) + 1  # a filter is looked at to know the settings
    family, found = find_kind(kind)
    pairs = family.layout_of(found).key_pairs(model)
    assert counted.most <= max(sum(weights[key].nbytes for key in pair.published) for pair in pairs)


def test_written_tensors_are_let_go_one_after_another(small: Case, tmp_path: Path) -> None:
    weights = small[2]
    counted = Counted(weights)
    save_weights(tmp_path / "a.safetensors", counted)
    assert (counted.alive, counted.reads) == (0, len(weights))
    assert counted.most == max(value.nbytes for value in weights.values())


def test_nothing_is_read_before_keys_and_shapes_fit(small: Case) -> None:
    kind, config, weights = small
    lacking = Counted({key: value for key, value in weights.items() if key != "decoder.conv_out.bias"})
    with pytest.raises(WeightImportError, match="does not fit"):
        load_published(kind, lacking, config)
    assert lacking.reads <= 1


def write(path: Path, weights: Mapping[str, Tensor]) -> None:
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.ckpt"])
def test_a_loaded_model_does_not_depend_on_its_file(name: str, small: Case, tmp_path: Path) -> None:
    kind, config, weights = small
    write(tmp_path / name, weights)
    model = load_published(kind, tmp_path / name, config)
    (tmp_path / name).write_bytes(bytes((tmp_path / name).stat().st_size))
    assert all(torch.equal(value, weights[key]) for key, value in to_published(model).items())

    save_pretrained(model, tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    saved = tmp_path / "ours" / "model.safetensors"
    saved.write_bytes(bytes(saved.stat().st_size))
    assert all(torch.equal(value, weights[key]) for key, value in to_published(again).items())


def test_damage_that_is_met_late_is_told_with_the_file(tmp_path: Path) -> None:
    class Damaged:
        def get_tensor(self, key: str) -> Any:
            raise SafetensorError("cut off")

    (tmp_path / "a.safetensors").touch()
    with pytest.raises(WeightImportError, match=r"a\.safetensors: not a readable safetensors file \(cut off\)"):
        _read_tensor(tmp_path / "a.safetensors", Damaged(), "a")


MEASURE = """
import sys, threading, time
from osp.weights import load_pretrained, load_published, save_pretrained, save_published

def held():  # MB that are neither a file nor to be had back from it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def peak(job):
    most, done = [held()], threading.Event()
    def watch():
        while not done.wait(0.001):
            most.append(held())
    watcher, begin = threading.Thread(target=watch), held()
    watcher.start()
    result = job()
    done.set()
    watcher.join()
    return result, max(most) - begin

source, output = sys.argv[1:]
model, importing = peak(lambda: load_published("causalvae", source, {"hidden_size": 96}))
_, saving = peak(lambda: save_pretrained(model, output + "/ours"))
_, exporting = peak(lambda: save_published(model, output + "/theirs"))
model = None
_, loading = peak(lambda: load_pretrained(output + "/ours"))
print(importing, saving, exporting, loading)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.ckpt"])
def test_one_copy_of_the_model_is_in_memory(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = find_kind("causalvae")[1].build({"hidden_size": 96}, {})
    weights = {key: torch.ones(value.shape) for key, value in to_published(model).items()}
    size = sum(value.nbytes for value in weights.values()) / 2**20
    largest = max(value.nbytes for value in weights.values()) / 2**20
    write(tmp_path / name, weights)
    del weights
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / name), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    importing, saving, exporting, loading = map(float, done.stdout.split())
    assert size > 150
    spare = 2 * largest + 20  # and what the allocator and Python take
    assert 0.9 * size < importing < size + spare
    assert 0.9 * size < loading < size + spare
    assert max(saving, exporting) < spare
