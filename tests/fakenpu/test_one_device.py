"""Both modules train on one NPU, and what they learn comes back; videos are sampled there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fit, new_denoiser, new_module, new_text, new_vae

from osp.devices import PeakMemory, choose_device, choose_precision, describe_device
from osp.devices.device import placed_trainer
from osp.devices.measure import available_memory
from osp.diffusion import Flow, objective
from osp.sampling import VideoGenerator
from osp.training.losses import VAELoss
from osp.vae import LatentCodec

NPU = {"accelerator": "npu", "strategy": "npu", "devices": 1}
CPU = {"accelerator": "cpu", "devices": 1}


def test_the_device_is_found_first_and_described() -> None:
    device = choose_device("auto")
    assert device.type == "npu"
    assert choose_device("npu:3").index == 3
    assert describe_device(device) == "Simulated NPU"
    assert choose_precision("auto", device) == "bf16-mixed"
    assert placed_trainer("auto", "auto", 1) == {"accelerator": "npu", "strategy": "npu"}
    assert placed_trainer("npu", "auto", [0, 2]) == {"accelerator": "npu", "strategy": "npu_ddp"}
    free = available_memory(device)
    with PeakMemory(device) as memory:
        kept = torch.ones(1000, 1000, device=device)
    assert memory.taken == kept.nbytes == 4_000_000
    assert free is not None
    assert available_memory(device) == free - 4_000_000


def test_a_tensor_on_the_cpu_fails_there() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="npu") + torch.ones(3)


@pytest.mark.parametrize("kind", ["vae", "denoiser"])
def test_a_module_trains_as_on_the_cpu_and_a_resumed_run_repeats_it(tmp_path: Path, kind: str) -> None:
    whole = new_module(kind)
    record = fit(whole, tmp_path / "whole", 4, **NPU)
    assert record.devices == {"npu:0"}
    there = fit(new_module(kind), tmp_path / "cpu", 4, **CPU)
    # The first updates of AdamW make whole steps of the rounding of gradients near zero, in a VAE more than elsewhere.
    steps = 1 if kind == "vae" else 4
    assert record.losses[:steps] == pytest.approx(there.losses[:steps], rel=1e-4)

    fit(new_module(kind), tmp_path / "part", 2, **NPU)
    resumed = new_module(kind)
    later = fit(resumed, tmp_path / "part", 4, resume=tmp_path / "part" / "last.ckpt", **NPU)
    assert later.losses == record.losses[2:]
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu()), name


def test_gradients_of_a_vae_are_those_on_the_cpu() -> None:
    def gradients(name: str) -> torch.Tensor:
        vae, device = new_vae(), choose_device(name)
        video = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        torch.manual_seed(1)
        result = vae.to(device)(video.to(device))
        VAELoss()(video.to(device), result).total.backward()
        return torch.cat([w.grad.flatten().cpu().double() for w in vae.parameters() if w.grad is not None])

    ours, theirs = gradients("npu"), gradients("cpu")
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_checkpoint_goes_on_on_the_cpu(tmp_path: Path) -> None:
    record = fit(new_module("denoiser"), tmp_path / "cpu", 4, **CPU)
    fit(new_module("denoiser"), tmp_path / "part", 2, **NPU)
    later = fit(new_module("denoiser"), tmp_path / "part", 4, resume=tmp_path / "part" / "last.ckpt", **CPU)
    assert later.losses == pytest.approx(record.losses[2:], rel=1e-4)


def test_another_device_than_the_first_can_be_chosen(tmp_path: Path) -> None:
    assert fit(new_module("vae"), tmp_path, 1, **NPU | {"devices": "2,"}).devices == {"npu:2"}


@pytest.mark.parametrize("kind", ["vae", "denoiser"])
def test_mixed_precision_is_that_of_the_device(tmp_path: Path, kind: str) -> None:
    module, seen = new_module(kind), set()
    module.configure_model()
    layers = (torch.nn.Conv3d, torch.nn.Conv2d, torch.nn.Linear)
    for layer in module.learned.modules():
        if isinstance(layer, layers):
            layer.register_forward_hook(lambda _, inputs, out: seen.add(out.dtype))
            break
    mixed = fit(module, tmp_path / "mixed", 2, precision="bf16-mixed", **NPU)
    full = fit(new_module(kind), tmp_path / "full", 2, **NPU)
    assert seen == {torch.bfloat16}
    assert mixed.losses != full.losses
    assert mixed.losses == pytest.approx(full.losses, rel=0.05)


def test_noise_that_is_left_on_the_cpu_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = objective.draw_normal
    monkeypatch.setattr(objective, "draw_normal", lambda *arguments: drawn(*arguments).cpu())
    with pytest.raises(RuntimeError, match="same device"):
        fit(new_module("denoiser"), tmp_path, 1, **NPU)


@pytest.mark.parametrize("low_memory", [False, True])
def test_videos_are_sampled_there_as_on_the_cpu(low_memory: bool) -> None:
    def videos(name: str, **settings: Any) -> torch.Tensor:
        device = choose_device(name)
        codec = LatentCodec(new_vae().eval().to(device), [0.1] * 4, [2.0] * 4)
        text = new_text().eval().to(device)
        generator = VideoGenerator(new_denoiser().eval().to(device), text, Flow(shift=1.0), codec)
        made = generator.generate(["a red ball", "a blue box"], 5, 16, 16, seeds=[1, 2], **settings)
        return made.cpu()

    torch.testing.assert_close(videos("npu:1", low_memory=low_memory), videos("cpu"), atol=1e-4, rtol=1e-4)
