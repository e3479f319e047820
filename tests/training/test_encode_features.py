"""Clips through a frozen VAE and text encoder into a folder of features."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from osp.conditioning import EncodedText, Pair, TextEncoder, WordText
from osp.data.buckets import ShapeList
from osp.data.features.format import Features
from osp.data.features.writer import FeatureWriter, feature_report
from osp.data.media.shape import Shape
from osp.data.media.video import encode_video, to_float
from osp.data.shards.build import write_rendered, write_shards
from osp.data.shards.index import read_index
from osp.data.sources import BucketClips, FeatureClips, ShardClips, SyntheticClips
from osp.errors import DataError, UsageError
from osp.training.encode_features import (
    ClipSource,
    FeatureEncoder,
    encode_features,
    measure_source_scaling,
    read_scaling,
    same_shape_batches,
    text_identities,
)
from osp.training.text_input import TextInput
from osp.vae import WFVAE, LatentCodec

CLIPS = 10


def tiny_vae(seed: int = 0) -> WFVAE:
    torch.manual_seed(seed)
    return WFVAE(
        latent_channels=4,
        base_channels=4,
        encoder_blocks=1,
        decoder_blocks=1,
        encoder_flow_channels=4,
        decoder_flow_channels=4,
    ).eval()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    drawn = SyntheticClips(CLIPS, frames=9, height=32, width=32, objects=1, plain=True)
    clips = [drawn.read(index, 0) for index in range(CLIPS)]
    rendered = [
        (f"{i:03d}", clip["video"], {"fps": 8.0, "caption": clip["caption"] if i else "", "scores": {"aesthetic": i}})
        for i, clip in enumerate(clips)
    ]
    write_rendered(rendered, folder, lossless=True)
    return folder


@pytest.fixture(scope="module")
def source(shards: Path) -> ShardClips:
    return ShardClips(shards, 9, 32, 32, random_start=False)


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec(tiny_vae(), shift=0.1, scale=[0.5, 1.0, 2.0, 4.0])


def write(
    folder: Path, source: ClipSource, encoder: FeatureEncoder, batch_size: int = 2, workers: int = 2, **wanted: Any
) -> int:
    settings = {"clips": len(source), "origin": source.fingerprint(), "shard_clips": 3, "empty": encoder.empty()}
    writer = FeatureWriter(folder, encoder.identity, **(settings | wanted))
    return encode_features(source, encoder, writer, batch_size, workers)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.*[rln]"))}


class Letters(TextEncoder):
    """A frozen encoder: a token for each letter; or, called by `Pair`, a pooled vector."""

    trained = False
    max_tokens = 99

    def __init__(self, name: str, channels: int, pooled_channels: int | None = None, pooler: bool = False) -> None:
        self.name, self.channels, self.pooled_channels, self.pooler = name, channels, pooled_channels, pooler
        self.check_length = self  # as CLIPPooled has one
        self.said = False

    def __call__(self, prompts: Sequence[str], strict: bool = False) -> Any:
        codes = [torch.tensor([float(ord(letter)) for letter in prompt + "."]) / 256 for prompt in prompts]
        pooled = torch.stack([code.mean().expand(self.pooled_channels or self.channels) for code in codes])
        if self.pooler:
            return pooled
        text = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True)
        mask = torch.arange(text.shape[1]) < torch.tensor([[len(code)] for code in codes])
        text = text[..., None].expand(-1, -1, self.channels)
        return EncodedText(text, mask, None if self.pooled_channels is None else pooled)

    def to(self, device: object) -> "Letters":
        return self

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) + 1 for prompt in prompts]

    def fingerprint(self) -> str:
        return f"{self.name} {self.channels}"


def pair() -> TextEncoder:
    tokens, pooled = Letters("t5", 6), Letters("clip", 3, pooler=True)
    return Pair(tokens, pooled)  # type: ignore[arg-type]


def test_features_are_what_the_codec_makes_of_the_same_clip(
    tmp_path: Path, source: ShardClips, codec: LatentCodec
) -> None:
    encoder = FeatureEncoder(codec)
    assert write(tmp_path, source, encoder, vae_origin="/vaes/tiny") == CLIPS
    features = FeatureClips(tmp_path, sample=False)
    assert (len(features), features.vae_origin) == (CLIPS, "/vaes/tiny")
    for index in range(CLIPS):
        read, clip = features.read(index, 0), source.read(index, 0)
        wanted = codec.encode(to_float(clip["video"])[None])[0]
        torch.testing.assert_close(read["latent"], wanted, rtol=2e-3, atol=2e-3)
        assert (read["caption"], read["fps"], read["size"]) == (clip["caption"], 8.0, (9, 32, 32))
        record = features.entries[index].record
        assert (record["original"], record["scores"]) == (clip["key"], {"aesthetic": index})
        assert len(record["captions"]) == (index > 0)
    spread = torch.stack([FeatureClips(tmp_path).read(1, draw)["latent"] for draw in range(200)]).std(dim=0)
    posterior = codec.vae.encode(to_float(source.read(1, 0)["video"])[None])
    wanted = torch.exp(0.5 * posterior.logvar[0]) * torch.tensor(codec.scale).view(-1, 1, 1, 1)
    assert (spread / wanted).mean().item() == pytest.approx(1.0, abs=0.02)


def test_parts_and_runs_that_were_cut_off_end_in_the_same_bytes(
    tmp_path: Path, source: ShardClips, codec: LatentCodec
) -> None:
    encoder = FeatureEncoder(codec, pair())
    assert write(tmp_path / "whole", source, encoder) == CLIPS
    for part in (1, 0):
        write(tmp_path / "parts", source, encoder, part=part, parts=2, workers=1)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")

    class Stop(Exception):
        """The moment at which a run is cut off."""

    class Stopping(FeatureEncoder):
        batches = 0

        def __call__(self, clips: Sequence[Mapping[str, Any]]) -> list[Features]:
            self.batches -= 1
            if not self.batches:
                raise Stop
            return super().__call__(clips)

    stopping = Stopping(codec, pair())
    for batches in (4, 2, 3):  # a batch of two and one of one make a shard
        stopping.batches = batches
        with pytest.raises(Stop):
            write(tmp_path / "cut", source, stopping)
    assert feature_report(tmp_path / "cut")["shards"] == 2
    assert write(tmp_path / "cut", source, encoder) == CLIPS - 6
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert write(tmp_path / "cut", source, encoder) == 0


def test_captions_are_encoded_after_the_encoders_cleaning_from_features_and_from_clips(
    source: ShardClips, codec: LatentCodec
) -> None:
    text = Letters("letters", 6)
    text.cleaning = "twice"
    clip = {**source.read(1, 0), "captions": ["A <b>Cat</b>, 1920x1080", "(dog)"]}
    (features,) = FeatureEncoder(codec, text)([clip])
    assert features.captions == ["A <b>Cat</b>, 1920x1080", "(dog)"]
    for made, caption in zip(features.text, ["a cat", "dog"], strict=True):
        torch.testing.assert_close(made, text([caption]).text[0])
    batch = {"caption": ["(dog)", "A Cat"], "video": torch.zeros(2, 3, 1, 8, 8)}
    read = TextInput(text, dropout=0.5).encode(batch, None, torch.tensor([False, True]))
    torch.testing.assert_close(read.text, text(["dog", ""]).text)


def test_frozen_text_is_stored_and_text_that_trains_along_is_not(
    tmp_path: Path, source: ShardClips, codec: LatentCodec
) -> None:
    encoder = FeatureEncoder(codec, pair())
    write(tmp_path / "pair", source, encoder)
    features = FeatureClips(tmp_path / "pair", sample=False)
    assert features.made_with.text is not None
    assert features.made_with.pooled_text is not None
    assert (features.made_with.text.fingerprint, features.made_with.text.width) == ("t5 6", 6)
    assert (features.made_with.pooled_text.fingerprint, features.made_with.pooled_text.width) == ("clip 3", 3)
    for index in range(CLIPS):  # clip 0 has no caption: the empty text stands for it
        clip = features.read(index, 0)
        wanted = pair()([clip["caption"]])
        assert clip["text"].dtype == torch.float16
        torch.testing.assert_close(clip["text"].float(), wanted.text[0], rtol=1e-3, atol=1e-3)
        assert wanted.pooled is not None
        torch.testing.assert_close(clip["pooled_text"].float(), wanted.pooled[0], rtol=1e-3, atol=1e-3)

    words = FeatureEncoder(codec, WordText(channels=16, pooled_channels=8, layers=1, heads=2))
    assert words.identity == FeatureEncoder(codec).identity
    write(tmp_path / "words", source, words)
    captions = FeatureClips(tmp_path / "words", sample=False)
    assert captions.read(1, 0).keys() & {"text", "pooled_text", "caption"} == {"caption"}
    assert captions.read(1, 0)["caption"] == source.read(1, 0)["caption"]
    both = text_identities(Letters("both", 6, pooled_channels=3))
    assert [identity and (identity.name, identity.width) for identity in both] == [("both", 6), ("both", 3)]


def test_samples_follow_from_the_clip_alone(tmp_path: Path, source: ShardClips, codec: LatentCodec) -> None:
    encoder = FeatureEncoder(codec, posterior="sample", dtype="float32")
    write(tmp_path / "one", source, encoder, batch_size=1)
    write(tmp_path / "three", source, encoder, batch_size=3)
    one, three = (torch.stack(latents(tmp_path / name)) for name in ("one", "three"))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)
    noise = []
    for index, latent in enumerate(one):
        posterior = codec.vae.encode(to_float(source.read(index, 0)["video"])[None])
        noise.append((codec.unscaled(latent[None]) - posterior.mean) / torch.exp(0.5 * posterior.logvar))
    assert torch.cat(noise).mean().item() == pytest.approx(0.0, abs=0.1)
    assert torch.cat(noise).std().item() == pytest.approx(1.0, abs=0.05)
    assert not torch.allclose(noise[0], noise[1])


def latents(folder: Path) -> list[Tensor]:
    features = FeatureClips(folder, sample=False)
    return [features.read(index, 0)["latent"] for index in range(len(features))]


def test_images_and_videos_go_to_their_buckets(tmp_path: Path, codec: LatentCodec) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    drawn = SyntheticClips(5, frames=12, height=48, width=48)
    for index in range(5):
        video = drawn.read(index, 0)["video"][:, : 12 if index % 2 else 1, :, : 48 - 16 * (index == 3)]
        suffix = "mp4" if video.shape[1] > 1 else "png"
        (videos / f"{index}.{suffix}").write_bytes(encode(video))
        (videos / f"{index}.txt").write_text(f"number {index}")
    write_shards(videos, tmp_path / "shards", workers=0)
    rule = ShapeList(4, 8, shapes=(Shape(1, 48, 48), Shape(9, 48, 48), Shape(9, 48, 32)))
    source = BucketClips(tmp_path / "shards", rule, fps=8.0, random_start=False)
    assert same_shape_batches(source, range(5), 2) == [[0, 2], [4], [1], [3]]
    write(tmp_path / "features", source, FeatureEncoder(codec), shard_clips=5)
    features = FeatureClips(tmp_path / "features", sample=False)
    assert {tuple(bucket.shape): len(bucket.clips) for bucket in features.buckets()} == {
        (1, 48, 48): 3,
        (9, 48, 48): 1,
        (9, 48, 32): 1,
    }
    for index, entry in enumerate(features.entries):
        clip = features.read(index, 0)
        number = int(entry.key[:8])
        assert clip["caption"] == f"number {number}"
        assert (clip["fps"], clip["latent"].shape[1]) == ((8.0, 3) if number % 2 else (0.0, 1))
        wanted = codec.encode(to_float(source.read(number, 0)["video"])[None])[0]
        torch.testing.assert_close(clip["latent"], wanted, rtol=2e-3, atol=2e-3)


def encode(video: Tensor) -> bytes:
    """A PNG for a single frame, else an MP4."""
    if video.shape[1] > 1:
        return encode_video(video, 8.0)
    file = io.BytesIO()
    Image.fromarray(video[:, 0].permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def test_broken_clips_are_skipped_and_told(
    tmp_path: Path, shards: Path, codec: LatentCodec, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    entries = read_index(folder)
    spoil(entries[4:5])

    class Overflowing(FeatureEncoder):
        def __call__(self, clips: Sequence[Mapping[str, Any]]) -> list[Features]:
            made = super().__call__(clips)
            for features in made:
                if features.key == entries[6].key:
                    features.latent.fill_(1e6)
            return made

    source = ShardClips(folder, 9, 32, 32, random_start=False)
    assert write(tmp_path / "features", source, Overflowing(codec)) == CLIPS - 2
    report = feature_report(tmp_path / "features")
    assert [skip["clip"] for skip in report["skipped"]] == [4, 6]
    assert "not finite in float16" in report["skipped"][1]["reason"]
    assert sum("clip skipped" in line for line in caplog.messages) == 2
    features = FeatureClips(tmp_path / "features", sample=False)
    for place, entry in enumerate(features.entries):  # what is left belongs to its own clip
        clip = source.read(int(entry.key[:8]), 0)
        wanted = codec.encode(to_float(clip["video"])[None])[0]
        torch.testing.assert_close(features.read(place, 0)["latent"], wanted, rtol=2e-3, atol=2e-3)

    spoil(entries)
    source = ShardClips(folder, 9, 32, 32, random_start=False)
    with pytest.raises(DataError, match="10 clips in a row cannot be used"):
        write(tmp_path / "nothing", source, FeatureEncoder(codec), shard_clips=20)
    assert not list((tmp_path / "nothing").glob("*.tar"))
    with pytest.raises(UsageError, match="without clips"):
        measure_source_scaling(source, codec.vae, 5)


def spoil(entries: Sequence[Any]) -> None:
    for entry in entries:
        with open(entry.tar, "r+b") as file:
            file.seek(entry.offset)
            file.write(b"\0" * entry.size)


def test_the_measured_scaling_gives_mean_0_and_variance_1(tmp_path: Path, source: ShardClips) -> None:
    vae = tiny_vae()
    scaling = measure_source_scaling(source, vae, 64, batch_size=3)
    write(tmp_path, source, FeatureEncoder(LatentCodec(vae, *scaling)))
    features = FeatureClips(tmp_path)
    values = torch.cat([features.read(i, draw)["latent"].flatten(1) for i in range(CLIPS) for draw in range(20)], dim=1)
    assert values.mean(dim=1).tolist() == pytest.approx([0.0] * 4, abs=0.05)
    assert values.var(dim=1).tolist() == pytest.approx([1.0] * 4, abs=0.05)
    assert read_scaling(tmp_path, vae) == tuple(map(tuple, scaling))
    with pytest.raises(UsageError, match="made with another VAE"):
        read_scaling(tmp_path, tiny_vae(seed=1))
    with pytest.raises(DataError, match="no folder of features"):
        read_scaling(tmp_path / "none", vae)
    # Few clips are spread over the source.
    few = measure_source_scaling(source, vae, 2)
    chosen = [vae.encode(to_float(source.read(index, 0)["video"])[None]).mean for index in (0, 5)]
    assert few[0] == pytest.approx(torch.cat(chosen).mean(dim=(0, 2, 3, 4)).tolist(), abs=1e-5)


def test_values_that_are_not_known(codec: LatentCodec) -> None:
    for wrong, told in (
        ({"precision": "8-true"}, "precision=8-true"),
        ({"posterior": "mode"}, "posterior=mode"),
        ({"dtype": "float8"}, "dtype=float8"),
    ):
        with pytest.raises(UsageError, match=told):
            FeatureEncoder(codec, **wrong)


def test_too_little_memory_is_told_with_what_to_change(tmp_path: Path, source: ShardClips, codec: LatentCodec) -> None:
    class Small(FeatureEncoder):
        def __call__(self, clips: Sequence[Mapping[str, Any]]) -> list[Features]:
            if len(clips) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(clips)

    with pytest.raises(UsageError, match="batch_size=3: the memory of cpu is too small"):
        write(tmp_path, source, Small(codec), batch_size=3)
    assert write(tmp_path, source, Small(codec), batch_size=2) == CLIPS
