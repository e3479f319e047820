"""Training a VAE: who steps when, what a checkpoint holds, and that a resumed run repeats an uninterrupted one."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.errors import DataError, UsageError
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.checkpoints import load_trained_vae
from osp.training.clipping import DivergedError
from osp.training.discriminator import PatchDiscriminator
from osp.training.losses import VAELoss
from osp.training.saving import BestCheckpoint, LastCheckpoint
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE
from osp.weights import WeightImportError

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


def new_module(**settings: object) -> VAEModule:
    torch.manual_seed(3)
    vae = WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)
    discriminator = PatchDiscriminator(width=4, layers=2)
    defaults = {"lr": 1e-3, "ema_decay": 0.9, "discriminator": discriminator, "discriminator_lr": 1e-3}
    return VAEModule(vae, VAELoss(), **{**defaults, **settings})


class Losses(Callback):
    """Remembers what each step logged."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: object) -> None:
        self.by_step[trainer.global_step] = trainer.callback_metrics["train/loss"].item()


def fit(
    folder: Path,
    module: VAEModule,
    steps: int,
    *,
    frames: int = 5,
    save_every: int = 2,
    resume: Path | None = None,
    **trainer: object,
) -> tuple[lightning.Trainer, Losses]:
    losses = Losses()
    data = ClipDataModule(
        train=SyntheticClips(10, frames, 16, 16, seed=0), val=SyntheticClips(2, frames, 16, 16, seed=1), batch_size=2
    )
    runner = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, BestCheckpoint(folder), LastCheckpoint(folder, save_every)],
        plugins=[AtomicCheckpointIO()],
        **trainer,
    )
    runner.fit(module, data, ckpt_path=resume, weights_only=True)
    return runner, losses


def updates(checkpoint: dict) -> list[float]:
    """How often each optimiser has stepped."""
    return [next(iter(state["state"].values()))["step"].item() for state in checkpoint["optimizer_states"]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_count_vae_updates_and_both_optimisers_step(tmp_path: Path, accumulate: int) -> None:
    module = new_module(discriminator_start=2, accumulate=accumulate)
    trainer, losses = fit(tmp_path, module, 7)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == checkpoint["global_step"] == 7
    assert list(losses.by_step) == [1, 2, 3, 4, 5, 6, 7]
    assert updates(checkpoint) == [7, 5]
    # Batches: one VAE step takes `accumulate`, and with the discriminator as many again.
    assert checkpoint["ClipDataModule"]["batches"] == accumulate * (7 + 5)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] in (3, 6)


def test_without_a_start_there_is_no_discriminator(tmp_path: Path) -> None:
    module = new_module()
    fit(tmp_path, module, 2)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert updates(checkpoint) == [2]
    assert not [key for key in checkpoint["state_dict"] if key.startswith("discriminator")]


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    settings = {"discriminator_start": 3, "accumulate": 2}
    whole, whole_losses = fit(tmp_path / "whole", new_module(**settings), 9)
    fit(tmp_path / "part", new_module(**settings), stop)
    module = new_module(**settings)
    resumed, resumed_losses = fit(tmp_path / "part", module, 9, resume=tmp_path / "part" / "last.ckpt")
    assert resumed_losses.by_step == {step: loss for step, loss in whole_losses.by_step.items() if step > stop}
    for (key, ours), theirs in zip(
        module.state_dict().items(), whole.lightning_module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
    assert resumed.callback_metrics["val/psnr"] == whole.callback_metrics["val/psnr"]


def test_averaged_weights_follow_and_are_what_is_loaded(tmp_path: Path) -> None:
    module = new_module()
    start = module.vae.decoder.conv_out.weight.detach().clone()
    fit(tmp_path, module, 1, save_every=1)
    expected = 0.9 * start + 0.1 * module.vae.decoder.conv_out.weight
    torch.testing.assert_close(module.ema.model.decoder.conv_out.weight, expected)
    loaded = load_trained_vae(tmp_path / "last.ckpt")
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.encode(video).mean, module.ema.model.encode(video).mean)
    assert not loaded.training


def test_loss_falls(tmp_path: Path) -> None:
    _, losses = fit(tmp_path, new_module(lr=3e-3), 40, save_every=100)
    values = list(losses.by_step.values())
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_mixed_precision_trains(tmp_path: Path) -> None:
    module = new_module(discriminator_start=0)
    seen: set[torch.dtype] = set()
    module.vae.decoder.conv_out.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    before = module.vae.decoder.conv_out.weight.detach().clone()
    # Of clips of 5 frames, 2 x 4 x 4 places are left to the discriminator's last convolutions. For so few, torch 2.13
    # gives gradients in bfloat16 on the CPU that hold what lay in memory before.
    trainer, losses = fit(tmp_path, module, 2, frames=9, precision="bf16-mixed")
    assert trainer.global_step == len(losses.by_step) == 2
    assert seen == {torch.bfloat16}
    after = module.vae.decoder.conv_out.weight
    assert after.dtype == torch.float32
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU Lightning turns float16 into bfloat16, so no fit here can show it.
    monkeypatch.setattr(VAEModule, "trainer", SimpleNamespace(precision="16-mixed"))
    with pytest.raises(UsageError, match="16-mixed does not train here"):
        new_module().on_fit_start()


def test_diverged_training_stops_and_says_so(tmp_path: Path) -> None:
    module = new_module()
    module.configure_model()
    with torch.no_grad():
        module.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite at step 0"):
        fit(tmp_path, module, 2)
    module.ema.copy(module.vae)
    trainer, _ = fit(tmp_path, new_module(), 1)
    with pytest.raises(DivergedError, match=r"val/psnr is not finite"):
        trainer.validate(module, trainer.datamodule)


def test_a_run_does_not_begin_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    module = new_module()
    with torch.no_grad():
        module.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(DataError, match=r"not finite \(decoder\.conv_out\.bias\)"):
        fit(tmp_path, module, 2)


def test_checkpoint_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def dies(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("osp.files.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_files_that_hold_no_vae_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, other)
    with pytest.raises(DataError, match="holds no VAE"):
        load_trained_vae(other)
    other.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightImportError, match=r"other\.ckpt"):
        load_trained_vae(other)
    with pytest.raises(WeightImportError, match="no such file"):
        load_trained_vae(tmp_path / "missing.ckpt")


def test_validation_is_the_mean_over_the_clips_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module, logged = new_module(), {}
    module.configure_model()
    monkeypatch.setattr(module, "log", lambda name, value, **more: logged.update({name: float(value)}))
    monkeypatch.setattr(module, "log_dict", logged.update)
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value)
    alone = SimpleNamespace(strategy=strategy, global_step=0, global_rank=0, world_size=1)
    monkeypatch.setattr(VAEModule, "trainer", alone)
    video = torch.randint(0, 256, (3, 3, 5, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def validate(*weights: list[float]) -> float:
        module.on_validation_epoch_start()
        with torch.no_grad():
            for weight in weights:
                module.validation_step({"video": video, "weight": torch.tensor(weight)}, 0)
        module.on_validation_epoch_end()
        assert logged["data/val_clips"] == sum(map(sum, weights))
        return logged["val/psnr"]

    first, second, third = (validate([float(i == j) for j in range(3)]) for i in range(3))
    assert len({first, second, third}) == 3
    assert validate([1.0, 1.0, 0.0]) == pytest.approx((first + second) / 2)
    assert validate([1.0, 1.0, 0.0], [0.0, 0.0, 1.0]) == pytest.approx((first + second + third) / 3)
    with pytest.raises(DataError, match=r"no clip of data\.val"):
        validate([0.0, 0.0, 0.0])


def test_a_resumed_run_knows_what_was_best(tmp_path: Path) -> None:
    """Also where the last checkpoint and a validation fall on the same step."""
    trainer, _ = fit(tmp_path, new_module(), 6, save_every=3)
    (best,) = (callback for callback in trainer.callbacks if isinstance(callback, BestCheckpoint))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["callbacks"]["BestCheckpoint"] == {"score": best.score}
    assert best.score is not None
    # As earlier versions wrote it, with a path that nobody must follow.
    former = {"best_model_score": torch.tensor(best.score), "best_model_path": "/etc/passwd", "dirpath": "/etc"}
    content["callbacks"] = {"ModelCheckpoint{'monitor': 'val/psnr'}": former}
    torch.save(content, tmp_path / "former.ckpt")
    for checkpoint in ("last.ckpt", "former.ckpt"):
        again, losses = fit(tmp_path, new_module(), 6, save_every=3, resume=tmp_path / checkpoint)
        (reloaded,) = (callback for callback in again.callbacks if isinstance(callback, BestCheckpoint))
        assert not losses.by_step
        assert reloaded.score == best.score


TWO_PROCESSES = """
import osp, torch, lightning
from lightning.pytorch.callbacks import Callback
from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.training.clipping import DivergedError
from osp.training.discriminator import PatchDiscriminator
from osp.training.losses import VAELoss
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE

class Compare(Callback):
    def setup(self, trainer, module, stage):
        for value in module.parameters() if trainer.global_rank else ():  # they begin with different weights
            torch.nn.init.normal_(value)
    def on_train_end(self, trainer, module):
        for name in ("vae", "discriminator", "ema"):
            mine = torch.cat([value.flatten() for value in getattr(module, name).parameters()]).detach()
            first, second = trainer.strategy.all_gather(mine)
            assert torch.equal(first, second), name
        if trainer.is_global_zero:
            print("equal after", trainer.global_step)

torch.manual_seed(0)
sizes = dict(latent_channels=4, base_channels=4, encoder_flow_channels=4, decoder_flow_channels=4)
module = VAEModule(
    WFVAE(**sizes, encoder_blocks=1, decoder_blocks=1), VAELoss(), lr=1e-3, accumulate=2,
    discriminator=PatchDiscriminator(width=4, layers=2), discriminator_start=2,
)
data = ClipDataModule(train=SyntheticClips(40, 5, 16, 16, seed=0), val=None, batch_size=1)
lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp_fork_find_unused_parameters_true", max_steps=4, max_epochs=-1,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Compare()],
).fit(module, data)
"""


def test_two_processes_hold_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal after 4" in done.stdout
