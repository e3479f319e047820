"""Folders of features: what is written is read back, by any number of processes, killed or not."""

import itertools
import json
import multiprocessing
import os
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from osp.data.features.format import FeatureIdentity, Features, TextIdentity
from osp.data.features.writer import FeatureWriter, feature_report
from osp.data.loader import FixedLoader, ResumableLoader
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError
from osp.data.sources import FeatureClips, FirstClips
from osp.devices.mesh import Mesh
from osp.errors import DataError, UsageError
from osp.seeds import stable_seed

IDENTITY = FeatureIdentity(
    vae="toy",
    vae_fingerprint="abc",
    time_stride=4,
    space_stride=8,
    latent_channels=2,
    shift=(0.5, -1.0),
    scale=(2.0, 0.25),
    text=TextIdentity("t5", "def", 6),
    pooled_text=TextIdentity("clip", "ghi", 3),
    dtype="float32",
)
SIZES = [Shape(9, 32, 48), Shape(1, 32, 32), Shape(5, 16, 16), Shape(7, 16, 16)]
CLIPS = 23
BROKEN = (4, 11)
EMPTY = {"text": torch.full((1, 6), -1.0), "pooled_text": torch.full((3,), -2.0)}


def features(index: int, identity: FeatureIdentity = IDENTITY) -> Features:
    """Clip `index`: 0 to 2 captions, each text of its own length."""
    draw = torch.Generator().manual_seed(index)
    size = SIZES[index % len(SIZES)]
    latent, logvar = (torch.randn(identity.latent_shape(size), generator=draw) for _ in range(2))
    captions = [f"clip {index}, caption {number}" for number in range(index % 3)]
    return Features(
        f"videos/clip {index}.mp4",
        size,
        latent,
        logvar - 3 if identity.posterior == "gaussian" else None,
        captions,
        [torch.randn(1 + (index + number) % 5, 6, generator=draw) for number in range(len(captions))],
        [torch.randn(3, generator=draw) for _ in captions],
        fps=0.0 if size.frames == 1 else 8.0,
        record={"scores": {"aesthetic": 5.0}},
    )


def writer(folder: Path, identity: FeatureIdentity = IDENTITY, **wanted: Any) -> FeatureWriter:
    settings: dict[str, Any] = {"clips": CLIPS, "origin": "toys", "shard_clips": 5, "empty": EMPTY} | wanted
    return FeatureWriter(folder, identity, **settings)


def write(folder: Path, identity: FeatureIdentity = IDENTITY, pause: float = 0.0, **wanted: Any) -> FeatureWriter:
    """As `osp cache` does: shard by shard, in each the clips of one size together."""
    written = writer(folder, identity, **wanted)
    for number in written.todo():
        with written.shard(number) as shard:
            for index in sorted(shard.clips, key=lambda index: SIZES[index % len(SIZES)]):
                time.sleep(pause)
                if index in BROKEN:
                    shard.skip(index, f"clip {index}", "scratched")
                else:
                    shard.add(index, features(index, identity))
    return written


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "whole"
    write(folder)
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(undisturbed: Path) -> None:
    source = FeatureClips(undisturbed, sample=False)
    assert source.made_with == IDENTITY
    assert len(source) == CLIPS - len(BROKEN)
    assert {name: tensor.tolist() for name, tensor in source.empty.items()} == {
        name: tensor.tolist() for name, tensor in EMPTY.items()
    }
    seen = set()
    for place, entry in enumerate(source.entries):
        index = int(entry.key[:8])
        wanted, clip = features(index), source.read(place, 0)
        seen.add(index)
        shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (IDENTITY.shift, IDENTITY.scale))
        assert torch.equal(clip["latent"], (wanted.latent - shift) * scale)
        assert (clip["fps"], clip["size"]) == (wanted.fps, tuple(wanted.size))
        assert entry.record["original"] == wanted.key
        assert entry.record["scores"] == {"aesthetic": 5.0}
        if wanted.captions:
            assert clip["caption"] == wanted.captions[0]
            assert torch.equal(clip["text"], wanted.text[0])
            assert torch.equal(clip["pooled_text"], wanted.pooled_text[0])
        else:
            assert clip["caption"] == ""
            assert torch.equal(clip["text"], EMPTY["text"])
            assert torch.equal(clip["pooled_text"], EMPTY["pooled_text"])
    assert seen == set(range(CLIPS)) - set(BROKEN)


def test_draws_sample_the_posterior_and_the_captions(undisturbed: Path) -> None:
    source = FeatureClips(undisturbed)
    place = next(i for i, entry in enumerate(source.entries) if len(entry.record["captions"]) == 2)
    index = int(source.entries[place].key[:8])
    clips = [source.read(place, draw) for draw in range(400)]
    assert {clip["caption"] for clip in clips} == set(features(index).captions)
    for clip in clips[:20]:
        number = features(index).captions.index(clip["caption"])
        assert torch.equal(clip["text"], features(index).text[number])
    wanted = features(index)
    shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (IDENTITY.shift, IDENTITY.scale))
    latents = torch.stack([clip["latent"] for clip in clips]) / scale + shift
    assert wanted.logvar is not None
    deviation = torch.exp(0.5 * wanted.logvar)
    assert ((latents.mean(0) - wanted.latent).abs() / deviation).max() < 0.25
    assert (latents.std(0) / deviation - 1).abs().max() < 0.25
    assert torch.equal(clips[3]["latent"], FeatureClips(undisturbed).read(place, 3)["latent"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_samples_without_text_in_half_precision(tmp_path: Path, dtype: str) -> None:
    identity = replace(IDENTITY, posterior="sample", text=None, pooled_text=None, dtype=dtype)
    out = FeatureWriter(tmp_path, identity, clips=1, origin="")
    with out.shard(0) as shard:
        shard.add(0, replace(features(1, identity), captions=["said"], text=(), pooled_text=()))
    source = FeatureClips(tmp_path)
    clip = source.read(0, 7)
    assert (clip["caption"], clip["latent"].dtype, clip.keys() & {"text", "pooled_text"}) == (
        "said",
        torch.float32,
        set(),
    )
    shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (IDENTITY.shift, IDENTITY.scale))
    assert torch.allclose(clip["latent"] / scale + shift, features(1).latent, atol=0.02)
    (batch,) = FixedLoader(source, batch_size=2)
    assert batch.keys() == {"latent", "caption", "key", "fps", "size", "broken", "sample", "weight"}


def test_the_shards_are_webdataset(undisturbed: Path) -> None:
    urls = [str(path) for path in sorted(undisturbed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == CLIPS - len(BROKEN)
    assert all({"json", "safetensors"} <= sample.keys() for sample in samples)
    assert json.loads(samples[0]["json"])["dtype"] == "float32"


def test_batches_pad_text_and_say_where(undisturbed: Path) -> None:
    source = FeatureClips(undisturbed, patch_size=1, sample=False)
    # 7 frames fill as many latent frames as 9 do: the bucket says what the latent holds.
    assert {tuple(bucket.shape): bucket.tokens for bucket in source.buckets()} == {
        (9, 32, 48): 72,
        (1, 32, 32): 16,
        (5, 16, 16): 8,
        (9, 16, 16): 12,
    }
    batches = list(FixedLoader(source, batch_tokens=150, workers=2))
    for batch in batches:
        assert batch["text_mask"].dtype == torch.bool
        for row, key in enumerate(batch["key"]):
            wanted = features(int(key[:8]))
            text = wanted.text[0] if wanted.captions else EMPTY["text"]
            length = len(text)
            assert batch["text_mask"][row].tolist() == [i < length for i in range(batch["text"].shape[1])]
            assert torch.equal(batch["text"][row, :length], text)
            assert not batch["text"][row, length:].any()
            assert batch["size"][row].tolist() == list(wanted.size)
        assert batch["text"].shape[1] == max(int(mask.sum()) for mask in batch["text_mask"])
        assert batch["latent"].shape[0] * batch["latent"][0, 0].numel() <= 150
    assert sum(int(batch["weight"].sum()) for batch in batches) == len(source)


def test_without_any_text_a_batch_still_has_room_for_some(tmp_path: Path) -> None:
    out = FeatureWriter(tmp_path, IDENTITY, clips=1, origin="")
    with out.shard(0) as shard:
        shard.add(0, features(0))
    (batch,) = FixedLoader(FeatureClips(tmp_path), batch_size=1)
    assert (tuple(batch["text"].shape), batch["text_mask"].tolist()) == ((1, 1, 6), [[False]])
    assert batch["pooled_text"].tolist() == [[0.0, 0.0, 0.0]]


def test_training_resumes_whatever_reads(undisturbed: Path) -> None:
    def batches(**wanted: Any) -> ResumableLoader:
        source = FirstClips(FeatureClips(undisturbed), 20)
        return ResumableLoader(source, **({"batch_tokens": 40, "seed": 1, "image_ratio": 0.25, "devices": 2} | wanted))

    def take(loader: ResumableLoader, steps: int) -> list[Any]:
        return list(itertools.islice(itertools.chain.from_iterable(loader for _ in itertools.count()), steps))

    whole = take(batches(), 16)
    assert sum(batch["latent"].shape[2] == 1 for batch in whole) == 4
    first = batches(workers=1)
    take(first, 5)
    ranks = []
    for rank in range(2):
        second = batches(workers=rank, mesh=Mesh(2, rank=rank))
        second.load_state_dict(first.state_dict())
        ranks.append(take(second, 11))
    for wanted, *parts in zip(whole[5:], *ranks, strict=True):
        assert torch.equal(torch.cat([part["latent"] for part in parts]), wanted["latent"])
        assert [key for part in parts for key in part["key"]] == wanted["key"]


def test_broken_members_cost_their_clips(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in content(undisturbed).items():
        (folder / name).write_bytes(data)
    source = FeatureClips(folder)
    for place in (0, 7):
        entry = source.entries[place]
        with open(entry.tar, "r+b") as file:
            file.seek(entry.offset + entry.size - 5)
            file.write(b"\xff\xff")
        with pytest.raises(ClipError, match="are damaged"):
            source.read(place, 0)
    lost = {source.entries[place].key for place in (0, 7)}
    batches = list(FixedLoader(source, batch_tokens=40))
    kept = {key for batch in batches for key, weight in zip(batch["key"], batch["weight"], strict=True) if weight}
    assert kept == {entry.key for entry in source.entries} - lost
    os.truncate(source.entries[0].tar, source.entries[1].offset)
    with pytest.raises(ClipError, match="ends inside"):
        source.read(1, 0)


def test_limits(undisturbed: Path, tmp_path: Path) -> None:
    small = FeatureClips(undisturbed, patch_size=1, max_tokens=20)
    assert {bucket.tokens for bucket in small.buckets()} == {8, 12, 16}
    assert sum(small.dropped.values()) == len(FeatureClips(undisturbed)) - len(small)
    assert len(FeatureClips(undisturbed, patch_size=1, min_tokens=16, max_tokens=20).buckets()) == 1
    with pytest.raises(DataError, match=r"none of its 21 clips has 1000 to"):
        FeatureClips(undisturbed, min_tokens=1000)
    write(tmp_path / "other", replace(IDENTITY, vae="another"))
    assert FeatureClips(tmp_path / "other").fingerprint() != FeatureClips(undisturbed).fingerprint()


def test_folders_that_cannot_be_read_say_why(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of features"):
        FeatureClips(tmp_path / "nowhere")
    out = writer(tmp_path / "begun")
    with pytest.raises(DataError, match="only 0 of 5 shards"):
        FeatureClips(tmp_path / "begun")
    with out.shard(2) as shard:
        for index in shard.clips:
            shard.skip(index, "", "") if index in BROKEN else shard.add(index, features(index))
    assert len(FeatureClips(tmp_path / "begun", partial=True)) == 4
    (tmp_path / "begun" / "shard-000002.jsonl").write_text("{")
    with pytest.raises(DataError, match="shards"):
        FeatureClips(tmp_path / "begun")
    for text, told in (("no", "not a readable index"), ('{"format": "osp-shards"}', "not an index of features")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match=told):
            FeatureClips(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_there_is(undisturbed: Path) -> None:
    report = feature_report(undisturbed)
    assert (report["complete"], report["shards"], report["clips"]) == (True, 5, 21)
    assert [skip["clip"] for skip in report["skipped"]] == list(BROKEN)
    assert report["skipped"][0]["reason"] == "scratched"
    assert writer(undisturbed).todo() == []


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_cut_off_before_any_step_the_end_is_the_same(
    undisturbed: Path, name: str, cut_off: Callable[..., Iterator[Path]]
) -> None:
    """Every rename and every flush is once the last thing that does not happen any more."""
    folders = list(cut_off(name, write))
    assert len(folders) > 10 + 1
    for folder in folders:
        assert content(folder) == content(undisturbed)


def test_killed_at_any_moment_the_end_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    draw = random.Random(0)
    folder = tmp_path / "features"
    kills = 0
    for attempt in range(12):
        parts = 1 + attempt % 2  # now and then two processes at once
        processes = [
            context.Process(target=write, args=(folder, IDENTITY, 0.01), kwargs={"part": part, "parts": parts})
            for part in range(parts)
        ]
        for process in processes:
            process.start()
        time.sleep(draw.uniform(0.0, 0.08))
        for process in processes:
            process.kill()
            process.join()
            kills += process.exitcode == -9
    assert kills >= 3
    write(folder)
    assert content(folder) == content(undisturbed)


def test_several_processes_write_the_same_folder(undisturbed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder = tmp_path / "features"
    processes = [
        context.Process(target=write, args=(folder,), kwargs={"part": part, "parts": 3, "pause": 0.01})
        for part in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert content(folder) == content(undisturbed)


def test_one_shard_is_written_by_one_process_only(tmp_path: Path) -> None:
    first = writer(tmp_path)
    with (
        pytest.raises(UsageError, match="another process is writing this shard"),
        first.shard(0),
        writer(tmp_path).shard(0),
    ):
        pass
    with first.shard(1) as shard:
        for index in shard.clips:
            shard.skip(index, "", "")
    assert 1 not in first.todo()
    with pytest.raises(UsageError, match="another process has written"), writer(tmp_path).shard(1):
        pass
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vae_fingerprint": "xyz"}, "vae_fingerprint was abc, is xyz"),
        ({"text": TextIdentity("t5", "new", 6)}, "text.fingerprint was def, is new"),
        ({"pooled_text": None}, "pooled_text.name was clip, is None"),
        ({"dtype": "float16"}, "dtype was float32, is float16"),
        ({"posterior": "sample"}, "posterior was gaussian, is sample"),
        ({"scale": (2.0, 0.5)}, r"scale was \[2.0, 0.25\], is \[2.0, 0.5\]"),
    ],
)
def test_other_encoders_are_refused_by_name(undisturbed: Path, change: dict[str, Any], told: str) -> None:
    before = content(undisturbed)
    identity = replace(IDENTITY, **change)
    empty = {name: tensor for name, tensor in EMPTY.items() if getattr(identity, name) is not None}
    with pytest.raises(UsageError, match=told):
        writer(undisturbed, identity, empty=empty)
    assert content(undisturbed) == before


def test_another_source_or_other_settings_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    for wanted, told in (
        ({"origin": "others"}, "the source was toys, is others"),
        ({"clips": 24}, "clips of the source was 23, is 24"),
        ({"shard_clips": 6}, "shard_clips was 5, is 6"),
        ({"empty": None}, "the empty text was empty.safetensors, is None"),
        ({"part": 2, "parts": 2}, "part=2: must be a whole number of at least 0 and below 2"),
    ):
        with pytest.raises(UsageError, match=told):
            writer(undisturbed, **wanted)
    (tmp_path / "foreign.tar").touch()
    with pytest.raises(UsageError, match=r"holds other tars \(foreign.tar\)"):
        writer(tmp_path)


def test_features_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    good = features(2)
    assert good.logvar is not None
    bad: list[tuple[Features, type[Exception], str]] = [
        (replace(good, latent=good.latent * float("nan")), ClipError, "not finite"),
        (replace(good, latent=good.latent[:, :1]), ValueError, "should be"),
        (replace(good, logvar=None), ValueError, "gaussian"),
        (replace(good, text=good.text[:1]), ValueError, "1 text, 2 captions"),
        (replace(good, pooled_text=good.text), ValueError, "does not suit"),
    ]
    out = writer(tmp_path)
    for item, kind, told in bad:
        with pytest.raises(kind, match=told), out.shard(0) as shard:
            shard.add(2, item)
    with pytest.raises(ValueError, match="nothing was said about clips"), out.shard(0) as shard:
        shard.add(2, good)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "empty.safetensors", "index.json"]
    with out.shard(0) as shard:
        for index in shard.clips:
            shard.skip(index, "", "")
        with pytest.raises(ValueError, match="comes twice"):
            shard.add(2, good)
    with pytest.raises(UsageError, match="dtype=float8: is not known; choose"):
        replace(IDENTITY, dtype="float8")
    with pytest.raises(UsageError, match="needs 2 numbers"):
        replace(IDENTITY, shift=(1.0,))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.text(max_size=50))
def test_any_key_and_caption_can_be_stored(tmp_path_factory: pytest.TempPathFactory, key: str, caption: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    identity = replace(IDENTITY, text=None, pooled_text=None)
    with FeatureWriter(folder, identity, clips=1, origin=key).shard(0) as shard:
        shard.add(0, replace(features(0), key=key, captions=[caption]))
    source = FeatureClips(folder)
    assert (source.entries[0].record["original"], source.read(0, stable_seed(key))["caption"]) == (key, caption)
    with tarfile.open(source.entries[0].tar) as tar:
        assert len(tar.getnames()) == 2
