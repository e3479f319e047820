"""Encoded clips on disk: what a folder of features holds (`FeatureIdentity`), and `FeatureClips`, which reads it.

A clip's features are the posterior of its latent and the embeddings of its captions, so that a denoiser trains without
its VAE and text encoders. `osp.data.feature_writer` writes them. The format is described in data/README.md.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from osp.data.buckets import Bucket, Patching, Shape, choose, make_buckets
from osp.data.shard_index import INDEX_NAME, ClipEntry, listed_entry
from osp.data.sources import stable_seed
from osp.data.video import ClipError
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

_AGAIN = "run the command that wrote the folder again"


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
        if self.posterior not in POSTERIORS or self.dtype not in DTYPES:
            raise UsageError(
                f"features: posterior={self.posterior}, dtype={self.dtype}: choose from {', '.join(POSTERIORS)}, "
                f"and from {', '.join(DTYPES)}"
            )
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

    def latent_shape(self, size: Shape) -> tuple[int, int, int, int]:
        """`C T H W` of the latent of a clip of that size."""
        frames = 1 + -(-(size.frames - 1) // self.time_stride)
        return self.latent_channels, frames, size.height // self.space_stride, size.width // self.space_stride


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


@dataclass(frozen=True)
class StoredShapes(Patching):
    """The bucket rule of clips that are encoded already: each keeps its shape, within limits on its tokens."""

    min_tokens: int = 1
    max_tokens: int = 1 << 62

    def fit(self, clip: Shape) -> Shape | None:
        """See `osp.data.buckets.BucketRule.fit`."""
        side = self.space_stride * self.patch_size
        suits = clip.height % side == 0 and clip.width % side == 0
        return clip if suits and self.min_tokens <= self.tokens(clip) <= self.max_tokens else None


class FeatureClips:
    """The encoded clips of a folder: a source with buckets for the loaders, which give a `FeatureBatch`.

    Args:
        path: the folder.
        patch_size: latent pixels along a side of the denoiser's patches; it decides how many tokens a clip has.
        sample: draw from the posterior and among the captions; else take the mean and the first caption.
        min_tokens, max_tokens: clips outside are left out.
        min_clips: shapes that fewer clips than these have are left out, with their clips.
        partial: also read a folder that is still being written; the shards that are there count.

    A clip without captions gets the embedding of the empty text, if the folder has one, else a text of length 0.

    Attributes:
        identity: what the features were made with.
        empty: `text` (`L D`) and `pooled_text` (`P`) of the empty text, for text dropout; an empty dict if not stored.
        dropped: clips that are left out (reason -> clips).
        vae_origin: the file or folder that the VAE was read from when the features were made, if that is known.

    Raises:
        DataError: no such folder, not complete, damaged, or no clip is within the limits.
    """

    def __init__(
        self,
        path: str | Path,
        patch_size: int = 2,
        sample: bool = True,
        min_tokens: int = 1,
        max_tokens: int = 1 << 62,
        min_clips: int = 1,
        partial: bool = False,
    ) -> None:
        self.path, self.sample = Path(path), sample
        index = require_feature_index(self.path)
        self.identity = FeatureIdentity.from_json(index["identity"])
        self.vae_origin: str | None = index["vae_origin"]
        self.empty = self._load_empty() if index["empty"] else {}
        listed = list(self._listed(index, partial))
        strides = self.identity.time_stride, self.identity.space_stride
        rule = StoredShapes(*strides, patch_size, min_tokens=min_tokens, max_tokens=max_tokens)
        rule.check()
        sizes: list[Shape | None] = [self._shape(entry) for entry in listed]
        kept, shapes, self.dropped = choose(sizes, rule, min_clips)
        if not kept:
            raise DataError(
                f"{self.path}: none of its {len(listed)} clips has {min_tokens} to {max_tokens} tokens of "
                f"{patch_size}x{patch_size} latent pixels; allow others"
            )
        self.entries = [listed[number] for number in kept]
        self._buckets = make_buckets(shapes, rule)
        self._shift, self._scale = (
            torch.tensor(values).view(-1, 1, 1, 1) for values in (self.identity.shift, self.identity.scale)
        )

    def __len__(self) -> int:
        return len(self.entries)

    def buckets(self) -> list[Bucket]:
        """See `osp.data.sources.BucketSource.buckets`."""
        return self._buckets

    def fingerprint(self) -> str:
        listing = hashlib.sha256(json.dumps(self.identity.as_json()).encode())
        for entry in self.entries:
            listing.update(f"{entry.key} {entry.size} {entry.record['crc32']}\n".encode())
        return f"features sample={self.sample} clips={len(self.entries)} list={listing.hexdigest()[:16]}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """Clip `index`: `latent`, `text`, `pooled_text`, `caption`, `key`, `fps`, `size`, as in `FeatureBatch`.

        The sample of the posterior and the caption come from a generator seeded by (key, draw). Raises
        `osp.data.video.ClipError` for a clip whose bytes are not those that were written.
        """
        entry = self.entries[index]
        tensors = self._tensors(entry)
        captions: list[str] = entry.record["captions"]
        generator = torch.Generator().manual_seed(stable_seed(entry.key, draw))
        chosen = int(torch.randint(max(1, len(captions)), (), generator=generator)) if self.sample else 0
        latent = tensors["latent"].float()
        if self.sample and "logvar" in tensors:
            noise = torch.randn(latent.shape, generator=generator)
            latent = latent + torch.exp(0.5 * tensors["logvar"].float()) * noise
        clip = {
            "latent": (latent - self._shift) * self._scale,
            "caption": captions[chosen] if captions else "",
            "key": entry.key,
            "fps": float(entry.record["fps"]),
            "size": tuple(entry.record[name] for name in ("frames", "height", "width")),
        }
        for name, encoder in (("text", self.identity.text), ("pooled_text", self.identity.pooled_text)):
            if encoder is not None:
                shape = (0, encoder.width) if name == "text" else (encoder.width,)
                nothing = self.empty.get(name, torch.zeros(shape, dtype=DTYPES[self.identity.dtype]))
                clip[name] = tensors[f"{name}.{chosen}"] if captions else nothing
        return clip

    def collate(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Clips of one bucket as a batch: latents stacked, texts padded to the longest with a mask."""
        batch: dict[str, Any] = {name: [clip[name] for clip in clips] for name in ("caption", "key")}
        batch["latent"] = torch.stack([clip["latent"] for clip in clips])
        batch["fps"] = torch.tensor([clip["fps"] for clip in clips], dtype=torch.float32)
        batch["size"] = torch.tensor([clip["size"] for clip in clips], dtype=torch.int64)
        if self.identity.text is not None:
            texts = [clip["text"] for clip in clips]
            longest = max(1, *(len(text) for text in texts))
            batch["text"] = texts[0].new_zeros(len(texts), longest, self.identity.text.width)
            batch["text_mask"] = torch.zeros(len(texts), longest, dtype=torch.bool)
            for row, text in enumerate(texts):
                batch["text"][row, : len(text)] = text
                batch["text_mask"][row, : len(text)] = True
        if self.identity.pooled_text is not None:
            batch["pooled_text"] = torch.stack([clip["pooled_text"] for clip in clips])
        return batch

    def _tensors(self, entry: ClipEntry) -> dict[str, Tensor]:
        try:
            data = entry.read()
            if zlib.crc32(data) != entry.record["crc32"]:
                raise ClipError(entry.key, f"its bytes in {entry.tar} are damaged")
            return load(data)
        except ClipError:
            raise
        except (DataError, SafetensorError, ValueError) as error:
            raise ClipError(entry.key, str(error)) from error

    def _load_empty(self) -> dict[str, Tensor]:
        try:
            return load_file(self.path / EMPTY_NAME)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path / EMPTY_NAME}: not readable ({error}); {_AGAIN}") from error

    def _listed(self, index: Mapping[str, Any], partial: bool) -> list[ClipEntry]:
        shards = [shard_path(self.path, number) for number in range(index["shards"])]
        there = [tar for tar in shards if tar.exists()]
        if len(there) < len(shards) and not partial:
            raise DataError(f"{self.path}: only {len(there)} of {len(shards)} shards are written; {_AGAIN}")
        return [entry for tar in there for entry in read_feature_shard(tar)[1]]

    def _shape(self, entry: ClipEntry) -> Shape:
        """The size that the latent stands for: clips whose frames fill the same latent frames go together."""
        _, frames, height, width = entry.record["latent"]
        stride = self.identity.space_stride
        return Shape(1 + (frames - 1) * self.identity.time_stride, height * stride, width * stride)


def shard_path(folder: Path, number: int) -> Path:
    """The tar of a shard of features."""
    return folder / f"shard-{number:06d}.tar"


def load_feature_index(folder: Path) -> dict[str, Any] | None:
    """The parsed `index.json` of a folder of features, None if it has none. Raises DataError for any other."""
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable index ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FEATURES_FORMAT:
        raise DataError(
            f"{path}: not an index of features (format {FEATURES_FORMAT!r} expected); make one with `osp cache`"
        )
    if index.get("version") != FEATURES_VERSION:
        raise DataError(
            f"{path}: version {index.get('version')!r}, this OSP reads version {FEATURES_VERSION}; write it anew"
        )
    wanted = {"identity", "clips", "shards", "shard_clips", "origin", "empty", "vae_origin"}
    if not wanted <= index.keys() or index["identity"].keys() != {field.name for field in fields(FeatureIdentity)}:
        raise DataError(f"{path}: a damaged index; write the folder anew")
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
        raise DataError(f"{listing}: a damaged listing ({error!r}); delete {tar.name} and {_AGAIN}") from error
    if (found, len(entries)) != (expected, clips):
        raise DataError(
            f"{tar}: {found} bytes and {len(entries)} clips, should be {expected} and {clips}; delete it and {_AGAIN}"
        )
    return head, entries
