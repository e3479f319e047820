"""A folder of features that is being written, by one process or several, which may be killed at any moment.

The clips to encode are numbered, and shard s holds what becomes of clips s * shard_clips up to the next shard's. So
shards are independent of each other: process i of n writes every n-th, and the folder is the same for any n. A shard
is there once its tar has its name; a process that is killed loses the shard it was at, and writes it again, the same
way, when it is started again.
"""

import hashlib
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from osp.checks import check_number
from osp.data.features.format import (
    DTYPES,
    EMPTY_NAME,
    FEATURES_FORMAT,
    FEATURES_VERSION,
    FeatureIdentity,
    Features,
    load_feature_index,
    read_feature_shard,
    require_feature_index,
    shard_path,
)
from osp.data.media.video import ClipError
from osp.data.shards.index import write_index
from osp.data.shards.tar import TarShard
from osp.errors import DataError, UsageError
from osp.files import folder_lock, write_whole

_LOCK = ".lock"


class FeatureWriter:
    """Writes one process's shards of a folder of features:

        for number in writer.todo():
            with writer.shard(number) as shard:
                for index in shard.clips:
                    shard.add(index, features)  # or shard.skip(index, key, reason); in any order

    For the result to be the same after a kill, a clip's features must not depend on which shards are there already: a
    batch for the encoders should not reach beyond one shard.

    Args:
        folder: made if it does not exist.
        identity: what the features are made with; a folder that was begun with another is refused.
        clips: how many clips the source has.
        origin: the source's fingerprint, which covers its settings.
        shard_clips: clips of the source a shard is for.
        part, parts: this is process `part` (0, 1, ...) of `parts`.
        empty: the embeddings of the empty text, `text` (`L D`) and `pooled_text` (`P`), for training without captions.
        vae_origin: the file or folder of the VAE, to be found again; a folder may go on with the VAE lying elsewhere.

    Raises:
        UsageError: the folder was begun with other encoders, another source or another `shard_clips`, or holds other
            tars; settings out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: FeatureIdentity,
        *,
        clips: int,
        origin: str,
        shard_clips: int = 256,
        part: int = 0,
        parts: int = 1,
        empty: Mapping[str, Tensor] | None = None,
        vae_origin: str | None = None,
    ) -> None:
        for name, value in (("clips", clips), ("shard_clips", shard_clips), ("parts", parts)):
            check_number(name, value, 1, whole=True)
        check_number("part", part, 0, below=parts, whole=True)
        self.folder, self.identity = Path(folder), identity
        self.clips, self.shard_clips = clips, shard_clips
        self.part, self.parts = part, parts
        self.shards = -(-clips // shard_clips)
        self._begin(origin, _embeddings(identity, empty or {}), vae_origin)

    def todo(self) -> list[int]:
        """This process's shards that are not there yet."""
        mine = range(self.part, self.shards, self.parts)
        return [number for number in mine if not shard_path(self.folder, number).exists()]

    def shard(self, number: int) -> "FeatureShard":
        """A shard to write, for use in a `with`: it is complete at the end, or was never there."""
        first = number * self.shard_clips
        return FeatureShard(
            shard_path(self.folder, number), self.identity, range(first, min(first + self.shard_clips, self.clips))
        )

    def _begin(self, origin: str, empty: dict[str, Tensor], vae_origin: str | None) -> None:
        index = {
            "format": FEATURES_FORMAT,
            "version": FEATURES_VERSION,
            "identity": self.identity.as_json(),
            "clips": self.clips,
            "shards": self.shards,
            "shard_clips": self.shard_clips,
            "origin": origin,
            "empty": EMPTY_NAME if empty else None,
            "empty_sha256": hashlib.sha256(save(empty)).hexdigest() if empty else None,
            "vae_origin": vae_origin,
        }
        try:
            with folder_lock(self.folder):  # several processes may begin at once
                if (written := load_feature_index(self.folder)) is not None:
                    self._check(written, index)
                    return
                foreign = next(self.folder.glob("*.tar"), None)
                if foreign is not None:
                    raise UsageError(f"{self.folder}: holds other tars ({foreign.name}); use a new folder")
                if empty:
                    write_whole(self.folder / EMPTY_NAME, save(empty))
                write_index(self.folder, index)
        except OSError as error:
            raise DataError(f"{error.filename or self.folder}: cannot be written ({error.strerror})") from error

    def _check(self, written: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        changed = FeatureIdentity.from_json(written["identity"]).differences(self.identity)
        names = {"clips": "clips of the source", "origin": "the source", "empty": "the empty text"}
        for name in ("clips", "origin", "shard_clips", "empty"):
            if written[name] != mine[name]:
                changed.append(f"{names.get(name, name)} was {written[name]}, is {mine[name]}")
        if changed:
            raise UsageError(
                f"{self.folder}: was begun otherwise: {'; '.join(changed)}. Set this back, or use another folder"
            )


def feature_report(folder: Path) -> dict[str, Any]:
    """The content of a folder of features by now, of all processes: shards, clips, bytes, `skipped`, and `complete`.

    Raises:
        DataError: there is no such folder, or a listing is damaged.
    """
    shards = require_feature_index(folder)["shards"]
    there = [path for path in (shard_path(folder, number) for number in range(shards)) if path.exists()]
    heads = [read_feature_shard(path)[0] for path in there]
    return {
        "complete": len(there) == shards,
        "shards": len(there),
        "clips": sum(head["clips"] for head in heads),
        "bytes": sum(head["bytes"] for head in heads),
        "skipped": [skip for head in heads for skip in head["skipped"]],
    }


class FeatureShard:
    """One shard that is being written; `clips` are the numbers of the clips that it is for."""

    def __init__(self, path: Path, identity: FeatureIdentity, clips: range) -> None:
        self.path, self.identity, self.clips = path, identity, clips
        self._told: set[int] = set()
        self._skipped: list[tuple[int, str, str]] = []
        self._tar: TarShard | None = None

    def __enter__(self) -> Self:
        try:
            self._tar = TarShard(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from error
        if self.path.exists():  # another process has been faster
            self._tar.discard()
            raise UsageError(f"{self.path}: another process has written this shard; give each its own part")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._tar is not None
        try:
            if error is None:
                missing = sorted(set(self.clips) - self._told)
                if missing:
                    raise ValueError(f"{self.path.name}: nothing was said about clips {missing}")
                names = ("clip", "key", "reason")
                self._tar.close([dict(zip(names, skip, strict=True)) for skip in sorted(self._skipped)])
        except OSError as broken:
            raise DataError(f"{self.path}: cannot be written ({broken.strerror})") from broken
        finally:
            self._tar.discard()  # nothing, where it has got its name

    def skip(self, index: int, key: str, reason: str) -> None:
        """Notes that clip `index` of the source has no features, and why."""
        self._tell(index)
        self._skipped.append((index, key, reason))

    def add(self, index: int, features: Features) -> None:
        """Stores the features of clip `index` of the source.

        Raises:
            osp.data.media.video.ClipError: they are not finite in the files' precision; skip the clip.
            ValueError: they do not have the shapes that the identity promises.
        """
        tensors = _latents(self.identity, features)
        for name, encoder in (("text", self.identity.text), ("pooled_text", self.identity.pooled_text)):
            embeddings = features.text if name == "text" else features.pooled_text
            if len(embeddings) != (0 if encoder is None else len(features.captions)):
                raise ValueError(f"{features.key}: {len(embeddings)} {name}, {len(features.captions)} captions")
            for number, embedding in enumerate(embeddings):
                tensors |= {f"{name}.{number}": _embeddings(self.identity, {name: embedding})[name]}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ClipError(features.key, f"its features are not finite in {self.identity.dtype}")
        self._tell(index)
        data = save(tensors)
        record = {
            **(features.record or {}),
            "captions": list(features.captions),
            "original": features.key,
            **features.size._asdict(),
            "fps": float(features.fps),
            "kind": "image" if features.size.frames == 1 else "video",
            "latent": list(features.latent.shape),
            "text_lengths": [len(text) for text in features.text],
            "dtype": self.identity.dtype,
            "crc32": zlib.crc32(data),
        }
        stem = re.sub(r"[^\w-]+", "_", features.key, flags=re.ASCII)[:60]
        assert self._tar is not None
        try:
            self._tar.add(f"{index:08d}-{stem}", "safetensors", data, record)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from error

    def _tell(self, index: int) -> None:
        if index not in self.clips or index in self._told:
            raise ValueError(f"{self.path.name}: clip {index} is not one of {self.clips} or comes twice")
        self._told.add(index)


def _latents(identity: FeatureIdentity, features: Features) -> dict[str, Tensor]:
    wanted = identity.latent_shape(features.size)
    given = {"latent": features.latent} | ({} if features.logvar is None else {"logvar": features.logvar})
    if (features.logvar is not None) != (identity.posterior == "gaussian"):
        raise ValueError(f"{features.key}: logvar goes with a gaussian posterior, this one is a {identity.posterior}")
    for name, tensor in given.items():
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{features.key}: {name} is {tuple(tensor.shape)}, should be {wanted} ({features.size})")
    return {name: _stored(identity, tensor) for name, tensor in given.items()}


def _embeddings(identity: FeatureIdentity, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, tensor in given.items():
        encoder, dimensions = {"text": (identity.text, 2), "pooled_text": (identity.pooled_text, 1)}[name]
        if encoder is None or tensor.ndim != dimensions or tensor.shape[-1] != encoder.width:
            raise ValueError(f"{name}: {tuple(tensor.shape)} does not suit {encoder}")
        stored[name] = _stored(identity, tensor)
    return stored


def _stored(identity: FeatureIdentity, tensor: Tensor) -> Tensor:
    # Each tensor is copied: safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", DTYPES[identity.dtype]).clone(memory_format=torch.contiguous_format)
