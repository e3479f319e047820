"""Which weights made a video."""

import hashlib
from typing import Any

import torch

from osp.denoiser import Denoiser
from osp.sampling.generator import VideoGenerator


def denoiser_fingerprint(denoiser: Denoiser) -> str:
    """A hash of settings and weights as they are, type included; the device does not matter."""
    content = hashlib.sha256(f"{type(denoiser).__name__} {sorted(denoiser.settings.items())}".encode())
    for key, value in sorted(denoiser.state_dict().items()):
        content.update(f"{key} {value.dtype}".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:32]


def generator_identity(generator: VideoGenerator) -> dict[str, Any]:
    """What a generator is made of, as plain values without paths."""
    return {
        "denoiser": type(generator.denoiser).__name__,
        "denoiser_fingerprint": denoiser_fingerprint(generator.denoiser),
        "objective": repr(generator.objective),
        "text_fingerprint": generator.text.fingerprint(),
        **generator.codec.identity(),
    }
