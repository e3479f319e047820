"""What is read of a run's state, and that another way to store it needs no more than the protocol."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.errors import DataError
from osp.training import checkpoints
from osp.training.checkpoints import load_trained_vae
from osp.training.state import FileCheckpoint, TrainingCheckpoint, averaged_weights, is_state, open_state
from osp.vae import WFVAE
from osp.weights import WeightImportError
from osp.weights.lazy import Weights

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


def new_vae() -> WFVAE:
    torch.manual_seed(1)
    return WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)


def write_state(path: Path) -> Path:
    vae = new_vae()
    weights = {f"ema.model.{key}": value for key, value in vae.state_dict().items()}
    torch.save({"state_dict": weights, "vae_settings": vae.settings, "global_step": 12}, path)
    return path


def test_a_file_gives_its_step_its_entries_and_weights_by_key(tmp_path: Path) -> None:
    path = write_state(tmp_path / "last.ckpt")
    state = open_state(path)
    assert (state.path, state.step, state.entry("generator")) == (path, 12, None)
    assert state.entry("vae_settings") == new_vae().settings
    weights = averaged_weights(state)
    part = averaged_weights(state, "decoder.conv_out.")
    assert weights.keys() == new_vae().state_dict().keys()
    assert part.keys() == {"weight", "bias"}
    assert all(torch.equal(weights[key], value) for key, value in new_vae().state_dict().items())
    loaded = load_trained_vae(path)
    path.write_bytes(bytes(path.stat().st_size))  # what was read stays
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in new_vae().state_dict().items())
    with pytest.raises(WeightImportError, match="not a checkpoint"):
        open_state(path)
    with pytest.raises(DataError, match=r"other\.ckpt: is no checkpoint of `osp train`"):
        _ = FileCheckpoint(tmp_path / "other.ckpt", {}).step
    assert is_state(path)
    assert not is_state(tmp_path)


@dataclass(frozen=True)
class Shards:
    """A state in a folder: a file for each entry and for each of two halves of the weights."""

    path: Path
    step: int = 12

    def entry(self, name: str) -> Any:
        file = self.path / f"{name}.pt"
        return torch.load(file, weights_only=True) if file.exists() else None

    def stored(self, prefix: str) -> Weights:
        found = {key: value for number in range(2) for key, value in self.entry(f"weights_{number}").items()}
        return Weights.of({key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)})


def test_a_folder_of_shards_is_read_by_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, folder = new_vae(), tmp_path / "last.ckpt"
    folder.mkdir()
    keys = list(vae.state_dict())
    for number, half in enumerate((keys[::2], keys[1::2])):
        torch.save({f"ema.model.{key}": vae.state_dict()[key] for key in half}, folder / f"weights_{number}.pt")
    torch.save(vae.settings, folder / "vae_settings.pt")
    state: TrainingCheckpoint = Shards(folder)
    monkeypatch.setattr(checkpoints, "open_state", lambda path: state)
    loaded = load_trained_vae(folder)
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in loaded.state_dict().items())
