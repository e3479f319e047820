"""Shards that lie elsewhere: over a server that fails, the same clips as without faults; and what is refused."""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from osp.data.buckets import ShapeList
from osp.data.features.format import FeatureIdentity, Features, TextIdentity
from osp.data.features.writer import FeatureWriter
from osp.data.loader import FixedLoader, ResumableLoader
from osp.data.media.shape import Shape
from osp.data.shards.build import write_rendered
from osp.data.sources import BucketClips, ClipSource, FeatureClips, ShardClips
from osp.data.streaming import RemoteShards, ShardFetchError
from osp.data.streaming.cache import ShardCache
from osp.data.streaming.fetching import Patience, Remote
from osp.devices.mesh import Mesh
from osp.errors import DataError, UsageError

CLIPS, SHARD = 24, 3
SIZES = [(5, 16, 16), (5, 16, 32), (1, 16, 16)]
Serve = Callable[..., Any]


IDENTITY = FeatureIdentity(
    "toy", "abc", 4, 8, 2, (0.5, -1.0), (2.0, 0.25), TextIdentity("t5", "def", 6), dtype="float32"
)


def write_features(folder: Path) -> None:
    """13 clips of two sizes in shards of 3, one of which could not be read."""
    writer = FeatureWriter(folder, IDENTITY, clips=13, origin="toys", shard_clips=3, empty={"text": torch.ones(1, 6)})
    for number in writer.todo():
        with writer.shard(number) as shard:
            for index in shard.clips:
                draw = torch.Generator().manual_seed(index)
                size = Shape(5, 16, 16) if index % 2 else Shape(9, 16, 32)
                latent, logvar = (torch.randn(IDENTITY.latent_shape(size), generator=draw) for _ in range(2))
                texts = [torch.randn(2 + n, 6, generator=draw) for n in range(index % 3)]
                captions = [f"{index}.{n}" for n in range(index % 3)]
                if index == 7:
                    shard.skip(index, "7", "scratched")
                else:
                    shard.add(index, Features(f"clip {index}", size, latent, logvar, captions, texts, fps=8.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos`: 24 clips of three sizes in 8 shards; `features`: encoded ones."""
    folder = tmp_path_factory.mktemp("served")
    draw = torch.Generator().manual_seed(0)
    clips = []
    for number in range(CLIPS):
        frames, height, width = SIZES[number % 3]
        video = torch.randint(256, (3, frames, height, width), generator=draw, dtype=torch.uint8)
        clips.append((f"{number:03d}", video, {"fps": 8.0, "caption": str(number)}))
    write_rendered(clips, folder / "videos", shard_clips=SHARD, lossless=True)
    write_features(folder / "features")
    return folder


def remote(urls: Any, cache: Path, **settings: Any) -> RemoteShards:
    wanted: dict[str, Any] = {"pause": 0.01, "timeout": 5.0, "slots": 2, "lanes": 2, "buffer": 4} | settings
    return RemoteShards(urls, cache, **wanted)


def videos(shards: Any) -> ShardClips:
    return ShardClips(shards, 1, 16, 16, flip=True)


def buckets(shards: Any) -> BucketClips:
    return BucketClips(shards, ShapeList(4, 8, 1, shapes=tuple(Shape(*size) for size in SIZES)), flip=True)


SOURCES: dict[str, tuple[str, Callable[[Any], ClipSource]]] = {
    "videos": ("videos", videos),
    "buckets": ("videos", buckets),
    "features": ("features", FeatureClips),
}


def loader(source: ClipSource, **settings: Any) -> ResumableLoader:
    return ResumableLoader(source, **({"batch_size": 4, "seed": 3} | settings))


def take(loader: ResumableLoader, steps: int) -> list[Any]:
    batches = list(itertools.islice(itertools.chain.from_iterable(loader for _ in itertools.count()), steps))
    loader.close()
    return batches


def content(batches: list[Any]) -> list[list[tuple[int, str, str]]]:
    """Sample, key and digest of the pixels or latents of each clip of each batch."""
    return [
        [
            (int(sample), key, hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
            for sample, key, tensor in zip(
                batch["sample"], batch["key"], batch["video" if "video" in batch else "latent"], strict=True
            )
        ]
        for batch in batches
    ]


# --- the same as without faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_a_server_that_fails_changes_neither_samples_nor_pixels(
    folders: Path, tmp_path: Path, serve: Serve, kind: str
) -> None:
    name, source = SOURCES[kind]
    sound, flaky = serve(folders, 0), serve(folders, 3)
    whole = content(take(loader(source(remote(f"{sound.url}/{name}", tmp_path / "sound"))), 9))
    assert not sound.failed
    seen = content(take(loader(source(remote(f"{flaky.url}/{name}", tmp_path / "flaky", attempts=10))), 9))
    assert seen == whole
    assert len({*flaky.failed}) >= 4
    # What is read is what lies there: the local reader gives the same for each clip and draw.
    local, streamed = source(folders / name), source(remote(f"{sound.url}/{name}", tmp_path / "sound"))
    for index in range(len(local)):
        one, other = local.collate([local.read(index, 5)]), streamed.collate([streamed.read(index, 5)])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one)


@pytest.mark.parametrize("kind", SOURCES)
def test_stopped_and_resumed_at_another_world_size_and_workers(
    folders: Path, tmp_path: Path, serve: Serve, kind: str
) -> None:
    name, make = SOURCES[kind]
    server = serve(folders, 10)
    source = make(remote(f"{server.url}/{name}", tmp_path / "cache"))
    whole = content(take(loader(source, batch_size=12), 9))
    first = loader(source, batch_size=12, workers=2)
    done = content(take(first, 5))
    state = json.loads(json.dumps(first.state_dict()))
    assert state["batches"] == 5
    for world, workers in ((3, 0), (2, 1)):
        ranks = []
        for rank in range(world):
            # Each rank is a machine of its own, with an empty cache.
            there = make(remote(f"{server.url}/{name}", tmp_path / f"{world}.{rank}"))
            gone_on = loader(there, batch_size=12 // world, workers=workers, mesh=Mesh(world, rank=rank))
            gone_on.load_state_dict(state)
            ranks.append(content(take(gone_on, 4)))
        assert done + [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == whole
    assert server.failed
    assert not multiprocessing.active_children()


def test_each_pass_reads_every_clip_and_each_shard_comes_once(folders: Path, tmp_path: Path, serve: Serve) -> None:
    server = serve(folders, 0)
    source = videos(remote(f"{server.url}/videos", tmp_path))
    keys = [key for batch in take(loader(source, batch_size=6, workers=2), 8) for key in batch["key"]]
    assert sorted(keys) == sorted(f"{clip:03d}" for clip in range(CLIPS) for _ in range(2))
    assert sorted(path for path in server.asked if path.endswith(".tar")) == [
        f"/videos/shard-{number:06d}.tar" for number in range(CLIPS // SHARD)
    ]


def test_commands_paths_fsspec_and_lists_give_the_same_as_the_folder(
    folders: Path, tmp_path: Path, serve: Serve
) -> None:
    tars = folders / "videos"
    memory = fsspec.filesystem("memory")
    for tar in tars.iterdir():
        memory.pipe_file(f"/bucket/{tar.name}", tar.read_bytes())
    (tmp_path / "shards.txt").write_text("".join(f"{tars}/shard-{n:06d}.tar\n" for n in range(8)) + "# no more\n")
    served = tmp_path / "served"
    shutil.copytree(tars, served)
    (served / "shards.list").write_text("".join(f"shard-{n:06d}.tar\n" for n in range(8)))
    server = serve(served, 5, sized=False)
    whole = content(take(loader(videos(remote(str(tars), tmp_path / "whole"))), 4))
    for number, urls in enumerate(
        (
            f"{tars}/shard-{{000000..000007}}.tar",
            [f"file://{tars}/shard-{{000000..000003}}.tar", f"{tars}/shard-{{000004..000007}}.tar"],
            f"pipe:cat {tars}/shard-{{000000..000007}}.tar",
            f"pipe:cat {tars}/{{name}}",
            "memory://bucket/shard-{000000..000007}.tar",
            "memory://bucket",
            str(tmp_path / "shards.txt"),
            f"{server.url}/shards.list",
            f"{server.url}/shard-{{000000..000007}}.tar?signature=secret",
        )
    ):
        for _ in range(2):  # the second time what was counted is read
            source = videos(remote(urls, tmp_path / str(number)))
            assert content(take(loader(source), 4)) == whole, urls


def test_features_come_through_commands_and_validation_reads_a_stream_once(folders: Path, tmp_path: Path) -> None:
    source = FeatureClips(remote(f"pipe:cat {folders}/features/{{name}}", tmp_path), sample=False)
    local = FeatureClips(folders / "features", sample=False)
    assert source.made_with == local.made_with
    assert {name: value.tolist() for name, value in source.empty.items()} == {
        name: value.tolist() for name, value in local.empty.items()
    }
    streamed, listed = (list(FixedLoader(each, batch_size=3, workers=1)) for each in (source, local))
    assert content(streamed) == content(listed)


def test_shards_that_others_wrote_are_counted_once(folders: Path, tmp_path: Path, serve: Serve) -> None:
    server = serve(folders, 0)
    urls = f"{server.url}/videos/shard-{{000000..000007}}.tar"
    source = videos(remote(urls, tmp_path))
    assert len(source) == CLIPS
    assert len(server.asked) == 8
    assert len(videos(remote(urls, tmp_path))) == CLIPS
    take(loader(source), 12)
    assert len(server.asked) == 8
    # Where the cache has lost them they come again, and must be what was counted.
    for tar in (tmp_path / "shards").glob("*.tar"):
        tar.unlink()
    changed = tmp_path / "changed"
    shutil.copytree(folders, changed)
    server.folder = changed
    (changed / "videos" / "shard-000003.tar").write_bytes((folders / "videos" / "shard-000001.tar").read_bytes())
    with pytest.raises(ShardFetchError, match=r"shard-000003.tar: (has \d+ bytes, \d+ are listed|its content)"):
        take(loader(videos(remote(urls, tmp_path, attempts=2))), 12)


# --- the cache --------------------------------------------------------------------------------------------------------


def held(cache: Path) -> int:
    """Bytes that the shards in a cache take, those being fetched included."""
    return sum(path.stat().st_size for path in (cache / "shards").iterdir() if path.is_file())


def read_some(url: str, cache: str, number: int, limit: int) -> None:
    shards = remote(url, Path(cache), cache_bytes=limit, attempts=20)
    take(loader(videos(shards), seed=number), 9)


def test_processes_that_share_a_cache_keep_its_bound(folders: Path, tmp_path: Path, serve: Serve) -> None:
    server = serve(folders, 10)
    limit = 3 * max(path.stat().st_size for path in (folders / "videos").glob("*.tar"))
    fork = multiprocessing.get_context("fork")
    readers = [
        fork.Process(target=read_some, args=(f"{server.url}/videos", str(tmp_path), number, limit))
        for number in range(3)
    ]
    for reader in readers:
        reader.start()
    most = 0
    while any(reader.is_alive() for reader in readers):
        try:
            most = max(most, held(tmp_path))
        except FileNotFoundError:
            continue
        time.sleep(0.002)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert 0 < most <= limit
    assert len([path for path in server.asked if path.endswith(".tar")]) > 8  # some had to go, and came again


def test_the_shard_read_longest_ago_goes_first_and_what_a_killed_process_left_too(
    folders: Path, tmp_path: Path
) -> None:
    tars = sorted((folders / "videos").glob("*.tar"))[:4]
    sizes = [tar.stat().st_size for tar in tars]
    cache = ShardCache(tmp_path, sum(sizes[:3]) + max(sizes), Patience(1))
    shards = [Remote(str(tar), tar.stat().st_size) for tar in tars]
    for age, shard in enumerate(shards[:3]):
        cache.open(shard).close()
        os.utime(cache.path(shard), (age, age))
    left = tmp_path / f".{cache.path(shards[3]).name}x.part"
    left.write_bytes(bytes(max(sizes)))
    cache.open(shards[3]).close()
    assert not left.exists()
    assert all(cache.has(shard) for shard in shards)
    with cache.open(shards[0]) as held_open:  # it was read just now
        cache.open(Remote(str(tars[0]), sizes[0], hashlib.sha256(tars[0].read_bytes()).hexdigest())).close()
        assert [cache.has(shard) for shard in shards] == [True, False, True, True]
        cache.path(shards[0]).unlink()
        assert held_open.read() == tars[0].read_bytes()


def fetch_slowly(cache: ShardCache, shard: Remote) -> None:
    cache.open(shard).close()


def test_a_process_that_is_killed_while_it_fetches_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 1 << 20, Patience(1, timeout=30))
    go = tmp_path / "go"
    command = f"pipe:head -c 4096 /dev/zero; while [ ! -e {go} ]; do sleep 0.02; done; head -c 4096 /dev/zero"
    shard = Remote(command, 8192)
    process = multiprocessing.get_context("fork").Process(target=fetch_slowly, args=(cache, shard))
    process.start()
    while not [path for path in folder.glob(".*.part") if path.stat().st_size]:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not cache.has(shard)
    go.touch()
    with cache.open(shard) as file:
        assert file.read() == bytes(8192)
    assert not [*folder.glob(".*.part")]


def test_a_shard_that_the_cache_cannot_hold_twice_is_refused_at_once(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raise cache_bytes"):
        videos(remote(str(folders / "videos"), tmp_path, cache_bytes=1000))


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", r"status 500 Internal Server Error \(3 attempts\)"),
        ("cut", r"cut off after \d+ of \d+ bytes \(3 attempts\)"),
        ("reset", r"(cut off after|status 200, then Connection reset).* \(3 attempts\)"),
        ("silent", r"(Connection reset|Remote end closed|closed connection).* \(3 attempts\)"),
        ("unsized", r"cut off after \d+ of \d+ bytes \(3 attempts\)"),
    ],
)
def test_the_last_failure_is_one_line_with_url_and_status(
    folders: Path, tmp_path: Path, serve: Serve, fault: str, said: str
) -> None:
    server = serve(folders, 0, (fault,))
    source = videos(remote(f"{server.url}/videos?key=SECRET", tmp_path, attempts=3))
    server.every = 1
    with pytest.raises(ShardFetchError, match=rf"^{server.url}/videos/shard-00000\d.tar: {said}") as caught:
        take(loader(source), 1)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_worker_ends_the_run_with_the_same_line_and_a_shard_that_is_gone_is_asked_for_once(
    folders: Path, tmp_path: Path, serve: Serve
) -> None:
    shutil.copytree(folders / "videos", tmp_path / "served")
    server = serve(tmp_path / "served", 0)
    source = videos(remote(server.url, tmp_path / "cache", buffer=1))
    for tar in (tmp_path / "served").glob("*.tar"):
        tar.unlink()
    with pytest.raises(ShardFetchError, match=r"shard-00000\d.tar: status 404 Not Found; check"):
        take(loader(source, workers=1), 4)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat {tar}; echo no such bucket >&2; exit 3", r"exit code 3: no such bucket \(2 attempts\)"),
        ("head -c 2000 {tar}", r"cut off, or no tar: no end mark after 2000 bytes"),
        ("sleep 60", r"has given nothing for 0.2 s"),
    ],
)
def test_commands_that_fail_are_noticed(folders: Path, tmp_path: Path, command: str, said: str) -> None:
    tar = folders / "videos" / "shard-000000.tar"
    # What makes this a tar, not a folder, is that no {name} is in it.
    shards = remote(f"pipe:{command.format(tar=tar)}", tmp_path, attempts=2, timeout=0.2)
    with pytest.raises(ShardFetchError, match=said):
        videos(shards)
    assert not [*(tmp_path / "shards").glob("*.tar"), *(tmp_path / "shards").glob(".*.part")]


def test_a_download_without_a_length_is_checked_by_the_end_of_the_tar(
    folders: Path, tmp_path: Path, serve: Serve
) -> None:
    server = serve(folders / "videos", 2, ("unsized",), sized=False)
    source = videos(remote(f"{server.url}/shard-{{000000..000007}}.tar", tmp_path, attempts=8))
    assert len(source) == CLIPS
    assert len(server.failed) >= 4


def test_a_damaged_clip_costs_itself_alone(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "videos", tmp_path / "damaged")
    tar = tmp_path / "damaged" / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    entry = ShardClips(folders / "videos", 1, 16, 16).entries[7]
    data[entry.offset + 20] ^= 255
    tar.write_bytes(data)
    index = json.loads((tmp_path / "damaged" / "index.json").read_text())
    del index["sha256"]
    for shard in index["shards"]:
        del shard["sha256"]  # as in a folder of an earlier version
    (tmp_path / "damaged" / "index.json").write_text(json.dumps(index))
    batches = take(loader(videos(remote(str(tmp_path / "damaged"), tmp_path / "cache"))), 6)
    assert sum(batch["broken"] for batch in batches) == 1
    assert entry.key not in [key for batch in batches for key in batch["key"]]


# --- what is refused --------------------------------------------------------------------------------------------------


def hostile(folder: Path, name: str) -> None:
    """An index that names another file than a tar beside it."""
    folder.mkdir()
    shards = [{"file": name, "clips": 1, "bytes": 10240}]
    (folder / "index.json").write_text(json.dumps({"format": "osp-shards", "version": 1, "shards": shards}))


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.tar", "/etc/secret.tar", "pipe:touch owned;.tar", "a'$(touch owned)'.tar", "`touch owned`.tar"),
        *("file:secret.tar", "-rf.tar", "..tar", "a%2f..tar", "s3:x.tar", "a b.tar", "a\n.tar"),
    ],
)
def test_an_index_from_elsewhere_names_only_tars_beside_it(
    tmp_path: Path, serve: Serve, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "served", name)
    server = serve(tmp_path / "served", 0)
    for url in (server.url, f"pipe:cat {tmp_path}/served/{{name}}", str(tmp_path / "served")):
        with pytest.raises(DataError, match=r"plain names|no name of a tar"):
            videos(remote(url, tmp_path / "cache"))
    assert server.asked == ["/index.json"]
    assert not (tmp_path / "owned").exists()


def test_a_list_names_no_commands_and_one_from_elsewhere_only_what_lies_beside_it(tmp_path: Path, serve: Serve) -> None:
    server = serve(tmp_path, 0)
    for line in ("pipe:touch owned", "/etc/passwd.tar", "../x.tar", "http://127.0.0.1/x.tar", "file:///x.tar"):
        (tmp_path / "shards.txt").write_text(f"# shards\n{line}\n")
        with pytest.raises(DataError, match=r"cannot name commands|plain names"):
            remote(f"{server.url}/shards.txt", tmp_path / "cache")
    (tmp_path / "shards.txt").write_text("pipe:touch owned\n")
    with pytest.raises(DataError, match=r"shards.txt:1: a list cannot name commands"):
        remote(str(tmp_path / "shards.txt"), tmp_path / "cache")
    assert not (tmp_path / "owned").exists()


def test_a_changed_seed_batch_shard_list_or_split_is_refused_in_one_line(folders: Path, tmp_path: Path) -> None:
    tars = f"{folders}/videos/shard-{{000000..000007}}.tar"
    first = loader(videos(remote(tars, tmp_path)))
    take(first, 3)
    state = first.state_dict()
    for other, said in (
        (loader(videos(remote(tars, tmp_path)), seed=4), "seed was 3, is 4"),
        (loader(videos(remote(tars, tmp_path)), batch_size=6), "global batch .* was 4, is 6"),
        (loader(videos(remote(tars.replace("07}", "06}"), tmp_path))), "clips was 24, is 21"),
        (loader(videos(remote(tars, tmp_path, slots=4))), "slots=2 .* slots=4"),
        (loader(videos(remote(tars, tmp_path, buffer=5))), "buffer=4 .* buffer=5"),
        (loader(videos(folders / "videos")), "clips or their decoding was"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            other.load_state_dict(state)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("urls", "settings", "said"),
    [
        ([], {}, "name shards"),
        ("", {}, "an empty name"),
        ("x.tar", {"slots": 0}, "slots=0"),
        ("x.tar", {"attempts": 0}, "attempts=0"),
        ("x.tar", {"cache_bytes": 0}, "cache_bytes=0"),
        (["x.tar", "folder"], {}, "either folders"),
        ("nowhere://x/y.tar", {}, "fsspec cannot open it"),
        ("${NOT_SET_HERE}.tar", {}, "cannot be expanded"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, urls: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        videos(remote(urls, tmp_path, **settings))


def test_what_lies_nowhere_is_one_line(tmp_path: Path) -> None:
    for url, said in (
        ("http://127.0.0.1:9/videos", "http://127.0.0.1:9/videos/index.json: Connection refused"),
        (str(tmp_path / "none"), "none/index.json: No such file or directory"),
        (str(tmp_path / "none.tar"), "none.tar: No such file or directory"),
    ):
        with pytest.raises(ShardFetchError, match=said):
            videos(remote(url, tmp_path / "cache", attempts=2))
