"""Encoded clips on disk: the identity of a folder of features, its index and its listings.

A clip's features are the posterior of its latent and the embeddings of its captions, so that a denoiser trains without
its VAE and text encoders. `osp.data.features.writer` writes them. The format is described in data/README.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from osp.checks import check_choice
from osp.data.media.shape import Shape, Strides
from osp.data.shards.entry import ClipEntry, listed_entry
from osp.data.shards.index import INDEX_NAME, ListingLines, read_index_file
from osp.data.shards.tar import headed_digest
from osp.documents import COUNT, SIZE, DocumentError, check_form
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

_TEXT_FORM = (None, {"name": str, "fingerprint": str, "width": int})
_INDEX_FORM: Mapping[Any, Any] = {
    "identity": {
        "vae": str,
        "vae_fingerprint": str,
        "time_stride": int,
        "space_stride": int,
        "latent_channels": int,
        "shift": [float],
        "scale": [float],
        "text": _TEXT_FORM,
        "pooled_text": _TEXT_FORM,
        "posterior": str,
        "dtype": str,
    },
    "clips": int,
    "shards": int,
    "shard_clips": int,
    "origin": str,
    "empty": (None, str),
    "empty_sha256?": (None, str),
    "vae_origin": (None, str),
}
_HEAD_FORM: Mapping[Any, Any] = {
    "file": str,
    "clips": COUNT,
    "bytes": COUNT,
    "sha256": str,
    "listing_sha256?": str,
    "skipped": [{"clip": COUNT, "key": str, "reason": str}],
}
_COUNTS = ("time_stride", "space_stride", "latent_channels")
_MOST = 1 << 40
_RECORD_FORM: Mapping[Any, Any] = {
    "captions": [str],
    "original": str,
    "frames": SIZE,
    "height": SIZE,
    "width": SIZE,
    "fps": float,
    "latent": [int],
    "text_lengths": [COUNT],
    "dtype": str,
    "crc32": int,
}


@dataclass(frozen=True)
class TextIdentity:
    """A text encoder: its name, the fingerprint of its weights, and the width of what it gives."""

    name: str
    fingerprint: str
    width: int


@dataclass(frozen=True)
class FeatureIdentity:
    """The encoders and settings that made the features of a folder. Features of two identities are never mixed.

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
        """The identity that `as_json` gave; `load_feature_index` has checked the form of what was read from a file."""
        texts = {name: values[name] and TextIdentity(**values[name]) for name in ("text", "pooled_text")}
        return cls(**{**values, **texts})

    def differences(self, other: "FeatureIdentity") -> list[str]:
        """The differences, as "NAME was HERE, is THERE"."""
        mine, others = _flat(self.as_json()), _flat(other.as_json())
        names = dict.fromkeys([*mine, *others])
        return [
            f"{name} was {mine.get(name)}, is {others.get(name)}"
            for name in names
            if mine.get(name) != others.get(name)
        ]

    @property
    def strides(self) -> Strides:
        """The strides of the VAE."""
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
    """The features of one clip, as the encoders made them.

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
    """A batch of features, as the loaders give it; B is the batch size of one device.

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
    index = read_index_file(folder, "features", FEATURES_FORMAT, FEATURES_VERSION, "osp cache", _INDEX_FORM)
    if index is not None:
        identity = index["identity"]
        index["identity"] = {name: identity[name] for name in _INDEX_FORM["identity"]}
        counts = [index["clips"], index["shards"], index["shard_clips"], *(identity[name] for name in _COUNTS)]
        if min(counts) < 1 or max(counts) > _MOST or index["shards"] != -(-index["clips"] // index["shard_clips"]):
            raise DataError(f"{folder / INDEX_NAME}: a damaged index, its numbers make no sense; write the folder anew")
        try:
            FeatureIdentity.from_json(identity)
        except UsageError as error:
            raise DataError(f"{folder / INDEX_NAME}: a damaged index ({error}); write the folder anew") from error
    return index


def require_feature_index(folder: Path) -> dict[str, Any]:
    """The parsed `index.json` of a folder of features. Raises DataError if it has none, or another."""
    if (index := load_feature_index(folder)) is None:
        raise DataError(f"{folder}: no folder of features ({INDEX_NAME} is missing); write one with `osp cache`")
    return index


def read_feature_shard(tar: Path, there: bool = True) -> tuple[dict[str, Any], list[ClipEntry]]:
    """The facts about a shard and its clips, by the listing beside it; the tar itself need not be `there`.

    Raises DataError if the listing is damaged, or the tar is not of the size that it says.
    """
    listing = tar.with_suffix(".jsonl")
    try:
        lines = ListingLines(listing)
        size = tar.stat().st_size if there else None
        (place, head), *others = lines
        check_form(head, _HEAD_FORM, place)
        if head.get("listing_sha256", "") not in ("", headed_digest(head, lines.after_first())):
            raise DocumentError(f"{listing}: is not as it was written")
        entries = [_feature_entry(tar, line, place) for place, line in others]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (DocumentError, ValueError) as error:
        raise DataError(f"{error}; a damaged listing: delete {tar.name} and {AGAIN}") from error
    found = head["bytes"] if size is None else size
    if (found, len(entries)) != (head["bytes"], head["clips"]):
        raise DataError(
            f"{tar}: {found} bytes and {len(entries)} clips, should be {head['bytes']} and {head['clips']}; "
            f"delete it and {AGAIN}"
        )
    return head, entries


def _feature_entry(tar: Path, line: Any, place: str) -> ClipEntry:
    """The clip of a line; a record of features keeps its checksum."""
    entry = listed_entry(tar, line, place)
    record = {**entry.record, "crc32": entry.crc32}
    check_form(record, _RECORD_FORM, place)
    if len(record["latent"]) != 4 or not all(0 < side <= 1 << 16 for side in record["latent"]):
        raise DocumentError(f"{place}: latent must be four sizes, C T H W")
    return replace(entry, record=record)
