"""Checkpoints and folders of weights, as they are fuzzed: of small models that a step has trained."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from osp.audit.fuzz.subject import Reading, Subject
from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.denoiser import Denoiser
from osp.diffusion import Flow
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.checkpoints import load_trained_generator, load_trained_vae, load_vae
from osp.training.denoiser_module import DenoiserModule
from osp.training.endings import Endings
from osp.training.fit import begin, fit, quiet_lightning
from osp.training.losses import VAELoss
from osp.training.module import TrainingModule
from osp.training.runs import TrainingRun
from osp.training.saving import LastCheckpoint
from osp.training.start import open_start
from osp.training.state import LAST, open_state
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE, LatentCodec
from osp.weights import load_pretrained, load_published, save_published
from osp.weights.families import find_class
from osp.weights.files import read_checkpoint
from osp.weights.folders import read_config, read_weights
from osp.weights.pretrained import save_pretrained

_DENOISER: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 12, "text_channels": 8}
_SHAPE = (5, 16, 16)


def new_vae() -> WFVAE:
    """A VAE of some 10,000 parameters, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return WFVAE(
            latent_channels=4,
            base_channels=4,
            encoder_flow_channels=4,
            decoder_flow_channels=4,
            encoder_blocks=1,
            decoder_blocks=1,
            attention=False,
        ).eval()


def new_denoiser() -> Denoiser:
    """A denoiser of two blocks, always the same."""
    make: Any = find_class("cross", Denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model: Denoiser = make(stages=[{"blocks": 2}], **_DENOISER)
        return model


def trained(folder: Path, is_denoiser: bool, steps: int = 1) -> nn.Module:
    """The small VAE, or a denoiser of its latents, trained to that step, from the folder's last checkpoint if any."""
    quiet_lightning()
    warnings.filterwarnings("ignore", message="You called `self.log")
    torch.manual_seed(3)
    module: TrainingModule = VAEModule(new_vae().train(), VAELoss())
    if is_denoiser:
        text = WordText(channels=8, pooled_channels=None, layers=1, heads=2)
        codec = LatentCodec(new_vae(), 0.1, 2.0)
        module = DenoiserModule(new_denoiser(), text, Flow(shift=1.0), codec=codec)
    clips = SyntheticClips(4, *_SHAPE, objects=1, plain=True)
    run = TrainingRun(folder)
    start = begin(run, {"trainer": {"max_steps": steps}}, resume=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[LastCheckpoint(run.last.parent, 1)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
    )
    data = ClipDataModule(clips, None, batch_size=2)
    module.prepare(data)
    fit(trainer, module, data, start, Endings(run))
    return module.learned


@cache
def _checkpoint(is_denoiser: bool) -> bytes:
    folder = Path(tempfile.mkdtemp())
    try:
        trained(folder, is_denoiser)
        return TrainingRun(folder).last.read_bytes()
    finally:
        shutil.rmtree(folder)


def make_checkpoint(is_denoiser: bool, folder: Path) -> None:
    """A run's folder with its last checkpoint."""
    run = TrainingRun(folder)
    run.last.parent.mkdir(parents=True)
    run.last.write_bytes(_checkpoint(is_denoiser))


def make_legacy(folder: Path) -> None:
    """A state dict as torch wrote it before it had archives."""
    torch.save(new_vae().state_dict(), folder / "x.pt", _use_new_zipfile_serialization=False)


def make_pretrained(make: Callable[[], nn.Module], folder: Path) -> None:
    """A model in our own form."""
    save_pretrained(make(), folder)


def make_published(folder: Path) -> None:
    """The VAE in its published form, in two files with an index."""
    save_published(new_vae(), folder)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    path.unlink()
    names = [f"{path.stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = [dict(list(weights.items())[n::2]) for n in range(2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, {"format": "pt"})
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": where}
    (folder / f"{path.stem}.safetensors.index.json").write_text(json.dumps(index))


def read_vae_checkpoint(folder: Path, reading: Reading) -> None:
    """A VAE's checkpoint: all of it, its step, and the model that the other verbs take."""
    last = TrainingRun(folder).last
    reading(read_checkpoint, last)
    reading(lambda: open_state(last).step)
    _weights(reading, lambda: load_trained_vae(last))


def read_denoiser_checkpoint(folder: Path, reading: Reading) -> None:
    """A denoiser's checkpoint: all of it, its step, the generator, and the start of another run."""
    last = TrainingRun(folder).last
    reading(read_checkpoint, last)
    reading(lambda: open_state(last).step)
    _weights(reading, lambda: load_trained_generator(last, vae=new_vae()).denoiser)
    text = WordText(channels=8, pooled_channels=None, layers=1, heads=2)
    reading(lambda: dict(open_start(last, new_denoiser(), text).denoiser))


def read_run(is_denoiser: bool, folder: Path, reading: Reading) -> None:
    """A run that goes on from its last checkpoint for one more step."""
    _weights(reading, lambda: trained(folder, is_denoiser, steps=2))
    if reading.parts[-1] != "refused":
        reading(read_checkpoint, TrainingRun(folder).last)


def read_legacy(folder: Path, reading: Reading) -> None:
    """A state dict in an old form."""
    reading(read_checkpoint, folder / "x.pt")
    reading(lambda: _all_of(read_weights(folder)))


def read_pretrained(folder: Path, reading: Reading) -> None:
    """A model in our own form, and the VAE that another verb takes it for."""
    _weights(reading, lambda: load_pretrained(folder))
    _weights(reading, lambda: load_vae(folder))


def read_published(folder: Path, reading: Reading) -> None:
    """A VAE in its published form."""
    reading(read_config, folder)
    reading(lambda: _all_of(read_weights(folder)))
    _weights(reading, lambda: load_published("wfvae_v13", folder))


def _weights(reading: Reading, make: Callable[[], nn.Module]) -> None:
    reading(lambda: (model := make()).state_dict() | {"settings": getattr(model, "settings", None)})


def _all_of(weights: Any) -> dict[str, Any]:
    return {key: value.clone() for key, value in weights.items()}


_LAST = [f"checkpoints/{LAST}"]
SUBJECTS = [
    Subject("vae", partial(make_checkpoint, False), read_vae_checkpoint, _LAST, weight=3),
    Subject("denoiser", partial(make_checkpoint, True), read_denoiser_checkpoint, _LAST, weight=3),
    Subject("vae-run", partial(make_checkpoint, False), partial(read_run, False), _LAST),
    Subject("denoiser-run", partial(make_checkpoint, True), partial(read_run, True), _LAST),
    Subject("legacy", make_legacy, read_legacy),
    Subject("pretrained-vae", partial(make_pretrained, new_vae), read_pretrained, weight=2),
    Subject("pretrained-denoiser", partial(make_pretrained, new_denoiser), read_pretrained),
    Subject("published", make_published, read_published, weight=2),
]
