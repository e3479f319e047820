"""Clips in sizes of their own, whole videos in pieces, and single files as sources."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from osp.data.media import whole
from osp.data.media.shape import Strides
from osp.data.media.video import ClipError, read_clip, write_video
from osp.data.media.whole import stream_video
from osp.data.sources import OwnSizeClips, ShardClips
from osp.errors import DataError, UsageError

EIGHT = Strides(4, 8)


def video(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", video(7, 20, 36), 8.0, lossless=True)
    write_video(tmp_path / "b.mp4", video(4, 32, 16), 8.0, lossless=True)
    return tmp_path


@pytest.mark.parametrize("pixels", [1, 3 * 16 * 32, 2**22])
@pytest.mark.parametrize(("stride", "fps"), [(1, None), (3, None), (1, 8.0), (1, 5.0), (1, 3.0), (1, 20.0)])
def test_pieces_hold_the_frames_that_reading_the_whole_clip_gives(
    folder: Path, stride: int, fps: float | None, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "_PIXELS", pixels)
    pieces = list(stream_video(folder / "a.mp4", "a", size=(16, 32), stride=stride, fps=fps))
    found = torch.cat(pieces, dim=1)
    again = read_clip(folder / "a.mp4", frames=found.shape[1], size=(16, 32), stride=stride, fps=fps)
    assert torch.equal(found, again)
    with pytest.raises(ClipError):  # nothing is left over
        read_clip(folder / "a.mp4", frames=found.shape[1] + 1, size=(16, 32), stride=stride, fps=fps)
    assert all(piece.shape[1] <= max(1, pixels // (16 * 32)) for piece in pieces)


def test_each_clip_keeps_its_size_rounded_down_to_the_strides(folder: Path) -> None:
    own = OwnSizeClips(folder, EIGHT, frames=3)
    assert [tuple(own.read(index, 0)["video"].shape[1:]) for index in range(2)] == [(3, 16, 32), (3, 32, 16)]
    tall = OwnSizeClips(folder, EIGHT, frames=3, height=24)
    assert [tuple(tall.read(index, 0)["video"].shape[1:]) for index in range(2)] == [(3, 24, 40), (3, 24, 8)]
    with pytest.raises(ClipError, match=r"b\.mp4: 32x16 pixels are fewer than the VAE takes, 32x32"):
        OwnSizeClips(folder, Strides(4, 32), frames=1).read(1, 0)


def test_all_frames_come_in_pieces(folder: Path) -> None:
    clip = OwnSizeClips(folder, EIGHT).read(0, 0)
    assert (clip["height"], clip["width"], clip["expected"], clip["fps"]) == (16, 32, 7, 8.0)
    assert torch.equal(torch.cat(list(clip["pieces"]), 1), read_clip(folder / "a.mp4", frames=7, size=(16, 32)))


def test_sizes_that_make_no_sense_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="frames=0: must be a whole number of at least 1, or null: the video's own"):
        OwnSizeClips(folder, EIGHT, frames=0)
    with pytest.raises(UsageError, match="not both"):
        OwnSizeClips(folder, EIGHT, stride=2, fps=8.0)


def test_a_single_file_is_a_source_with_the_caption_beside_it(folder: Path) -> None:
    (folder / "a.txt").write_text("a noisy clip")
    clips = ShardClips(folder / "a.mp4", 3, 16, 16)
    assert len(clips) == 1
    assert clips.read(0, 0)["caption"] == "a noisy clip"
    with pytest.raises(DataError, match=r"none\.mp4: no such folder or file"):
        ShardClips(folder / "none.mp4", 3, 16, 16)
    (folder / "empty.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match=r"empty\.tar: holds no clips"):
        ShardClips(folder / "empty.tar", 3, 16, 16)
