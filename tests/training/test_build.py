"""Models without memory get the weights that a seed means, when training begins; and their averages after that."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer, JointTransformer
from osp.diffusion import Flow
from osp.errors import UsageError
from osp.training.build import has_memory, is_built_later, with_memory
from osp.training.checkpoints import load_trained_vae
from osp.training.denoiser_module import DenoiserModule
from osp.training.discriminator import PatchDiscriminator
from osp.training.ema import ExponentialMovingAverage
from osp.training.losses import VAELoss
from osp.training.module import TrainingModule
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE
from osp.weights import WeightImportError, load_pretrained, load_published, save_pretrained, save_published
from osp.weights.lazy import unread

SIZES = {"channels": 4, "out_channels": 4, "heads": 1, "text_channels": 8}


def text_module(kind: Any, **sizes: int) -> DenoiserModule:
    denoiser = kind(stages=[{"blocks": 2}], **SIZES, **sizes)
    text = WordText(channels=8, pooled_channels=8, layers=1, heads=2)
    return DenoiserModule(denoiser, text, Flow(), recompute_every=1)


def vae_module() -> VAEModule:
    sizes = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
    vae = WFVAE(**sizes, encoder_blocks=1, decoder_blocks=1, attention=False, dropout=0.1)
    return VAEModule(vae, VAELoss(), discriminator=PatchDiscriminator(4, 2, 0.2), discriminator_start=2)


MODULES = {
    "cross": lambda: text_module(CrossTransformer, head_dim=12),
    "joint": lambda: text_module(JointTransformer, head_dim=16, pooled_channels=8),
    "vae": vae_module,
}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("kind", MODULES)
def test_weights_are_those_of_the_seed_whenever_they_are_drawn(kind: str) -> None:
    torch.manual_seed(5)
    ready = MODULES[kind]()
    ready.configure_model()

    torch.manual_seed(5)
    with torch.device("meta"):
        module: TrainingModule = MODULES[kind]()
    assert not has_memory(module.learned)
    torch.rand(3)  # something else draws meanwhile
    before = torch.get_rng_state()
    module.configure_model()
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = weights(module), weights(ready)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert all(part.training for part in module.learned.children())
    ema = module.ema
    module.configure_model()
    assert module.ema is ema
    if isinstance(module, DenoiserModule):
        assert module.denoiser.recompute_every == 1


def test_what_has_weights_is_kept() -> None:
    text = WordText(channels=8, pooled_channels=None, layers=1, heads=2)
    assert with_memory(text) is text
    assert all(map(is_built_later, (WFVAE, JointTransformer, load_pretrained)))
    assert not is_built_later(nn.Linear)


def test_a_model_that_is_read_stays_without_memory_until_it_is_built(tmp_path: Path) -> None:
    ready = vae_module().vae
    save_pretrained(ready, tmp_path / "ours")
    save_published(ready, tmp_path / "theirs")
    weights_of = {f"ema.model.{key}": value for key, value in ready.state_dict().items()}
    torch.save({"state_dict": weights_of, "vae_settings": ready.settings, "global_step": 1}, tmp_path / "last.ckpt")
    readers = {
        "ours": lambda: load_pretrained(tmp_path / "ours", "bfloat16"),
        "theirs": lambda: load_published("wfvae_v13", tmp_path / "theirs"),
        "last.ckpt": lambda: load_trained_vae(tmp_path / "last.ckpt"),
    }
    for name, read in readers.items():
        with torch.device("meta"):
            vae = read()
        assert not has_memory(vae)
        module = VAEModule(vae, VAELoss())
        module.check_weights()
        module.configure_model()
        assert module.vae is vae
        assert unread(vae) is None
        assert vae.training
        assert vae.origin == str(tmp_path / name)
        kind = torch.bfloat16 if name == "ours" else torch.float32
        for model in (vae, module.ema.model):
            assert all(torch.equal(value, ready.state_dict()[key].to(kind)) for key, value in weights(model).items())
    file = tmp_path / "ours" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with torch.device("meta"):
        module = VAEModule(load_pretrained(tmp_path / "ours"), VAELoss())  # type: ignore[arg-type]
    with pytest.raises(WeightImportError, match="its checksum is another"):
        module.check_weights()


def test_the_twin_has_tensors_of_its_own_that_follow() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight  # one parameter in two places
    ema = ExponentialMovingAverage(model, 0.75)
    assert list(ema.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    assert ema.model[2].weight is ema.model[0].weight
    assert not any(value.requires_grad or value.is_meta for value in ema.parameters())
    mine = {value.data_ptr() for value in (*ema.parameters(), *ema.buffers())}
    assert mine.isdisjoint(value.data_ptr() for value in (*model.parameters(), *model.buffers()))
    assert not ema.model.training
    assert model.training
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 2
    ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, start + 0.25)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"betas": (0.9, 0.99), "warmup_steps": 0.5}, r"module\.warmup_steps=0\.5: must be a whole number"),
        ({"decay_until": 0}, r"module\.decay_until=0: must be a whole number of at least 1, or null: the rates stay"),
        ({"ema_decay": 1.0}, r"module\.ema_decay=1\.0: must be a number of at least 0 and below 1"),
        ({"muon_lr": -1}, r"module\.muon_lr=-1: must be a number of at least 0, or null"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], told: str) -> None:
    denoiser = CrossTransformer(stages=[{"blocks": 1}], head_dim=12, **SIZES)
    with pytest.raises(UsageError, match=told):
        DenoiserModule(denoiser, None, Flow(), **settings)
