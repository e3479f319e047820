"""Files that say how they were made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.data.media.video import probe, read_clip, to_uint8
from osp.errors import DataError, UsageError
from osp.sampling.outputs import SampleFolder, read_settings

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
