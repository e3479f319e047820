"""A training run as its settings ask for it, before anything of it is loaded: models without memory, sizes, batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osp.checks import check_number
from osp.conditioning import WordText
from osp.data.media.shape import Shape
from osp.data.sources import FeatureClips
from osp.denoiser import Denoiser
from osp.devices.mesh import Mesh
from osp.diffusion import Objective
from osp.errors import UsageError
from osp.training.discriminator import PatchDiscriminator
from osp.training.fit import batches_in_step
from osp.training.losses import VAELoss
from osp.training.memory.layout import Layout
from osp.training.memory.rehearsal import NotPlannedError
from osp.training.vae_module import check_trainable
from osp.vae import WFVAE, VideoVAE
from osp.weights.pretrained import open_pretrained

Build = Callable[[Any], Any]
"""The object that a part of a configuration describes."""

# Parameters of the published text encoders, by class and width, counted from their published configurations: mT5-xxl
# (vocabulary 250,112, 24 layers of 4096 and 10,240), T5-v1.1-XL (32,128; 24 of 2048 and 5,120), and the text half of
# OpenCLIP bigG (49,408; 32 of 1280 and 5,120).
_ENCODERS = {("T5Text", 4096): 5_654_000_000, ("T5Text", 2048): 1_224_000_000, ("CLIPPooled", 1280): 695_000_000}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The published VAEs by their latent channels: which one a recipe means before it is told a folder.
_VAES: Mapping[int, Mapping[str, Any]] = {
    4: {"latent_channels": 4},
    8: {"latent_channels": 8},
    16: {"latent_channels": 16, "base_channels": 192},
    32: {"latent_channels": 32, "base_channels": 160, "level1": "3d"},
}
_LARGE = 1 << 14  # pixels along a side, and frames, of a clip that is larger than any limit


@dataclass(frozen=True)
class DenoiserWork:
    """A denoiser to train, with the encoders at its side; models are without memory.

    `words` are the tokens of text, `text` an encoder that learns along, `vae` the one that encodes videos in each step
    (None: clips are encoded already), `frozen` the bytes of text encoders that do not learn. Each clip has so many
    `images` beside it.
    """

    denoiser: Denoiser
    objective: Objective
    words: int
    text: nn.Module | None
    vae: VideoVAE | None
    frozen: int
    gives_frames: bool
    recompute_every: int
    offloads: bool
    muon: bool
    images: int = 0


@dataclass(frozen=True)
class VAEWork:
    """A VAE to train, and the discriminator if there will be one; both without memory."""

    vae: VideoVAE
    loss: VAELoss
    discriminator: PatchDiscriminator | None


@dataclass(frozen=True)
class Asked:
    """A run. `shape` is the largest clip of one batch of `batch` clips, in pixels; a step has `accumulate` batches."""

    name: str
    work: DenoiserWork | VAEWork
    shape: Shape
    batch: int
    accumulate: int
    layout: Layout
    precision: str
    steps: int
    accelerated: bool = True

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip's latent."""
        assert isinstance(self.work, DenoiserWork)
        strides = (self.work.vae or _vae_of(self.work.denoiser)).strides
        return strides.latent(*self.shape)

    def shares(self, sequence: int) -> bool:
        """Whether so many devices can share a clip's tokens."""
        work = self.work
        return (
            isinstance(work, DenoiserWork) and work.denoiser.splits_tokens and not work.denoiser.config.heads % sequence
        )

    @property
    def tokens(self) -> int:
        """Tokens of a clip; of a VAE its pixels."""
        if isinstance(self.work, VAEWork):
            return math.prod(self.shape)
        return math.prod(self.latent) // self.work.denoiser.patch_size**2


def read_asked(
    config: Mapping[str, Any],
    build: Build,
    layout: Layout,
    *,
    precision: str,
    accelerated: bool,
    shapes: Sequence[Shape] | None = None,
) -> Asked:
    """The run that a configuration of `osp train` in plain values asks for.

    `build` makes an object of a part of it. `shapes` are those of the clips, where they are known. Raises UsageError
    for what does not fit together, and NotPlannedError for another module than ours.
    """
    if str(config["module"]["_target_"]).rpartition(".")[2] not in ("DenoiserModule", "VAEModule"):
        raise NotPlannedError(f"what {config['module']['_target_']} does in a step is not known")
    trains_denoiser = "denoiser" in config["module"]
    work = _denoiser_work(config, build) if trains_denoiser else _vae_work(config, build)
    data, module = config["data"], config["module"]
    sizes = list(shapes or _shapes(data, config, build))
    at_once, most = data.get("batch_size"), data.get("batch_tokens")
    asked = [
        Asked(
            str(config["name"]),
            work,
            shape,
            at_once or 1,
            module["accumulate"],
            layout,
            precision,
            config["trainer"]["max_steps"],
            accelerated,
        )
        for shape in sizes
    ]
    if at_once is None:
        check_number("data.batch_tokens", most, least=1, whole=True)
        asked = [_with(one, batch=max(1, most // one.tokens)) for one in asked]
    if config.get("global_batch") is not None:
        mesh = Mesh(data=layout.data)
        batches = batches_in_step(config["global_batch"], at_once, mesh, module["accumulate"])
        asked = [_with(one, accumulate=batches) for one in asked]
    return max(asked, key=lambda one: one.batch * one.tokens)


def without_missing(value: Any) -> Any:
    """Plain values, in which what has to be given and is not is null."""
    if isinstance(value, dict):
        return {key: without_missing(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_missing(inner) for inner in value]
    return None if value == "???" else value


def _with(asked: Asked, **changes: Any) -> Asked:
    return Asked(**{name: changes.get(name, getattr(asked, name)) for name in Asked.__dataclass_fields__})


def _denoiser_work(config: Mapping[str, Any], build: Build) -> DenoiserWork:
    module, denoiser = config["module"], _model(config.get("denoiser"), build)
    if not isinstance(denoiser, Denoiser):
        raise UsageError("module=denoiser needs denoiser=NAME; choose one of conf/denoiser")
    text, on_features = config.get("text"), _is_features(config["data"])
    learns = text is not None and str(text["_target_"]).endswith(".WordText")
    encoder = _model(text, build) if learns else None
    words = encoder.max_tokens if isinstance(encoder, WordText) else _words(text)
    frozen = 0 if text is None or learns or on_features else _encoder_bytes(text)
    return DenoiserWork(
        denoiser,
        build(config["objective"]),
        words,
        encoder,
        None if on_features else _vae(config.get("vae"), denoiser, build),
        frozen,
        module.get("masks") is not None,
        module["recompute_every"],
        bool(module.get("offload_activations")),
        module.get("muon_lr") is not None,
        module.get("joint_images") or config["data"]["train"].get("images") or 0,
    )


def _vae_work(config: Mapping[str, Any], build: Build) -> VAEWork:
    module, vae = config["module"], _model(config["vae"], build)
    discriminator = None if module["discriminator_start"] is None else _model(module["discriminator"], build)
    with torch.device("meta"):
        loss = build(module["loss"])
    check_trainable(vae, loss)
    return VAEWork(vae, loss, discriminator)


def _model(config: Any, build: Build) -> Any:
    """A model without memory: from settings, or from a folder of `osp import-weights`."""
    if config is None:
        return None
    if str(config["_target_"]).endswith(".load_pretrained"):
        return open_pretrained(config["path"])[0]
    with torch.device("meta"):
        return build(config)


def _vae(config: Any, denoiser: Denoiser, build: Build) -> VideoVAE:
    """The VAE of a configuration; where that says no folder, or one that is not here, the published one that fits."""
    source = config and config.get("path", config.get("source", "settings"))
    if config is None or source is None or (source != "settings" and not Path(str(source)).exists()):
        return _vae_of(denoiser)
    vae: VideoVAE = _model(config, build)
    return vae


def _vae_of(denoiser: Denoiser) -> VideoVAE:
    """The published VAE that has the denoiser's channels."""
    channels = denoiser.config.channels
    if channels not in _VAES:
        raise UsageError(f"which VAE makes latents of {channels} channels is not known; give vae=NAME of conf/vae")
    with torch.device("meta"):
        return WFVAE(**_VAES[channels])


def _words(text: Any) -> int:
    """Tokens of text: those of a frozen encoder, or as many as published ones have where features bring them."""
    if text is None:
        return 512
    return int((text.get("tokens") or text)["max_tokens"])


def _encoder_bytes(text: Mapping[str, Any]) -> int:
    """Bytes of frozen encoders; 0 for one that is not known."""
    parts = [text[key] for key in ("tokens", "pooled") if key in text] or [text]
    found = 0
    for part in parts:
        name = str(part["_target_"]).rpartition(".")[2]
        found += _ENCODERS.get((name, part.get("channels")), 0) * _BYTES[str(part.get("dtype", "float32"))]
    return found


def _is_features(data: Mapping[str, Any]) -> bool:
    return str(data["train"]["_target_"]).endswith("FeatureClips")


def _shapes(data: Mapping[str, Any], config: Mapping[str, Any], build: Build) -> list[Shape]:
    """The shapes of clips: those of features that are here, of a rule, or the one that all clips are read in."""
    train, clip = data["train"], config["clip"]
    path = train.get("path")
    if _is_features(data) and path is not None and Path(str(path)).is_dir():
        return [bucket.shape for bucket in FeatureClips(path, train["patch_size"]).buckets()]
    if train.get("rule") is not None:
        rule = build(train["rule"])
        listed = getattr(rule, "shapes", None)
        largest = rule.fit(Shape(clip["frames"], clip["height"], clip["width"])) or rule.fit(Shape(*[_LARGE] * 3))
        return list(listed or [largest])
    return [Shape(*(train.get(name, clip[name]) for name in ("frames", "height", "width")))]
