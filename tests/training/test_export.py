"""Any checkpoint becomes a folder of weights, from which the same model is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer
from osp.errors import DataError, UsageError
from osp.sampling import VideoGenerator
from osp.training.checkpoints import load_generator, load_trained_vae, load_vae
from osp.training.export import export
from osp.training.sharded import entries_of, pieces_of
from osp.training.start import open_start
from osp.training.state import is_state, open_state
from osp.vae import WFVAE, LatentCodec
from osp.weights import WeightImportError, load_pretrained, load_published, save_pretrained
from osp.weights.sharded import write_index, write_shard

SIZES = {"encoder_flow_channels": 4, "decoder_flow_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
SETTINGS: dict[str, Any] = {
    "channels": 4,
    "out_channels": 4,
    "heads": 1,
    "head_dim": 12,
    "text_channels": 8,
    "stages": [{"blocks": 2}],
}


def new_vae(seed: int = 1) -> WFVAE:
    torch.manual_seed(seed)
    return WFVAE(latent_channels=4, base_channels=4, attention=False, **SIZES).eval()


def new_denoiser(seed: int = 2) -> CrossTransformer:
    torch.manual_seed(seed)
    return CrossTransformer(**SETTINGS).eval()


def new_text(seed: int = 2) -> WordText:
    torch.manual_seed(seed)
    return WordText(8, None, layers=1, heads=2).eval()


def below(prefix: str, module: nn.Module) -> dict[str, Any]:
    return {prefix + key: value for key, value in module.state_dict().items()}


def write(folder: Path, form: str, state: dict[str, Any]) -> Path:
    """A checkpoint in one of its forms."""
    path = folder / "last.ckpt"
    if form == "file":
        torch.save(state, path)
        return path
    path.mkdir()
    state = {"optimizer_states": [], **state}
    write_shard(path, 0, pieces_of(state, [], first=True))
    write_index(path, 1, entries_of(state))
    return path


def vae_state() -> dict[str, Any]:
    weights = below("ema.model.", new_vae(1)) | below("vae.", new_vae(3))
    return {"state_dict": weights, "vae_settings": new_vae().settings, "global_step": 7}


def denoiser_state(folder: Path) -> dict[str, Any]:
    save_pretrained(new_vae(), folder / "vae")
    weights: dict[str, Any] = {}
    for prefix, seed in (("ema.model.", 2), ("model.", 4)):
        weights |= below(f"{prefix}denoiser.", new_denoiser(seed)) | below(f"{prefix}text.", new_text(seed))
    entry = {
        "denoiser": {"model": "CrossTransformer", "settings": new_denoiser().settings},
        "text": {"encoder": "WordText", "settings": new_text().settings},
        "objective": {"name": "Flow", "settings": {"shift": 1.0}},
        "latent": LatentCodec(new_vae(), 0.1, 2.0).identity() | {"origin": str(folder / "vae")},
        "fps": 8.0,
        "clip": {"frames": 5, "height": 16, "width": 16},
        "words": ["red", "circle"],
    }
    return {"state_dict": weights, "generator": entry, "global_step": 7}


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    other = theirs.state_dict()
    return all(torch.equal(value, other[key]) for key, value in ours.state_dict().items())


def video(generator: VideoGenerator) -> torch.Tensor:
    return generator.generate(["a red circle"], 5, 16, 16, seeds=[1])[0]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_vae_becomes_a_folder_that_a_path_takes(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form, vae_state())
    assert export(path, tmp_path / "averaged")["parameters"] == sum(p.numel() for p in new_vae().parameters())
    assert same(load_vae(tmp_path / "averaged"), load_trained_vae(path))
    export(path, tmp_path / "own", averaged=False)
    assert same(load_vae(tmp_path / "own"), new_vae(3))
    export(path, tmp_path / "own", averaged=True)  # it replaces what is there
    assert same(load_vae(tmp_path / "own"), new_vae(1))
    assert export(path, tmp_path / "theirs", form="published")["settings"]["_class_name"]
    assert same(load_published("wfvae_v13", tmp_path / "theirs"), new_vae(1))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_denoiser_becomes_a_folder_that_makes_the_same_videos(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form, denoiser_state(tmp_path))
    export(path, tmp_path / "ours")
    assert sorted(one.name for one in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
        "text.safetensors",
    ]
    assert same(load_pretrained(tmp_path / "ours"), new_denoiser(2))
    assert is_state(tmp_path / "ours")
    assert open_state(tmp_path / "ours").step == 7
    assert torch.equal(video(load_generator(tmp_path / "ours")), video(load_generator(path)))
    started = open_start(tmp_path / "ours", new_denoiser(9), new_text(9))
    assert started.words == ["red", "circle"]
    assert started.text is not None
    assert all(torch.equal(value, new_text(2).state_dict()[key]) for key, value in started.text.items())
    export(path, tmp_path / "own", averaged=False, dtype="bfloat16")
    assert same(load_pretrained(tmp_path / "own", "bfloat16"), new_denoiser(4).bfloat16())
    text = tmp_path / "own" / "text.safetensors"
    content = bytearray(text.read_bytes())
    content[-1] ^= 1
    text.write_bytes(content)
    with pytest.raises(WeightImportError, match=r"text\.safetensors: .* its checksum is another"):
        load_generator(tmp_path / "own")


def test_what_cannot_be_exported_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "file", vae_state())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    with pytest.raises(UsageError, match="mine is of something else"):
        export(path, tmp_path / "mine")
    with pytest.raises(UsageError, match="form=x: is not known"):
        export(path, tmp_path / "new", form="x")
    torch.save({"state_dict": {}, "global_step": 1}, path)
    with pytest.raises(DataError, match="holds no denoiser trained here"):
        export(path, tmp_path / "new")
    save_pretrained(new_vae(), tmp_path / "vae")
    with pytest.raises(UsageError, match="one kind of weights only"):
        export(tmp_path / "vae", tmp_path / "new", averaged=False)
    assert {one.name for one in tmp_path.iterdir()} == {"last.ckpt", "mine", "vae"}
