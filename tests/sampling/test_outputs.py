"""Files that say how they were made."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.data.media.video import probe, read_clip, to_uint8
from osp.errors import DataError, UsageError
from osp.sampling.outputs import SAMPLES, SampleFolder, read_settings

SETTINGS: dict[str, Any] = {"prompt": 'ein "Würfel" ' + "x" * 600, "seed": 3, "frames": 5, "fps": 8.0, "size": (1, 2)}


@pytest.fixture
def video() -> Tensor:
    columns = torch.linspace(-1, 1, 32).expand(3, 5, 16, 32)
    return columns * torch.linspace(0.2, 1, 5)[:, None, None]


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_a_file_holds_its_settings_and_the_same_bytes_again(tmp_path: Path, video: Tensor, kind: str) -> None:
    paths = [SampleFolder(tmp_path / name, kind).write("a_seed3", video, SETTINGS) for name in ("one", "two")]
    contents = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        contents.append([file.read_bytes() for file in files])
        assert read_settings(path) == {**SETTINGS, "size": [1, 2]}
        assert str(tmp_path) not in str(contents[-1])
    assert contents[0] == contents[1]
    pixels = to_uint8(video).float()
    if kind == "png":
        assert paths[0].name == "a_seed3"
        frames = torch.cat([read_clip(file, frames=1) for file in sorted(paths[0].iterdir())], dim=1)
        assert torch.equal(frames.float(), pixels)
        return
    info = probe(paths[0], decode=True)
    assert (info.frames, info.height, info.width) == (5, 16, 32)
    assert (read_clip(paths[0], frames=5).float() - pixels).abs().mean() < 6


def test_an_image_is_one_png(tmp_path: Path, video: Tensor) -> None:
    path = SampleFolder(tmp_path, "png").write("a", video[:, :1], {**SETTINGS, "frames": 1})
    assert path == tmp_path / "a.png"
    assert torch.equal(read_clip(path, frames=1), to_uint8(video[:, :1]))


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_what_is_there_is_kept_if_it_was_made_with_the_same_settings(tmp_path: Path, video: Tensor, kind: str) -> None:
    folder = SampleFolder(tmp_path, kind)
    assert not folder.is_made("a", SETTINGS)
    folder.write("a", video, SETTINGS)
    again = SampleFolder(tmp_path, kind)
    assert again.is_made("a", SETTINGS)
    other = SETTINGS | {"seed": 4}
    with pytest.raises(UsageError, match=r"made with other settings \(seed differs\)"):
        again.is_made("a", other)
    anew = SampleFolder(tmp_path, kind, overwrite=True)
    assert not anew.is_made("a", other)
    anew.write("a", video[:, :, :, :16], other)
    assert read_settings(anew.path("a", 5)) == json.loads(json.dumps(other))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_the_list_has_a_line_for_each_file_that_is_there(tmp_path: Path, video: Tensor) -> None:
    folder = SampleFolder(tmp_path, "png")
    for name in ("b", "a", "c"):
        folder.write(name, video[:, :1], SETTINGS | {"frames": 1, "prompt": name})
    (tmp_path / "c.png").unlink()
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"path": "cut o')  # by a run that was killed
    listed = SampleFolder(tmp_path, "png").finish()
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["path"], line["prompt"]) for line in lines] == [("a.png", "a"), ("b.png", "b")]


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"a\.mp4: cannot be read"):
        SampleFolder(tmp_path, "mp4").is_made("a", SETTINGS)
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="made with other settings"):
        SampleFolder(tmp_path, "png").is_made("b", SETTINGS)
    with pytest.raises(UsageError, match="format=avi"):
        SampleFolder(tmp_path, "avi")


def test_a_line_of_the_list_that_was_cut_off_costs_itself_only(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, "png")
    settings = {"prompt": "a", "fps": 8.0, "frames": 1}
    folder.write("000", torch.zeros(3, 1, 8, 8), settings)
    folder.list.write_text(folder.list.read_text() + '{"path": "001.png", "pro')
    folder.write("002", torch.zeros(3, 1, 8, 8), settings)
    assert SampleFolder(tmp_path, "png").listed.keys() == {"000.png", "002.png"}


@pytest.mark.parametrize("line", ["[" * 5000, '{"path": 3}', '{"path": "a", "seed": NaN}', "3", '"path"'])
def test_a_list_of_anything_is_read(tmp_path: Path, line: str) -> None:
    (tmp_path / SAMPLES).write_text(line + '\n{"path": "b.png", "prompt": "b"}\n')
    assert SampleFolder(tmp_path, "png").listed == {"b.png": {"prompt": "b"}}


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="is no regular file"):
        read_settings(tmp_path / "a.png")
    os.mkfifo(tmp_path / SAMPLES)
    with pytest.raises(DataError, match="is no regular file"):
        SampleFolder(tmp_path, "png")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SampleFolder(tmp_path, "png")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("osp.sampling.outputs.write_whole", full)
    for frames in (1, 3):
        with pytest.raises(OSError, match="No space left"):
            folder.write("000", torch.zeros(3, frames, 8, 8), {"prompt": "a", "fps": 8.0, "frames": frames})
        assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / SAMPLES).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        folder.write("000", torch.zeros(3, 1, 8, 8), {"prompt": "a", "fps": 8.0, "frames": 1})
    assert caught.value.filename == str(folder.list)
