"""Whether a training run fits its devices: what each of them holds, part by part, and at which moment it is most."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from osp.devices.simulated import fake_twin
from osp.parallel.sequence_bytes import exchanged_bytes
from osp.training.memory.asked import Asked, DenoiserWork, VAEWork
from osp.training.memory.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    OUTSIDE,
    WAITING,
    Rehearsal,
    rehearse_denoiser,
    rehearse_encoding,
    rehearse_vae,
    without_values,
)

_FLOAT = 4


@dataclass(frozen=True)
class TrainingPlan:
    """The bytes on one device: `parts` by name, each as large as it gets, and `phases` with all that is there at once.

    `kept` are the activations that each part of the model keeps for the backward pass, `learned` the bytes of all
    weights that learn, `flops` the operations of one device in a step, `sent` the bytes of tokens that it sends in a
    step to those that share its clips.
    """

    asked: Asked
    parts: Mapping[str, int]
    phases: Mapping[str, int]
    kept: Mapping[str, int]
    learned: int
    flops: int
    sent: int = 0

    @property
    def peak(self) -> int:
        """The bytes of the phase that needs most."""
        return max(self.phases.values())

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda name: self.parts[name])


def plan_training(asked: Asked) -> TrainingPlan:
    """Count the memory of one device, and the operations of one step.

    The batch of the largest shape goes forward and back without memory (`osp.training.memory.rehearsal`); weights,
    gradients, the optimiser's state and what devices exchange follow from their numbers. What the driver, the
    framework and an allocator's unused parts take comes on top. Raises NotPlannedError for a model that does not run
    without values.
    """
    layout, work = asked.layout, asked.work
    batch, encoding = _rehearsed(asked), _encoded(asked)
    learned = _learned(work)
    weights = _FLOAT * sum(map(_parameters, learned))
    share = {
        ACTIVATIONS: 1 / layout.sequence,
        WAITING: 0.0,
        GRADIENTS: 0.0 if asked.accumulate > 1 else 1 / layout.shards,
    }
    peak = batch.peak(share)
    on_device = 0 if layout.on_cpu else 1
    parts = {
        "weights": on_device * weights // layout.shards,
        "averaged weights (EMA)": on_device * _FLOAT * _parameters(learned[0]) // layout.shards,
        "optimiser": on_device * _optimiser(asked) // layout.shards,
        "gradients": on_device * weights // layout.shards,
        "frozen encoders": _frozen(work),
        "batches of a step": asked.accumulate * asked.batch * _clip(asked),
        "activations": peak[ACTIVATIONS] + peak[OUTSIDE],
        "copies of weights in half precision": peak["copies of weights in half precision"],
        "weights and gradients under way": layout.buffers(weights, *_largest(work)),
        "tokens under way": _tokens_under_way(asked),
        "VAE at work": encoding.peak({})[OUTSIDE] if encoding else 0,
    }
    stays = sum(parts[name] for name in ("weights", "averaged weights (EMA)", "optimiser", "frozen encoders"))
    stays += parts["batches of a step"]
    gradients = parts["gradients"] if asked.accumulate > 1 else on_device * peak[GRADIENTS]
    passing = ("activations", "copies of weights in half precision", "weights and gradients under way")
    phases = {
        "forward and backward": stays + gradients + sum(parts[one] for one in (*passing, "tokens under way")),
        "update": stays + parts["gradients"] + (weights if layout.kind == "ddp" else 0),
    }
    if encoding:
        again = parts["gradients"] if isinstance(work, DenoiserWork) and work.gives_frames else 0
        phases["encoding videos"] = stays + again + parts["VAE at work"]
    flops = asked.accumulate * (batch.flops // layout.sequence + (encoding.flops if encoding else 0))
    there = {name: size for name, size in parts.items() if size}
    return TrainingPlan(asked, there, phases, batch.kept, weights, flops, asked.accumulate * _sent_tokens(asked))


@lru_cache(maxsize=32)
def _run(work: DenoiserWork | VAEWork, size: tuple[int, ...], precision: str, accelerated: bool) -> Rehearsal:
    with without_values():
        if isinstance(work, VAEWork):
            return rehearse_vae(work.vae, work.loss, work.discriminator, size, precision, accelerated)
        return rehearse_denoiser(
            work.denoiser,
            work.text,
            work.objective,
            size,
            work.words,
            work.recompute_every,
            precision,
            accelerated,
            work.offloads,
            work.images,
        )


def _rehearsed(asked: Asked) -> Rehearsal:
    size = asked.shape if isinstance(asked.work, VAEWork) else asked.latent
    return _run(asked.work, (asked.batch, *size), asked.precision, asked.accelerated)


def _encoded(asked: Asked) -> Rehearsal | None:
    """The encoding of a batch of videos, where a denoiser trains on these."""
    if isinstance(asked.work, VAEWork) or asked.work.vae is None:
        return None
    with without_values():
        return rehearse_encoding(asked.work.vae, (asked.batch, *asked.shape), asked.precision, asked.accelerated)


def _learned(work: DenoiserWork | VAEWork) -> list[nn.ModuleList]:
    """The models with averaged weights, and those that learn without them."""
    if isinstance(work, VAEWork):
        return [nn.ModuleList([work.vae]), nn.ModuleList([] if work.discriminator is None else [work.discriminator])]
    return [nn.ModuleList([work.denoiser, *([] if work.text is None else [work.text])])]


def _optimiser(asked: Asked) -> int:
    """Bytes of the optimisers' states: two moments of AdamW, one of Muon."""
    work = asked.work
    total = sum(map(_parameters, _learned(work)))
    if isinstance(work, VAEWork) or not work.muon:
        return 2 * _FLOAT * total
    named = work.denoiser.named_parameters(prefix="model.denoiser")
    matrices = sum(one.numel() for name, one in named if _is_muons(name, one))
    return _FLOAT * (2 * total - matrices)


def _is_muons(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and ".blocks." in name and name.endswith("weight")


def _frozen(work: DenoiserWork | VAEWork) -> int:
    if isinstance(work, DenoiserWork):
        return work.frozen + (0 if work.vae is None else _bytes(work.vae))
    return 0 if work.loss.perceptual is None else _bytes(work.loss.perceptual)


def _clip(asked: Asked) -> int:
    """Bytes of a clip as the loader hands it over, and of its latent."""
    frames, height, width = asked.shape
    pixels = 3 * frames * height * width
    if isinstance(asked.work, VAEWork):
        return pixels
    latent, denoiser, images = asked.latent, asked.work.denoiser, asked.work.images
    pixels += 3 * images * height * width
    values = _FLOAT * denoiser.config.channels * (latent[0] + images) * latent[1] * latent[2]
    if asked.work.vae is not None:
        return pixels + values
    return values + (0 if asked.work.text is not None else _FLOAT * asked.work.words * denoiser.text_channels)


def _largest(work: DenoiserWork | VAEWork) -> tuple[int, int]:
    """Bytes of the largest part that is gathered as a whole, and how many of that size the model makes up."""
    model: nn.Module = work.vae if isinstance(work, VAEWork) else work.denoiser
    blocks = list(work.denoiser.blocks) if isinstance(work, DenoiserWork) else list(model.children())
    largest = max(map(_bytes, blocks))
    return largest, -(-_bytes(model) // largest)


def _tokens_under_way(asked: Asked) -> int:
    """Queries, keys and values that devices exchange which share a clip, as they are sent and as they come."""
    if asked.layout.sequence == 1 or isinstance(asked.work, VAEWork):
        return 0
    width, size = asked.work.denoiser.config.width, 2 if asked.precision != "32-true" else _FLOAT
    return 2 * 3 * asked.batch * asked.tokens * width * size // asked.layout.sequence


def _sent_tokens(asked: Asked) -> int:
    """Bytes of tokens that a device sends for a batch, forward and back; see `exchanged_bytes`."""
    work, ranks = asked.work, asked.layout.sequence
    if ranks == 1 or isinstance(work, VAEWork):
        return 0
    sent = _exchanged(work, asked.latent, ranks, asked.batch, asked.precision != "32-true")
    again = sent["heads"] + sent["text"] if work.recompute_every else 0
    return (2 * sent.total() + again // max(1, work.recompute_every)) // ranks


@lru_cache(maxsize=32)
def _exchanged(work: DenoiserWork, latent: tuple[int, int, int], ranks: int, batch: int, half: bool) -> Counter[str]:
    with torch.device("meta"):
        model = fake_twin(work.denoiser)
    return exchanged_bytes(model.bfloat16() if half else model, latent, work.words, ranks, batch)[0]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*module.parameters(), *module.buffers()))
