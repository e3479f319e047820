"""The Python of the README runs as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from osp.data.media.video import probe
from osp.sampling import VideoGenerator
from osp.training import checkpoints

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_of_the_readme_make_a_video(
    make_generator: Callable[..., VideoGenerator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(clip={"frames": 5, "height": 16, "width": 16})
    monkeypatch.setattr(checkpoints, "load_trained_generator", lambda path: generator)  # of the demo's checkpoint
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    made: dict[str, object] = {}
    exec(lines, made)
    assert probe(tmp_path / "star.mp4", decode=True).frames == 5
    assert made["again"].shape == made["video"].shape == (3, 5, 16, 16)  # type: ignore[attr-defined]
