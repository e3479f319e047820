"""Which weights made a video."""

from typing import Any

from osp.denoiser import Denoiser
from osp.files import weights_digest
from osp.sampling.generator import VideoGenerator


def denoiser_fingerprint(denoiser: Denoiser) -> str:
    """A hash of settings and weights as they are, type included; the device does not matter."""
    about = type(denoiser).__name__, sorted(denoiser.settings.items()), denoiser.out.weight.dtype
    return weights_digest(repr(about), denoiser.state_dict())


def generator_identity(generator: VideoGenerator) -> dict[str, Any]:
    """What a generator is made of, as plain values without paths."""
    return {
        "denoiser": type(generator.denoiser).__name__,
        "denoiser_fingerprint": denoiser_fingerprint(generator.denoiser),
        "objective": repr(generator.objective),
        "text_fingerprint": generator.text.fingerprint(),
        **generator.codec.identity(),
    }
