"""Encoded clips as a source, so that a denoiser trains without its VAE and text encoders."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from osp.data.buckets import Bucket, Patching, choose, make_buckets
from osp.data.features.format import (
    AGAIN,
    DTYPES,
    EMPTY_NAME,
    FeatureIdentity,
    read_feature_shard,
    require_feature_index,
    shard_path,
)
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError
from osp.data.shards.index import ClipEntry
from osp.data.sources.source import Elsewhere, ListedClips
from osp.data.sources.where import passing
from osp.errors import DataError
from osp.seeds import seeded


@dataclass(frozen=True)
class StoredShapes(Patching):
    """The bucket rule of clips that are encoded already: each keeps its shape, within limits on its tokens."""

    min_tokens: int = 1
    max_tokens: int = 1 << 62

    def fit(self, clip: Shape) -> Shape | None:
        """See `osp.data.buckets.BucketRule.fit`."""
        whole = self.token_strides.fits(1, clip.height, clip.width)  # a stored clip may have any number of frames
        return clip if whole and self.min_tokens <= self.tokens(clip) <= self.max_tokens else None


class FeatureClips(ListedClips):
    """The encoded clips of a folder: a source with buckets for the loaders, which give a `FeatureBatch`.

    Args:
        path: the folder, or shards of features that lie elsewhere (`osp.data.streaming`).
        patch_size: latent pixels along a side of the denoiser's patches; it decides how many tokens a clip has.
        sample: draw from the posterior and among the captions; else take the mean and the first caption.
        min_tokens, max_tokens: clips outside are left out.
        min_clips: shapes that fewer clips than these have are left out, with their clips.
        partial: also read a folder that is still being written; the shards that are there count.
        where: a condition on the records of clips, as for `osp.data.sources.ShardClips`; others are left out.

    A clip without captions gets the embedding of the empty text, if the folder has one, else a text of length 0.

    Attributes:
        made_with: the identity of the features' encoders.
        empty: `text` (`L D`) and `pooled_text` (`P`) of the empty text, for text dropout; an empty dict if not stored.
        dropped: clips that are left out (reason -> clips).
        vae_origin: the file or folder that the VAE was read from when the features were made, if that is known.

    Raises:
        DataError: no such folder, not complete, damaged, or no clip is within the limits or meets the condition.
        UsageError: the condition cannot be read, or names what no clip has.
    """

    path: Path
    made_with: FeatureIdentity

    def __init__(
        self,
        path: str | Path | Elsewhere,
        patch_size: int = 2,
        sample: bool = True,
        min_tokens: int = 1,
        max_tokens: int = 1 << 62,
        min_clips: int = 1,
        partial: bool = False,
        where: str | None = None,
    ) -> None:
        self.elsewhere = None if isinstance(path, str | Path) else path
        self.path, self.sample = Path(path) if isinstance(path, str | Path) else path.folder, sample
        index = require_feature_index(self.path)
        self.made_with = FeatureIdentity.from_json(index["identity"])
        self.vae_origin = index["vae_origin"]
        self.empty = self._load_empty(index.get("empty_sha256")) if index["empty"] else {}
        listed = self._listed(index, partial) if self.elsewhere is None else self.elsewhere.features()
        listed, failing = passing(listed, where, str(self.path))
        rule = StoredShapes(
            self.made_with.time_stride,
            self.made_with.space_stride,
            patch_size,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
        )
        rule.check()
        sizes: list[Shape | None] = [self._shape(entry) for entry in listed]
        kept, shapes, unsuited = choose(sizes, rule, min_clips)
        self.dropped = {**failing, **unsuited}
        if not kept:
            raise DataError(
                f"{self.path}: none of its {len(listed)} clips has {min_tokens} to {max_tokens} tokens of "
                f"{patch_size}x{patch_size} latent pixels; allow others"
            )
        self.entries = [listed[number] for number in kept]
        self._buckets = make_buckets(shapes, rule)
        self._shift, self._scale = (
            torch.tensor(values).view(-1, 1, 1, 1) for values in (self.made_with.shift, self.made_with.scale)
        )

    def buckets(self) -> list[Bucket]:
        """See `ClipSource.buckets`."""
        return self._buckets

    def fingerprint(self) -> str:
        listing = hashlib.sha256(json.dumps(self.made_with.as_json()).encode())
        for entry in self.entries:
            line = f"{entry.key} {entry.size} {entry.record['crc32']}\n"
            listing.update(line.encode("utf-8", "surrogatepass"))
        return (
            f"features sample={self.sample} clips={len(self.entries)} list={listing.hexdigest()[:16]}{self._sequence()}"
        )

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """Clip `index`: `latent`, `text`, `pooled_text`, `caption`, `key`, `fps`, `size`, as in `FeatureBatch`.

        The sample of the posterior and the caption come from a generator seeded by (key, draw). Raises
        `osp.data.media.video.ClipError` for a clip whose bytes are not those that were written.
        """
        entry = self.entries[index]
        tensors = self._tensors(entry)
        captions: list[str] = entry.record["captions"]
        generator = seeded(entry.key, draw)
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
        for name, encoder in (("text", self.made_with.text), ("pooled_text", self.made_with.pooled_text)):
            if encoder is not None:
                shape = (0, encoder.width) if name == "text" else (encoder.width,)
                nothing = self.empty.get(name, torch.zeros(shape, dtype=DTYPES[self.made_with.dtype]))
                clip[name] = tensors[f"{name}.{chosen}"] if captions else nothing
        return clip

    def collate(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Clips of one bucket as a batch: latents stacked, texts padded to the longest with a mask."""
        batch: dict[str, Any] = {name: [clip[name] for clip in clips] for name in ("caption", "key")}
        batch["latent"] = torch.stack([clip["latent"] for clip in clips])
        batch["fps"] = torch.tensor([clip["fps"] for clip in clips], dtype=torch.float32)
        batch["size"] = torch.tensor([clip["size"] for clip in clips], dtype=torch.int64)
        if self.made_with.text is not None:
            texts = [clip["text"] for clip in clips]
            longest = max(1, *(len(text) for text in texts))
            batch["text"] = texts[0].new_zeros(len(texts), longest, self.made_with.text.width)
            batch["text_mask"] = torch.zeros(len(texts), longest, dtype=torch.bool)
            for row, text in enumerate(texts):
                batch["text"][row, : len(text)] = text
                batch["text_mask"][row, : len(text)] = True
        if self.made_with.pooled_text is not None:
            batch["pooled_text"] = torch.stack([clip["pooled_text"] for clip in clips])
        return batch

    def _tensors(self, entry: ClipEntry) -> dict[str, Tensor]:
        try:
            tensors = load(entry.read())
        except (DataError, SafetensorError, ValueError) as error:
            raise ClipError(entry.key, str(error)) from error
        shapes: dict[str, list[int]] = {"latent": entry.record["latent"]}
        if "logvar" in tensors:
            shapes["logvar"] = entry.record["latent"]
        for number in range(len(entry.record["captions"])):
            if (text := self.made_with.text) is not None:
                shapes[f"text.{number}"] = [*entry.record["text_lengths"][number : number + 1], text.width]
            if (pooled := self.made_with.pooled_text) is not None:
                shapes[f"pooled_text.{number}"] = [pooled.width]
        for name, shape in shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
                raise ClipError(
                    entry.key, f"its {name} in {entry.tar} is missing or of another shape than {tuple(shape)}"
                )
        return tensors

    def _load_empty(self, sha256: str | None) -> dict[str, Tensor]:
        """The embeddings of the empty text. Raises DataError if they are not those that were written."""
        path = self.path / EMPTY_NAME
        try:
            data = path.read_bytes()
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                raise DataError(f"{path}: damaged, it is not as it was written; write the folder anew")
            return load(data)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not readable ({error}); {AGAIN}") from error

    def _listed(self, index: Mapping[str, Any], partial: bool) -> list[ClipEntry]:
        shards = [shard_path(self.path, number) for number in range(index["shards"])]
        there = [tar for tar in shards if tar.exists()]
        if len(there) < len(shards) and not partial:
            raise DataError(f"{self.path}: only {len(there)} of {len(shards)} shards are written; {AGAIN}")
        return [entry for tar in there for entry in read_feature_shard(tar)[1]]

    def _shape(self, entry: ClipEntry) -> Shape:
        """The size that the latent stands for: clips whose frames fill the same latent frames go together.

        Raises DataError for a latent of another VAE.
        """
        if entry.record["latent"][0] != self.made_with.latent_channels:
            raise DataError(f"{entry.tar}: {entry.key} has {entry.record['latent'][0]} latent channels; {AGAIN}")
        _, frames, height, width = entry.record["latent"]
        return self.made_with.strides.pixels(frames, height, width)
