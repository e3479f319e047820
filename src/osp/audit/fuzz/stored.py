"""Shards and features, ours and those of others, as they are fuzzed: every clip of a folder is listed and read."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from osp.audit.fuzz.media import FRAMES, SIDE, drawn, mp4, still
from osp.audit.fuzz.subject import Reading, Subject
from osp.data.features.format import FeatureIdentity, Features, TextIdentity
from osp.data.features.writer import FeatureWriter, feature_report
from osp.data.media.shape import Shape
from osp.data.shards.build import write_rendered, write_shards
from osp.data.shards.index import read_index
from osp.data.sources import FeatureClips, ShardClips

_CLIPS = 4
_IDENTITY = FeatureIdentity(
    vae="WFVAE",
    vae_fingerprint="x",
    time_stride=4,
    space_stride=8,
    latent_channels=2,
    shift=(0.1, 0.2),
    scale=(2.0, 2.0),
    text=TextIdentity("drawn", "y", 6),
    dtype="float16",
)


def make_rendered(folder: Path) -> None:
    """Two shards of two procedural clips each."""
    clips = [(f"clip{n}", drawn(n, 5), {"fps": 8.0, "caption": f"clip {n} is shown"}) for n in range(_CLIPS)]
    write_rendered(clips, folder, shard_clips=2)


def make_written(folder: Path) -> None:
    """A folder of videos, and the shards that were cut from it, with their journal."""
    videos = folder / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(mp4(1))
    (videos / "b.jpg").write_bytes(still("JPEG"))
    (videos / "b.txt").write_text("a still picture")
    (videos / "c.mp4").write_bytes(b"no video")
    write_shards(videos, folder / "shards", clip_seconds=0.8, workers=0)


def make_foreign(folder: Path) -> None:
    """A tar as others write it: members of several suffixes, folders, long names, and extended headers."""
    described = json.dumps({"frames": FRAMES, "fps": 8, "caption": "a dog", "width": SIDE, "height": SIDE}).encode()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (
            *(("000.mp4", mp4(1)), ("000.json", described), ("001.jpg", still("JPEG")), ("001.txt", b"a picture")),
            *((f"{'long' * 40}.mp4", mp4(2)), ("folder/caf\xe9.mp4", mp4(3)), ("folder/caf\xe9.txt", b"coffee")),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def make_features(folder: Path) -> None:
    """Two shards of two clips' features each, with texts and the empty text."""
    generator = torch.Generator().manual_seed(0)
    empty = {"text": torch.zeros(1, 6)}
    writer = FeatureWriter(folder, _IDENTITY, clips=_CLIPS, origin="drawn", shard_clips=2, empty=empty)
    for number in writer.todo():
        with writer.shard(number) as shard:
            for index in shard.clips:
                latent = torch.randn(2, 2, 4, 4, generator=generator)
                text = [torch.randn(3, 6, generator=generator)]
                size = Shape(5, SIDE, SIDE)
                shard.add(index, Features(f"clip{index}", size, latent, latent - 3, ["a clip"], text, fps=8.0))


def read_folder(folder: Path, reading: Reading) -> None:
    """Every clip of a folder of shards or tars: its entry, its bytes, and a few frames as training takes them."""
    entries = reading(read_index, folder) or []
    for entry in entries[:8]:
        reading(entry.read)
    source = _opened(reading, partial(ShardClips, folder, 1, 16, 16))
    read_clips(source, reading)
    read_clips(_opened(reading, partial(ShardClips, folder, 3, 16, 16, fps=6.0)), reading)


def read_written(folder: Path, reading: Reading) -> None:
    """Shards whose writer goes on: the same command again, and what the folder holds then."""
    videos, shards = folder / "videos", folder / "shards"
    reading(write_shards, videos, shards, clip_seconds=0.8, workers=0)
    (videos / "d.jpg").write_bytes(still("JPEG")[:-2] + b"\xff\xd9\0")
    reading(write_shards, videos, shards, clip_seconds=0.8, workers=0)
    read_folder(shards, reading)


def read_features(folder: Path, reading: Reading) -> None:
    """Every clip of a folder of features, all of them as one batch, and the writer that would go on."""
    reading(feature_report, folder)
    for sample in (True, False):
        source = _opened(reading, partial(FeatureClips, folder, sample=sample))
        clips = read_clips(source, reading)
        if source is not None:
            reading(_about, source)
        if source is not None and len(clips) > 1 and len({clip["latent"].shape for clip in clips}) == 1:
            reading(source.collate, clips)
    make = partial(FeatureWriter, folder, _IDENTITY, clips=_CLIPS, origin="drawn", shard_clips=2)
    if (writer := _opened(reading, partial(make, empty={"text": torch.zeros(1, 6)}))) is not None:
        reading(writer.todo)


def read_clips(source: Any, reading: Reading) -> list[dict[str, Any]]:
    """The clips of a source that can be read, and what it says about itself; none of None."""
    if source is None:
        return []
    for told in (source.fingerprint, source.summary, source.buckets, source.has_captions):
        reading(told)
    read = [reading(source.read, number, 0) for number in range(min(len(source), 8))]
    return [clip for clip in read if clip is not None]


def _about(source: FeatureClips) -> tuple[Any, ...]:
    return source.made_with, source.vae_origin, dict(source.empty), dict(source.dropped)


def _opened(reading: Reading, make: Any) -> Any:
    return reading(make)


TARS = [
    Subject("rendered", make_rendered, read_folder, ["*.tar"], weight=2),
    Subject("foreign", make_foreign, read_folder, ["*.tar"], weight=4),
    Subject("features", make_features, read_features, ["*.tar", "empty.safetensors"], weight=2),
]
LISTINGS = [
    Subject("rendered", make_rendered, read_folder, ["*.json", "*.jsonl"], weight=3),
    Subject("written", make_written, read_written, ["shards/*.json", "shards/*.jsonl"]),
    Subject("features", make_features, read_features, ["*.json", "*.jsonl"], weight=3),
]
