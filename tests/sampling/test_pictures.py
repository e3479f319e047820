"""Files of pictures as given frames."""

from pathlib import Path

import pytest
import torch

from osp.data.media.pictures import encode_png
from osp.data.media.video import ClipError, encode_video
from osp.errors import UsageError
from osp.sampling.pictures import PictureFiles


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(torch.full((3, 20, 24), value, dtype=torch.uint8)))
    steps = torch.arange(16, dtype=torch.uint8).mul(16).view(1, -1, 1, 1).expand(3, -1, 16, 16)
    (tmp_path / "steps.mp4").write_bytes(encode_video(steps, 16.0, lossless=True))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return {path.stem: path for path in tmp_path.iterdir()}


def test_files_say_their_mode_and_where_they_go(files: dict[str, Path]) -> None:
    dark, light = files["dark"], files["light"]
    cases = {
        "text": (PictureFiles(), []),
        "image": (PictureFiles(dark), [0]),
        "transition": (PictureFiles(dark, light), [0, 8]),
        "continuation": (PictureFiles(video=files["steps"], keep_frames=3), [0, 1, 2]),
        "frames": (PictureFiles(by_number=((4, light), (-1, dark))), [4, 8]),
    }
    for mode, (pictures, kept) in cases.items():
        pictures.check(None)
        pictures.check(mode)
        given = pictures.read(9, 16, 16, fps=16.0)
        assert pictures.mode == mode
        assert [int(number) for number in (given.mask[0, :, 0, 0] == 0).nonzero()] == kept
    ends = cases["transition"][0].read(9, 16, 16, fps=16.0).video
    assert (ends[0, 0, :, 0, 0] == torch.tensor([-1.0, *[0.0] * 7, 1.0])).all()


def test_a_video_is_taken_at_the_rate_of_what_goes_on(files: dict[str, Path]) -> None:
    pictures = PictureFiles(video=files["steps"], keep_frames=3)
    for fps, step in ((16.0, 16), (8.0, 32)):
        video = pictures.read(9, 16, 16, fps).video
        assert ((video[0, 0, :3, 0, 0] + 1) * 127.5).round().tolist() == [0, step, 2 * step]


def test_the_hash_is_of_the_content(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "copy.png").write_bytes(files["dark"].read_bytes())
    assert PictureFiles(files["dark"]).contents() == PictureFiles(tmp_path / "copy.png").contents()
    assert PictureFiles(files["dark"]).contents() != PictureFiles(files["light"]).contents()


def test_wrong_files_are_refused(files: dict[str, Path]) -> None:
    dark = files["dark"]
    with pytest.raises(UsageError, match=r"mode=image takes image=FILE; given: none"):
        PictureFiles().check("image")
    with pytest.raises(UsageError, match=r"mode=text takes no files of pictures; given: image"):
        PictureFiles(dark).check("text")
    with pytest.raises(UsageError, match="mode=dream: is not known; choose text, image"):
        PictureFiles().check("dream")
    with pytest.raises(UsageError, match="video and image exclude each other"):
        PictureFiles(dark, video=files["steps"]).check(None)
    with pytest.raises(UsageError, match="last_image needs an image"):
        PictureFiles(last_image=dark).check(None)
    for path in (files["broken"], dark.with_name("none.png")):
        with pytest.raises(ClipError, match=path.name):
            PictureFiles(path).check(None)
    with pytest.raises(ClipError, match="needed"):
        PictureFiles(video=files["steps"], keep_frames=99).read(101, 16, 16, 16.0)
    with pytest.raises(UsageError, match="none is left to generate"):
        PictureFiles(video=files["steps"], keep_frames=5).read(5, 16, 16, 16.0)
