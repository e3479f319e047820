"""Encoded clips on disk: what a folder of features holds (`FeatureIdentity`), and `FeatureClips`, which reads it.

A clip's features are the posterior of its latent and the embeddings of its captions, so that a denoiser trains without
its VAE and text encoders. `osp.data.features.writer` writes them. The format is described in data/README.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from osp.checks import check_choice
from osp.data.media.shape import Shape, Strides
from osp.data.shards.index import INDEX_NAME, ClipEntry, listed_entry, read_index_file
from osp.errors import DataError, UsageError

FEATURES_FORMAT = "osp-features"
FEATURES_VERSION = 1
EMPTY_NAME = "empty.safetensors"

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
POSTERIORS = ("gaussian", "sample")

AGAIN = "run the command that wrote the folder again"


@dataclass(frozen=True)
class TextIdentity:
    """A text encoder: its name, the fingerprint of its weights, and the width of what it gives."""

    name: str
    fingerprint: str
    width: int


@dataclass(frozen=True)
class FeatureIdentity:
    """What the features of a folder were made with. Features of two identities are never mixed.

    Args:
        vae, vae_fingerprint: the VAE's name, and the fingerprint of its weights.
        time_stride, space_stride, latent_channels: the VAE's.
        shift, scale: what makes latents fit for a denoiser: (z - shift) x scale, one number a channel.
        text: the encoder of the sequences `L D`; None if there are none.
        pooled_text: the encoder of the vectors `P`; None if there are none.
        posterior: "gaussian" stores mean and log variance, "sample" one latent.
        dtype: "float32", "float16" or "bfloat16", of latents and embeddings in the files.

    Raises:
        UsageError: values outside these.
    """

    vae: str
    vae_fingerprint: str
    time_stride: int
    space_stride: int
    latent_channels: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    text: TextIdentity | None = None
    pooled_text: TextIdentity | None = None
    posterior: str = "gaussian"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_choice("features: posterior", self.posterior, POSTERIORS)
        check_choice("features: dtype", self.dtype, DTYPES)
        for name in ("shift", "scale"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
            if len(getattr(self, name)) != self.latent_channels:
                raise UsageError(f"features: {name} needs {self.latent_channels} numbers, one a latent channel")

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FeatureIdentity":
        """The identity that `as_json` gave. Raises TypeError, KeyError or ValueError for anything else."""
        texts = {name: values[name] and TextIdentity(**values[name]) for name in ("text", "pooled_text")}
        return cls(**{**values, **texts})

    def differences(self, other: "FeatureIdentity") -> list[str]:
        """What differs, as "NAME was HERE, is THERE"."""
        mine, others = _flat(self.as_json()), _flat(other.as_json())
        names = dict.fromkeys([*mine, *others])
        return [
            f"{name} was {mine.get(name)}, is {others.get(name)}"
            for name in names
            if mine.get(name) != others.get(name)
        ]

    @property
    def strides(self) -> Strides:
        """Those of the VAE."""
        return Strides(self.time_stride, self.space_stride)

    def latent_shape(self, size: Shape) -> tuple[int, int, int, int]:
        """`C T H W` of the latent of a clip of that size."""
        return self.latent_channels, *self.strides.latent(*size)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@dataclass(frozen=True)
class Features:
    """What the encoders made of one clip.

    Args:
        key: of the clip in the source that it was read from.
        size: of the encoded clip, in frames and pixels.
        latent: mean of the posterior, or a sample of it, `C T H W`.
        logvar: log variance `C T H W`; None with a sample.
        captions: any number, also none.
        text: `L D` for each caption, as long as the text is: without padding.
        pooled_text: `P` for each caption.
        fps: frames a second; 0 for an image.
        record: more to keep in the clip's record (`scores`, ...).
    """

    key: str
    size: Shape
    latent: Tensor
    logvar: Tensor | None = None
    captions: Sequence[str] = ()
    text: Sequence[Tensor] = ()
    pooled_text: Sequence[Tensor] = ()
    fps: float = 0.0
    record: Mapping[str, Any] | None = None


class FeatureBatch(TypedDict):
    """What the loaders give of features; B is the batch size of one device.

    Without a text encoder in the identity the entries of its embeddings are missing.
    """

    latent: Tensor  # float32 `B C T H W`, (z - shift) x scale
    text: Tensor  # `B L D` in the files' precision, zero where there is no text
    text_mask: Tensor  # bool `B L`, True where there is text
    pooled_text: Tensor  # `B P`
    caption: list[str]
    key: list[str]
    fps: Tensor  # float32 `B`
    size: Tensor  # int64 `B 3`: frames, height and width of the clips that were encoded
    broken: int
    sample: Tensor  # int64 `B`
    weight: Tensor  # float32 `B`


def shard_path(folder: Path, number: int) -> Path:
    """The tar of a shard of features."""
    return folder / f"shard-{number:06d}.tar"


def load_feature_index(folder: Path) -> dict[str, Any] | None:
    """The parsed `index.json` of a folder of features, None if it has none. Raises DataError for any other."""
    index = read_index_file(folder, "features", FEATURES_FORMAT, FEATURES_VERSION, "osp cache")
    if index is None:
        return None
    wanted = {"identity", "clips", "shards", "shard_clips", "origin", "empty", "vae_origin"}
    if not wanted <= index.keys() or index["identity"].keys() != {field.name for field in fields(FeatureIdentity)}:
        raise DataError(f"{folder / INDEX_NAME}: a damaged index; write the folder anew")
    return index


def require_feature_index(folder: Path) -> dict[str, Any]:
    """The parsed `index.json` of a folder of features. Raises DataError if it has none, or another."""
    if (index := load_feature_index(folder)) is None:
        raise DataError(f"{folder}: no folder of features ({INDEX_NAME} is missing); write one with `osp cache`")
    return index


def read_feature_shard(tar: Path) -> tuple[dict[str, Any], list[ClipEntry]]:
    """The facts about a shard and its clips, by the listing beside it. Raises DataError if that is damaged."""
    listing = tar.with_suffix(".jsonl")
    try:
        head, *lines = (json.loads(line) for line in listing.read_text(encoding="utf-8").split("\n")[:-1])
        entries = [listed_entry(tar, line) for line in lines]
        found, expected, clips = tar.stat().st_size, head["bytes"], head["clips"]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{listing}: a damaged listing ({error!r}); delete {tar.name} and {AGAIN}") from error
    if (found, len(entries)) != (expected, clips):
        raise DataError(
            f"{tar}: {found} bytes and {len(entries)} clips, should be {expected} and {clips}; delete it and {AGAIN}"
        )
    return head, entries
