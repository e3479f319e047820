"""The identity of a denoiser's latents, and the size and rate of its clips, as checkpoints hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osp.data.datamodule import ClipDataModule
from osp.data.sources import ClipSource
from osp.errors import UsageError
from osp.training.peek import first_clips
from osp.vae import LatentCodec

_DEFAULT_FPS = 8.0  # where all clips are images


@dataclass(frozen=True)
class LatentIdentity:
    """`latent`: VAE, fingerprint, strides, channels, shift, scale, and `origin`, where the VAE lay. `fps` and `clip`
    (`frames`, `height`, `width`) are those of a clip, if one could be read."""

    latent: dict[str, Any] = field(default_factory=dict)
    fps: float = _DEFAULT_FPS
    clip: dict[str, int] | None = None

    @classmethod
    def of(cls, data: ClipDataModule, codec: LatentCodec | None) -> "LatentIdentity":
        """The identity of the training clips' latents."""
        latent = _made_with(data.train_source, codec)
        clips = first_clips(data.val_source) or first_clips(data.train_source)
        if not clips:
            return cls(latent)
        size = clips[0]["size"] if "size" in clips[0] else clips[0]["video"].shape[1:]
        clip = dict(zip(("frames", "height", "width"), map(int, size), strict=True))
        return cls(latent, float(clips[0]["fps"]) or _DEFAULT_FPS, clip)

    def rescaled(self, shift: Sequence[float], scale: Sequence[float]) -> "LatentIdentity":
        """The same with another scaling."""
        return LatentIdentity(self.latent | {"shift": list(shift), "scale": list(scale)}, self.fps, self.clip)

    def refuse_others(self, latent: Mapping[str, Any], whose: str) -> None:
        """Raise UsageError if what a checkpoint says of its latents is not true of these."""
        if latent["vae_fingerprint"] != self.latent["vae_fingerprint"]:
            raise UsageError(
                f"{whose} was trained on latents of another VAE ({latent['vae']} of {latent['origin']}) than "
                f"{self.latent['vae']} of {self.latent['origin']}; use that one"
            )
        if any(latent[name] != self.latent[name] for name in ("shift", "scale")):
            raise UsageError(
                f"{whose} was trained on latents with another shift and scale; for features take them over by "
                "`osp cache scaling_from=FOLDER`, for videos by latent.shift and latent.scale"
            )


def _made_with(source: ClipSource, codec: LatentCodec | None) -> dict[str, Any]:
    """The identity of the codec that makes the latents, and the `origin` of its VAE's weights, as plain values."""
    if source.made_with is not None:
        held = source.made_with.as_json()
        names = ("vae", "vae_fingerprint", "time_stride", "space_stride", "latent_channels", "shift", "scale")
        identity = {name: held[name] for name in names}
        origin = source.vae_origin if codec is None or codec.origin is None else codec.origin
    else:
        assert codec is not None
        identity, origin = codec.identity(), codec.origin
    return identity | {"origin": None if origin is None else str(Path(origin).absolute())}
