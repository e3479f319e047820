"""`osp eval` of one file, of videos of many sizes and lengths, and of any source of clips."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osp.data.media.video import write_video
from osp.vae import WFVAE
from osp.weights.pretrained import save_pretrained

Osp = Callable[..., tuple[int, str, str]]
SOURCE = """
import torch

from osp.data.sources import ClipSource


class Noise(ClipSource):
    def __init__(self, clips=2):
        self.clips = clips

    def __len__(self):
        return self.clips

    def fingerprint(self):
        return f"noise {self.clips}"

    def read(self, index, draw):
        generator = torch.Generator().manual_seed(index)
        video = torch.randint(0, 256, (3, 5, 16, 16), generator=generator, dtype=torch.uint8)
        return {"video": video, "caption": "noise", "key": f"noise{index}", "fps": 8.0}
"""


@pytest.fixture
def evaluate(osp: Osp, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    torch.manual_seed(0)
    widths = {"base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
    save_pretrained(WFVAE(latent_channels=4, encoder_blocks=1, decoder_blocks=1, **widths), tmp_path / "vae")
    common = ["device=cpu", "vae=pretrained", "path=vae", "perceptual.download=false", f"output={tmp_path / 'out'}"]
    return lambda *settings: osp("eval", *settings, *common)


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, frames, height, width), dtype=torch.uint8)


def test_one_file_and_sizes_of_each_video_are_taken(evaluate: Osp, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", clip(7, 20, 36), 8.0)
    write_video(tmp_path / "in" / "b.mp4", clip(40, 16, 24), 8.0)
    own = ["clip.frames=null", "clip.height=null", "clip.width=null"]
    code, out, said = evaluate("input=in", *own)
    assert code == 0, said
    result = json.loads(out.splitlines()[-1])
    assert result["counts"] == {"clips": 2, "frames": 47, "skipped": 0}
    assert result["frechet"]["clips_are"] == "runs of 16 frames of the videos, each in its own size"
    clips = json.loads((tmp_path / "out" / "metrics.json").read_text())["clips"]
    assert [(one["frames"], one["height"], one["width"]) for one in clips] == [(7, 16, 32), (40, 16, 24)]
    code, out, said = evaluate("input=in/a.mp4", "clip.frames=5", *own[1:])
    assert code == 0, said
    assert json.loads(out.splitlines()[-1])["counts"] == {"clips": 1, "frames": 5, "skipped": 0}


def test_any_source_of_clips_is_measured(
    evaluate: Osp, osp: Osp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "noise_source.py").write_text(SOURCE)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    target = "_target_: noise_source.Noise"
    data = f"_target_: osp.data.datamodule.ClipDataModule\ntrain: {{{target}, clips: 3}}\nval: {{{target}}}\n"
    (tmp_path / "conf" / "data" / "noise.yaml").write_text(data)
    code, out, said = evaluate("--config-dir=conf", "data=noise")
    assert code == 0, said
    assert json.loads(out.splitlines()[-1])["counts"]["clips"] == 2
    vae = ["device=cpu", "vae=pretrained", "path=vae", "output=features", "workers=1"]
    code, out, said = osp("cache", "--config-dir=conf", "data=noise", *vae)
    assert code == 0, said
    assert json.loads(out.splitlines()[-1])["clips"] == 3
    code, _, said = evaluate("data=features", "data.train.path=features")
    assert (code, said) == (2, "osp eval: data.val holds features, which are encoded already; give a source of videos")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give input=FOLDER or FILE with videos or shards, or data=NAME with a source of clips"),
        (["data=synthetic", "input=x"], "input and data both say where the clips come from"),
        (["data=synthetic", "split=test"], "split=test: is not known; choose train or val"),
        (["data=synthetic", "data.batch_size=3"], "data.batch_size=3: nothing reads it here"),
        (["input=x", "clip.height=null", "max_memory=1GiB"], "max_memory needs one size of all clips"),
    ],
)
def test_clips_that_are_not_said_rightly_are_refused(settings: list[str], message: str, evaluate: Osp) -> None:
    code, _, said = evaluate(*settings)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
