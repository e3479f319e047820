"""Checkpoints that training has written become folders for the published code, which compute what was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, LatteTransformer, Stage
from osp.diffusion import Flow
from osp.errors import UsageError
from osp.training.checkpoints import load_generator, load_trained_vae
from osp.training.denoiser_module import DenoiserModule
from osp.training.export import export
from osp.training.saving import LastCheckpoint
from osp.training.state import LAST
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE, LatentCodec
from osp.weights import load_published, save_pretrained
from osp.weights.layout import TORCH

SIZES: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 1, "text_channels": 8}


def cross(*stages: Stage, **settings: Any) -> CrossTransformer:
    return CrossTransformer(stages, **SIZES, head_dim=12, **settings)


def joint(*stages: Stage) -> JointTransformer:
    return JointTransformer(stages, **SIZES, head_dim=16, pooled_channels=8, modulation_width=16)


def latte() -> LatteTransformer:
    sizes = SIZES | {"out_channels": 4}
    return LatteTransformer(**sizes, head_dim=12, pairs=1, frames=2, native_rows=1, position_scale=[1.0, 1.0, 1.0])


def trained(model: Denoiser, folder: Path) -> Path:
    """The last checkpoint of a run of one step."""
    torch.manual_seed(0)
    sizes = {"base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4, "attention": False}
    vae = WFVAE(latent_channels=4, encoder_blocks=1, decoder_blocks=1, **sizes)
    save_pretrained(vae, folder / "vae")
    vae.origin = str(folder / "vae")
    text = WordText(8, model.pooled_channels, layers=1, heads=2)
    clips = SyntheticClips(4, 5, 16, 32, objects=1, plain=True)
    module = DenoiserModule(model, text, Flow(shift=1.0), LatentCodec(vae, 0.25, 2.0), lr=0.1, ema_decay=0.5)
    lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LastCheckpoint(folder, 1)],
    ).fit(module, ClipDataModule(clips, clips, batch_size=2, workers=0, val_clips=2))
    return folder / LAST


@torch.no_grad()
def prediction(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    latent, text = torch.randn(2, 4, 2, 4, 6), torch.randn(2, 5, 8)
    pooled = None if model.pooled_channels is None else torch.randn(2, 8)
    out: torch.Tensor = model(latent, torch.tensor([10.0, 900.0]), text, pooled_text=pooled)
    return out


MODELS: list[tuple[Callable[[], Denoiser], str | None, str, str]] = [
    (lambda: cross(Stage(2), Stage(2, "skiparse", 4)), None, "opensora_v13", "OpenSoraT2V_v1_3"),
    (lambda: cross(Stage(2)), None, "opensora_v13", "OpenSoraT2V_v1_3"),
    (lambda: cross(Stage(2)), "opensora_v12", "opensora_v12", "OpenSoraT2V"),
    (lambda: joint(Stage(6)), None, "ummdit_v15", "SparseUMMDiT"),
    (lambda: latte(), None, "latte_v11", "LatteT2V"),
    (lambda: latte(), "latte_v10", "latte_v10", "LatteT2V"),
]


@pytest.mark.parametrize(("make", "asked", "kind", "name"), MODELS)
def test_a_trained_denoiser_is_exported_as_it_predicts(
    make: Callable[[], Denoiser], asked: str | None, kind: str, name: str, tmp_path: Path
) -> None:
    path = trained(make(), tmp_path)
    told = export(path, tmp_path / "theirs", form="published", kind=asked)
    assert (told["kind"], told["settings"]["_class_name"]) == (kind, name)
    assert any(str(tmp_path / "theirs") in line for line in told["load"])
    again, own = load_published(kind, tmp_path / "theirs"), load_generator(path).denoiser
    assert prediction(own).std() > 1e-3
    torch.testing.assert_close(prediction(again), prediction(own), rtol=0, atol=1e-5)
    # Clips of 5x16x32 have latents of 2x2x4
    settings = told["settings"]
    if kind == "opensora_v13":
        assert [settings[f"sample_size_{axis}"] for axis in "thw"] == [2, 2, 4]
    if kind == "opensora_v12":
        assert (settings["sample_size_t"], settings["sample_size"]) == (2, [2, 4])


def test_the_type_that_is_asked_for_is_written_in_all_files(tmp_path: Path) -> None:
    path = trained(joint(Stage(2), Stage(2), Stage(2)), tmp_path)
    export(path, tmp_path / "theirs", form="published", dtype="bfloat16")
    weights = torch.load(tmp_path / "theirs" / TORCH, weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    (tmp_path / "theirs" / TORCH).rename(tmp_path / TORCH)  # either file alone is a whole checkpoint
    config = {key: value for key, value in load_config(tmp_path / "theirs").items() if key[0] != "_"}
    one, other = load_published("ummdit_v15", tmp_path / "theirs"), load_published("ummdit_v15", weights, config)
    assert torch.equal(prediction(one), prediction(other))


def load_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_what_the_published_class_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = trained(cross(Stage(2), Stage(2, "skiparse", 2)), tmp_path)
    before = {*tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"Skiparse with k=4.*nearest stages are .*pattern: skiparse, k: 4\}\]$"):
        export(path, tmp_path / "theirs", form="published")
    with pytest.raises(UsageError, match=r"v1\.2 has dense blocks only.*nearest stages are \[\{blocks: 4"):
        export(path, tmp_path / "theirs", form="published", kind="opensora_v12")
    for settings in ({"kind": "opensora_v12"}, {"scaling_from": path}):
        with pytest.raises(UsageError, match="is of form=published alone"):
            export(path, tmp_path / "theirs", **settings)  # type: ignore[arg-type]
    assert {*tmp_path.iterdir()} == before


def test_a_vae_gets_the_scaling_of_the_denoiser_that_was_trained_on_its_latents(tmp_path: Path) -> None:
    path = trained(cross(Stage(2)), tmp_path)
    vae = tmp_path / "vae"
    alone = export(vae, tmp_path / "alone", form="published")["settings"]
    assert (alone["shift"], alone["scale"]) == ([0.0] * 4, [0.18215] * 4)
    scaled = export(vae, tmp_path / "scaled", form="published", scaling_from=path)["settings"]
    assert (scaled["shift"], scaled["scale"]) == ([0.25] * 4, [2.0] * 4)
    other = WFVAE(latent_channels=4, base_channels=4, encoder_flow_channels=4, decoder_flow_channels=4)
    save_pretrained(other, tmp_path / "other")
    with pytest.raises(UsageError, match=r"was trained with another VAE than .*other"):
        export(tmp_path / "other", tmp_path / "new", form="published", scaling_from=path)
    with pytest.raises(UsageError, match="holds a denoiser, and only a VAE has a scaling"):
        export(path, tmp_path / "new", form="published", scaling_from=path)
    torch.save(
        {
            "state_dict": {f"ema.model.{k}": v for k, v in other.state_dict().items()},
            "vae_settings": other.settings,
            "vae_model": "WFVAE",
            "global_step": 1,
        },
        tmp_path / "vae.ckpt",
    )
    new = export(tmp_path / "vae.ckpt", tmp_path / "new", form="published")["settings"]
    assert (new["shift"], new["scale"]) == ([0.0] * 4, [1.0] * 4)
    state: dict[str, Any] = torch.load(tmp_path / "vae.ckpt", weights_only=True)
    other.scaling = 0.0, 0.18215  # of a published VAE that training began with
    VAEModule.on_save_checkpoint(SimpleNamespace(vae=other), state)  # type: ignore[arg-type]
    torch.save(state, tmp_path / "tuned.ckpt")
    tuned = export(tmp_path / "tuned.ckpt", tmp_path / "tuned", form="published")["settings"]
    assert tuned["scale"] == [0.18215] * 4
    assert torch.equal(
        load_trained_vae(tmp_path / "vae.ckpt").encoder.conv_out.weight,
        load_published("wfvae_v13", tmp_path / "new").encoder.conv_out.weight,
    )
