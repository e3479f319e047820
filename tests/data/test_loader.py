"""Sources, plan and loaders: every clip once, the same for any workers and ranks, exact resume, broken clips."""

import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from osp.data import handover
from osp.data.loader import Batch, FixedLoader, ResumableLoader
from osp.data.media.video import ClipError, encode_video, read_clip
from osp.data.sources import ClipSource, FirstClips, ShardClips
from osp.devices.mesh import Mesh
from osp.errors import DataError, UsageError


class NumberClips(ClipSource):
    """Clip i is a 3x1x2x2 video of the value i; the caption tells the draw and the threads of the reading process."""

    def __init__(self, clips: int, broken: tuple[int, ...] = (), version: str = "a") -> None:
        self.clips, self.broken, self.version = clips, frozenset(broken), version

    def __len__(self) -> int:
        return self.clips

    def fingerprint(self) -> str:
        return f"numbers clips={self.clips} version={self.version}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        if index in self.broken:
            raise ClipError(f"clip{index}", "scratched")
        video = torch.full((3, 1, 2, 2), index, dtype=torch.uint8)
        caption = f"draw {draw}, {torch.get_num_threads()} threads"
        return {"video": video, "caption": caption, "key": f"clip{index}", "fps": 8.0}


def loader(clips: int = 10, broken: tuple[int, ...] = (), **settings: Any) -> ResumableLoader:
    return ResumableLoader(NumberClips(clips, broken), **({"batch_size": 4, "seed": 0} | settings))


def endless(loader: ResumableLoader) -> Any:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def take(loader: ResumableLoader, steps: int) -> list[Any]:
    return list(itertools.islice(endless(loader), steps))


def keys(batches: list[Batch]) -> list[list[str]]:
    return [batch["key"] for batch in batches]


def content(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """All that a batch tells but the thread count."""
    return [
        (b["video"].tolist(), [c.split(",")[0] for c in b["caption"]], b["key"], b["broken"], b["sample"].tolist())
        for b in batches
    ]


def test_a_batch_holds_what_it_says() -> None:
    (batch,) = take(loader(), 1)
    assert batch["video"].shape == (4, 3, 1, 2, 2)
    assert batch["video"].dtype == torch.uint8
    assert [f"clip{i}" for i in batch["video"][:, 0, 0, 0, 0].tolist()] == batch["key"]
    assert batch["fps"].tolist() == [8.0] * 4
    assert batch["sample"].tolist() == [0, 1, 2, 3]
    assert batch["weight"].tolist() == [1.0] * 4
    assert batch["broken"] == 0


def test_every_pass_reads_every_clip_once_in_a_new_order() -> None:
    samples = [key for batch in take(loader(clips=10, batch_size=4), 15) for key in batch["key"]]
    passes = [samples[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(p) == sorted(f"clip{i}" for i in range(10)) for p in passes)
    assert len({tuple(p) for p in passes}) == 6
    assert keys(take(loader(seed=1), 3)) != keys(take(loader(seed=0), 3))


def test_draws_differ_between_passes_and_are_the_same_within_a_seed() -> None:
    source_draws = [b["caption"] for b in take(loader(clips=4), 3)]
    assert len({caption for captions in source_draws for caption in captions}) == 3  # one draw a pass
    assert source_draws == [b["caption"] for b in take(loader(clips=4), 3)]


def test_without_shuffle_the_order_is_the_sources() -> None:
    assert keys(take(loader(clips=3, shuffle=False), 2)) == [
        ["clip0", "clip1", "clip2", "clip0"],
        ["clip1", "clip2", "clip0", "clip1"],
    ]


def test_a_source_smaller_than_a_batch_goes_round() -> None:
    small = loader(clips=3, batch_size=8)
    assert len(small) == 1
    samples = [key for batch in take(small, 3) for key in batch["key"]]
    assert all(sorted(samples[i : i + 3]) == ["clip0", "clip1", "clip2"] for i in range(0, 24, 3))


def test_length_is_a_nominal_epoch_and_each_iteration_goes_on() -> None:
    first = loader(clips=17, batch_size=4)
    assert len(first) == 4
    assert len(loader(clips=17, batch_size=4, mesh=Mesh(2))) == 2
    assert len(loader(clips=17, batch_size=4, batches_per_step=lambda step: 2)) == 2
    epochs = [list(first) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [4, 4, 4]
    assert content(list(itertools.chain(*epochs))) == content(take(loader(clips=17, batch_size=4), 12))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    many = take(loader(clips=10, broken=(3,), workers=workers), 9)
    assert content(many) == content(take(loader(clips=10, broken=(3,)), 9))
    assert all(caption.endswith(" 1 threads") for batch in many for caption in batch["caption"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(world_size: int) -> None:
    whole = take(loader(clips=10, broken=(7,), batch_size=8), 5)
    ranks = [
        take(loader(clips=10, broken=(7,), batch_size=8 // world_size, mesh=Mesh(world_size, rank=rank)), 5)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = content([rank[step] for rank in ranks])
        videos, captions, names, broken, samples = content([batch])[0]
        assert [video for part in parts for video in part[0]] == videos
        assert [caption for part in parts for caption in part[1]] == captions
        assert [name for part in parts for name in part[2]] == names
        assert sum(part[3] for part in parts) == broken
        assert [sample for part in parts for sample in part[4]] == samples


@pytest.mark.parametrize("done", [0, 1, 4, 5, 11])
def test_resume_anywhere_equals_the_uninterrupted_run(done: int) -> None:
    whole = content(take(loader(broken=(2, 6)), 20))
    first = loader(broken=(2, 6))
    assert content(take(first, done)) == whole[:done]
    state = first.state_dict()
    assert (state["steps"], state["batches"]) == (done, done)
    for workers in (0, 2):
        second = loader(broken=(2, 6), workers=workers)
        second.load_state_dict(state)
        assert content(take(second, 20 - done)) == whole[done:]
        assert second.state_dict()["batches"] == 20


def test_resume_at_another_world_size_with_the_same_global_batch() -> None:
    whole = content(take(loader(batch_size=4), 6))
    first = loader(batch_size=4)
    take(first, 2)
    ranks = []
    for rank in range(2):
        second = loader(batch_size=2, mesh=Mesh(2, rank=rank))
        second.load_state_dict(first.state_dict())
        ranks.append(content(take(second, 4)))
        assert second.state_dict() == first.state_dict() | {"steps": 6, "batches": 6}
    assert [a[2] + b[2] for a, b in zip(*ranks, strict=True)] == [batch[2] for batch in whole[2:]]


def test_read_ahead_does_not_count_and_a_loaded_state_drops_it() -> None:
    ahead = loader(workers=2)
    batches = endless(ahead)
    first = [next(batches) for _ in range(3)]
    time.sleep(0.3)  # the workers have read on by now
    state = ahead.state_dict()
    assert state["batches"] == 3
    rest = [next(batches) for _ in range(3)]
    ahead.load_state_dict(state)
    assert content(take(ahead, 3)) == content(rest)
    assert content(first + rest) == content(take(loader(), 6))
    ahead.close()
    assert not multiprocessing.active_children()
    assert ahead.state_dict()["batches"] == 6
    assert content(take(ahead, 1)) == content(take(loader(), 7))[6:]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    take(loader(), 3)
    take(loader(workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_gets_as_many_batches_as_it_asks_for() -> None:
    def per_step(step: int) -> int:
        return 2 if step < 3 else 4

    plain = content(take(loader(), 14))
    steps = take(loader(batches_per_step=per_step), 5)
    assert [len(step) for step in steps] == [2, 2, 2, 4, 4]
    assert content([batch for step in steps for batch in step]) == plain
    first = loader(batches_per_step=per_step)
    take(first, 4)
    state = first.state_dict()
    assert (state["steps"], state["batches"]) == (4, 10)
    second = loader(batches_per_step=per_step, workers=1)
    second.load_state_dict(state)
    assert content(take(second, 1)[0]) == plain[10:]


def test_a_broken_clip_is_replaced_by_the_next_of_the_plan_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sound = [key for batch in take(loader(clips=10, batch_size=1), 41) for key in batch["key"]]
    with caplog.at_level(logging.WARNING, logger="osp"):
        got = take(loader(clips=10, batch_size=4, broken=(3, 5), workers=2), 10)
    names = [key for batch in got for key in batch["key"]]
    for place, key in enumerate(names):
        after = itertools.dropwhile(lambda k: k in ("clip3", "clip5"), sound[place:])
        assert key == next(after)
    assert sum(batch["broken"] for batch in got) >= 8  # two clips, four passes
    assert [batch["sample"].tolist() for batch in got] == [list(range(b * 4, b * 4 + 4)) for b in range(10)]
    lines = sorted(record.getMessage() for record in caplog.records)
    assert lines == [
        "broken clip, replaced by another: clip3: scratched",
        "broken clip, replaced by another: clip5: scratched",
    ]


@pytest.mark.parametrize("sound", [0, 5])
def test_one_readable_clip_is_enough(sound: int) -> None:
    broken = tuple(i for i in range(6) if i != sound)
    batches = take(loader(clips=6, broken=broken, batch_size=2), 12)
    assert {key for batch in batches for key in batch["key"]} == {f"clip{sound}"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_readable_clip_is_one_clear_error(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        take(loader(clips=5, broken=(0, 1, 2, 3, 4), workers=workers), 1)
    assert "5 clips in a row cannot be read (of 5)" in str(caught.value)
    assert "scratched" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_broken_clips_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osp.data.loader.GIVE_UP_AFTER", 7)
    with pytest.raises(DataError, match=r"7 clips in a row cannot be read \(of 50\)"):
        take(loader(clips=50, broken=tuple(range(40)), shuffle=False), 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seed": 5}, "seed was 0, is 5"),
        ({"batch_size": 8}, r"global batch \(batch_size x devices x accumulate\) was 4, is 8"),
        ({"mesh": Mesh(2)}, "was 4, is 8"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"clips": 11}, "clips was 10, is 11"),
    ],
)
def test_a_changed_plan_is_refused(settings: dict[str, Any], told: str) -> None:
    state = loader().state_dict()
    with pytest.raises(UsageError, match=told):
        loader(**settings).load_state_dict(state)


def keys_of_steps(loader: ResumableLoader, steps: int) -> list[list[str]]:
    """The clips of each of the next steps, in their order."""
    return [[key for batch in step for key in batch["key"]] for step in take(loader, steps)]


@pytest.mark.parametrize(("size", "accumulate", "allowed"), [(2, 2, True), (1, 4, True), (2, 1, False), (4, 2, False)])
def test_another_split_of_the_same_global_batch_goes_on_with_the_same_clips(
    size: int, accumulate: int, allowed: bool
) -> None:
    def new(size: int, accumulate: int) -> ResumableLoader:
        twice = lambda step: accumulate * (2 if step >= 2 else 1)  # noqa: E731 (as a discriminator that starts)
        return loader(batch_size=size, batches_per_step=twice)

    whole = keys_of_steps(new(4, 1), 6)
    first = new(4, 1)
    assert keys_of_steps(first, 3) == whole[:3]
    second = new(size, accumulate)
    if not allowed:
        with pytest.raises(UsageError, match=r"global batch .* was"):
            second.load_state_dict(first.state_dict())
        return
    second.load_state_dict(first.state_dict())
    assert keys_of_steps(second, 3) == whole[3:]


@pytest.mark.parametrize("change", [{"steps": -1}, {"steps": 10**15}, {"batches": "1"}, {"seed": [1]}])
def test_a_state_that_is_none_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the loader's state to go on from: "):
        loader().load_state_dict(loader().state_dict() | change)


def test_a_changed_source_and_a_foreign_state_are_refused() -> None:
    other = ResumableLoader(NumberClips(10, version="b"), batch_size=4, seed=0)
    with pytest.raises(UsageError, match="decoding was numbers clips=10 version=a, is numbers clips=10 version=b"):
        other.load_state_dict(loader().state_dict())
    with pytest.raises(UsageError, match="lacks batches, clips"):
        other.load_state_dict({"steps": 3})


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"workers": -1}, {"prefetch": 0}])
def test_senseless_settings_are_refused(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(UsageError, match=f"^{name}={value}\\b"):
        loader(**settings)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="numbers clips=0"):
        loader(clips=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_fixed_pass_counts_each_clip_once_over_equal_ranks(world_size: int) -> None:
    source = NumberClips(12)
    ranks = [
        FixedLoader(FirstClips(source, 10), batch_size=2, mesh=Mesh(world_size, rank=rank))
        for rank in range(world_size)
    ]
    passes = [list(rank) for rank in ranks]
    assert {len(batches) for batches in passes} == {len(ranks[0])}
    assert len({tuple(len(batch["key"]) for batch in batches) for batches in passes}) == 1
    counted: dict[str, float] = {}
    for batch in itertools.chain(*passes):
        for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True):
            counted[key] = counted.get(key, 0.0) + weight
    assert counted == {f"clip{i}": 1.0 for i in range(10)}
    assert content(list(ranks[0])) == content(passes[0])


def test_more_ranks_than_clips_in_the_fixed_pass() -> None:
    (batch,) = FixedLoader(NumberClips(2), batch_size=4, mesh=Mesh(3, rank=2))
    assert (batch["key"], batch["weight"].tolist()) == (["clip0"], [0.0])


def test_a_broken_clip_of_the_fixed_pass_has_no_weight() -> None:
    batches = list(FixedLoader(NumberClips(4, broken=(1,)), batch_size=4, workers=1))
    assert keys(batches) == [["clip0", "clip2", "clip2", "clip3"]]
    assert batches[0]["weight"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert batches[0]["broken"] == 1


SCRIPT = """
import multiprocessing, sys
sys.path.insert(0, {folder!r})
from test_loader import endless, loader
from osp.errors import DataError

batches = endless(loader(workers=2))
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
try:
    for batch in batches:
        pass
except DataError as error:
    print(error)
except RuntimeError as error:  # torch raises from a signal handler, so maybe outside the loader
    print(error)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_hangs_when_a_process_is_killed() -> None:
    command = [sys.executable, "-c", SCRIPT.format(folder=os.path.dirname(__file__))]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as without_worker,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed,
    ):
        runs = (without_worker, killed)
        workers = [[int(pid) for pid in run.stdout.readline().split()] for run in runs if run.stdout is not None]
        assert [len(pids) for pids in workers] == [2, 2]
        assert all(alive(pid) for pid in itertools.chain(*workers))
        os.kill(workers[0][0], signal.SIGKILL)
        killed.kill()
        said, _ = without_worker.communicate(timeout=100)
        assert "a process that reads clips has died" in said or "DataLoader worker" in said
        deadline = time.monotonic() + 100
        while any(alive(pid) for pid in itertools.chain(*workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in itertools.chain(*workers))


def counting_video(frames: int, fps: float = 8.0) -> bytes:
    """Frame k is of value 4 k on the left and 4 k + 2 on the right."""
    values = 4 * torch.arange(frames).view(1, -1, 1, 1) + torch.tensor([0] * 16 + [2] * 16)
    return encode_video(values.expand(3, frames, 32, 32).to(torch.uint8), fps, lossless=True)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 100, 50)).save(file, "PNG")
    return file.getvalue()


Member = tuple[str, bytes, dict[str, Any]]


def clip(key: str, frames: int, fps: float = 8.0) -> Member:
    record = {"frames": frames, "fps": fps, "width": 32, "height": 32, "duration": frames / fps, "kind": "video"}
    return f"{key}.mp4", counting_video(frames, fps), record | {"caption": f"about {key}"}


def shards(folder: Path, members: list[Member]) -> Path:
    """One shard with its listing, as data/README.md describes them."""
    folder.mkdir()
    lines = []
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for name, data, record in members:
            key = name.split(".")[0]
            for member, content in ((f"{key}.json", json.dumps(record).encode()), (name, data)):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                offset = tar.offset + 512
                tar.addfile(header, io.BytesIO(content))
            lines.append(record | {"key": key, "member": name, "offset": offset, "size": len(data)})
    tar_bytes = (folder / "shard-000000.tar").read_bytes()
    (folder / "shard-000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shard = {
        "file": "shard-000000.tar",
        "clips": len(members),
        "bytes": len(tar_bytes),
        "sha256": hashlib.sha256(tar_bytes).hexdigest(),
    }
    index = {"format": "osp-shards", "version": 1, "clips": len(members), "shards": [shard], "skipped": []}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def left(video: torch.Tensor) -> list[int]:
    return video[0, :, 0, 0].tolist()


def test_shards_are_read_as_settings_say(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", [clip("a", 24), clip("b", 12)])
    source = ShardClips(folder, 5, 32, 32, random_start=False)
    read = source.read(1, 7)
    assert (read["key"], read["caption"], read["fps"]) == ("b", "about b", 8.0)
    assert (read["video"].dtype, read["video"].shape) == (torch.uint8, (3, 5, 32, 32))
    assert left(read["video"]) == [0, 4, 8, 12, 16]
    strided = ShardClips(folder, 5, 16, 24, stride=2, random_start=False).read(0, 0)
    assert (strided["fps"], strided["video"].shape, left(strided["video"])) == (4.0, (3, 5, 16, 24), [0, 8, 16, 24, 32])
    slowed = ShardClips(folder, 3, 32, 32, fps=2.0, random_start=False).read(0, 0)
    assert (slowed["fps"], left(slowed["video"])) == (2.0, [0, 16, 32])


def test_draws_set_the_window_and_the_flip(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", [clip("a", 24), clip("b", 24)])
    plain, flipping = ShardClips(folder, 5, 32, 32), ShardClips(folder, 5, 32, 32, flip=True)
    starts, mirrored = set(), []
    for draw in range(24):
        video = plain.read(0, draw)["video"]
        assert torch.equal(video, ShardClips(folder, 5, 32, 32).read(0, draw)["video"])
        first = left(video)[0]
        assert left(video) == [first + 4 * k for k in range(5)]
        starts.add(first // 4)
        flipped = flipping.read(0, draw)["video"]
        assert torch.equal(flipped, video) or torch.equal(flipped, video.flip(-1))
        mirrored.append(torch.equal(flipped, video.flip(-1)))
    assert starts <= set(range(20))
    assert len(starts) > 8
    assert 5 <= sum(mirrored) <= 19
    assert any(left(plain.read(0, draw)["video"]) != left(plain.read(1, draw)["video"]) for draw in range(4))


def test_clips_too_short_are_left_out_with_one_line(tmp_path: Path) -> None:
    image = ("d.png", picture(), {"frames": 1, "fps": 0.0, "kind": "image", "caption": "a picture"})
    folder = shards(tmp_path / "shards", [clip("a", 24), clip("b", 9), clip("c", 8), image])

    def kept(**settings: Any) -> list[str]:
        return [entry.key for entry in ShardClips(folder, height=32, width=32, **settings).entries]

    assert kept(frames=9) == ["a", "b"]
    told = "2 clips, all with captions; left out: 2 clips that are too short for frames=9, or images"
    assert ShardClips(folder, 9, 32, 32).summary().line() == f"{folder}: {told}"
    assert kept(frames=5, stride=2) == ["a", "b"]
    assert kept(frames=8, fps=8.0) == ["a", "b", "c"]
    assert kept(frames=5, fps=4.0) == ["a", "b"]
    assert kept(frames=1) == ["a", "b", "c", "d"]
    # What is kept can be read, and the shortest that is left out cannot.
    for frames, fps in ((9, None), (8, 8.0), (5, 4.0), (4, 3.0), (12, 10.0), (14, 13.0)):
        some = ShardClips(folder, frames, 32, 32, fps=fps)
        assert all(some.read(i, 0)["video"].shape[1] == frames for i in range(len(some)))
        everything = ShardClips(folder, 1, 32, 32)
        for entry in {e.key: e for e in everything.entries if e not in some.entries}.values():
            with pytest.raises(ClipError, match="needed"):
                read_clip(entry.read(), frames=frames, fps=fps, name=entry.key)
    read = ShardClips(folder, 1, 16, 16).read(3, 0)
    assert (read["video"][:, 0, 8, 8].tolist(), read["fps"], read["caption"]) == ([200, 100, 50], 0.0, "a picture")


def test_shards_without_a_long_enough_clip_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", [clip("a", 24), clip("b", 9)])
    with pytest.raises(
        DataError, match=r"none of its 2 clips is long enough for frames=25.*longest: 24 frames at 8 fps"
    ):
        ShardClips(folder, 25, 32, 32)
    with pytest.raises(DataError, match="frames=9 at 2 fps"):
        ShardClips(folder, 9, 32, 32, fps=2.0)
    with pytest.raises(DataError, match="no such folder"):
        ShardClips(tmp_path / "nowhere", 5, 32, 32)
    with pytest.raises(UsageError, match="frames=0"):
        ShardClips(folder, 0, 32, 32)
    with pytest.raises(UsageError, match="not both"):
        ShardClips(folder, 5, 32, 32, stride=2, fps=4.0)


def test_the_fingerprint_tells_settings_and_clips_apart_but_not_places(tmp_path: Path) -> None:
    members = [clip("a", 24), clip("b", 12)]
    folder = shards(tmp_path / "shards", members)
    mark = ShardClips(folder, 5, 32, 32).fingerprint()
    assert "\n" not in mark
    assert ShardClips(shards(tmp_path / "copy", members), 5, 32, 32).fingerprint() == mark
    others = [
        ShardClips(folder, 6, 32, 32),
        ShardClips(folder, 5, 16, 32),
        ShardClips(folder, 5, 32, 32, stride=2),
        ShardClips(folder, 5, 32, 32, fps=8.0),
        ShardClips(folder, 5, 32, 32, random_start=False),
        ShardClips(folder, 5, 32, 32, flip=True),
        ShardClips(shards(tmp_path / "other", [clip("a", 24), clip("c", 12)]), 5, 32, 32),
        ShardClips(shards(tmp_path / "fewer", members[:1]), 5, 32, 32),
    ]
    assert len({mark, *(other.fingerprint() for other in others)}) == 9


def test_shards_in_a_loader_resume_exactly_around_broken_clips(tmp_path: Path) -> None:
    members = [clip(key, 12 + i) for i, key in enumerate("abcdefg")]
    members[3] = ("d.mp4", members[3][1][:200], members[3][2])
    folder = shards(tmp_path / "shards", members)

    def batches(workers: int) -> ResumableLoader:
        return ResumableLoader(ShardClips(folder, 5, 32, 32, flip=True), batch_size=2, seed=3, workers=workers)

    whole = take(batches(0), 10)
    assert sum(batch["broken"] for batch in whole) >= 2
    assert {key for batch in whole for key in batch["key"]} == set("abcefg")
    first = batches(2)
    take(first, 4)
    second = batches(1)
    second.load_state_dict(first.state_dict())
    for got, wanted in zip(take(second, 6), whole[4:], strict=True):
        assert (got["key"], got["caption"], got["broken"]) == (wanted["key"], wanted["caption"], wanted["broken"])
        assert torch.equal(got["video"], wanted["video"])


def test_a_shard_cut_short_costs_its_clips_not_the_run(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", [clip("a", 12), clip("b", 12)])
    source = ShardClips(folder, 5, 32, 32)
    tar = folder / "shard-000000.tar"
    os.truncate(tar, source.entries[1].offset + 10)
    with pytest.raises(ClipError, match=r"^b: .*shard-000000.tar: ends inside b.mp4"):
        source.read(1, 0)
    assert keys(take(ResumableLoader(source, batch_size=2, seed=0), 2)) == [["a", "a"]] * 2


def test_foreign_shards_of_real_clips(tmp_path: Path, shared: Path) -> None:
    good = sorted((shared / "clips" / "good").iterdir())
    hopeless = [shared / "clips" / "broken" / name for name in ("empty.mp4", "text.mp4")]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for path in (*good, *hopeless):
            tar.add(path, path.name)
            header = tarfile.TarInfo(f"{path.stem}.txt")
            caption = f"this is {path.stem}".encode()
            header.size = len(caption)
            tar.addfile(header, io.BytesIO(caption))
    source = ShardClips(tmp_path, 9, 64, 64)
    assert len(source) == len(good) + 2
    reader = FixedLoader(source, batch_size=4, workers=2)
    batches = list(reader)
    read = [
        (key, caption, fps)
        for batch in batches
        for key, caption, fps, weight in zip(
            batch["key"], batch["caption"], batch["fps"].tolist(), batch["weight"].tolist(), strict=True
        )
        if weight
    ]
    assert [key for key, _, _ in read] == [path.stem for path in good]
    assert all(caption == f"this is {key}" and 5 < fps < 100 for key, caption, fps in read)
    assert all(batch["video"].shape[1:] == (3, 9, 64, 64) for batch in batches)
    assert sum(batch["broken"] for batch in batches) >= 2


def test_batches_without_room_in_shared_memory_come_through_pipes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = take(loader(workers=1), 6)

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(handover, "_told", set())
    assert content(take(loader(workers=1), 6)) == content(whole)
    assert caplog.text.count("/dev/shm) has no room for the batches") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int64])
def test_any_tensor_goes_through_a_pipe(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: (_ for _ in ()).throw(RuntimeError("full")))
    batch = {
        "a": torch.tensor([[1, 0], [0, 1]]).to(dtype).t(),
        "b": [torch.zeros(0, 3).to(dtype), torch.tensor(1)],
        "c": "x",
    }
    sent = handover.sendable(batch)
    assert not any(isinstance(value, torch.Tensor) for value in sent.values())
    back = handover.received(sent)
    assert back["c"] == "x"
    assert torch.equal(back["a"], batch["a"])
    assert back["b"][0].shape == (0, 3)
    assert back["b"][1] == 1


def test_signals_for_a_group_of_processes_leave_the_readers_alone() -> None:
    reading = loader(workers=1)
    batches = iter(endless(reading))
    next(batches)
    (reader,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(reader.pid or 0, number)
    for _ in range(4):  # more than were read ahead
        next(batches)
    assert reader.is_alive()
