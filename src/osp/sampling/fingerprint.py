"""Which weights made a video."""

from typing import Any

from osp.denoiser import Denoiser
from osp.files import exact_digest
from osp.sampling.generator import VideoGenerator

_LATER = {"frame_encoding": "v13"}
"""Settings that came later, and what was so before: they count where they are otherwise."""


def denoiser_fingerprint(denoiser: Denoiser) -> str:
    """A hash of settings and weights as they are, type included; the device does not matter.

    It stands in videos, so it stays as it was: settings count by the names that they had first.
    """
    first = {new: former for former, new in denoiser.config.former_names.items()}
    known = {key: value for key, value in denoiser.settings.items() if _LATER.get(key, ...) != value}
    settings = sorted((first.get(key, key), value) for key, value in known.items())
    weights = [(f"{key} {value.dtype}", value) for key, value in sorted(denoiser.state_dict().items())]
    return exact_digest(f"{type(denoiser).__name__} {settings}", weights)


def generator_identity(generator: VideoGenerator) -> dict[str, Any]:
    """The names and fingerprints of a generator's parts, as plain values without paths."""
    return {
        "denoiser": type(generator.denoiser).__name__,
        "denoiser_fingerprint": denoiser_fingerprint(generator.denoiser),
        "objective": repr(generator.objective),
        "text_fingerprint": generator.text.fingerprint(),
        **generator.codec.identity(),
    }
