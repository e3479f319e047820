"""Released folders as on the hub: imported by one command, sampled by another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import save_release
from text_folders import save_clip, save_t5

from osp.data.media.video import read_clip
from osp.weights import load_pretrained
from osp.weights.releases import RELEASES

Osp = Callable[..., tuple[int, str, str]]
CONF = Path(__file__).resolve().parents[2] / "conf"
GENERATORS = {path.stem for path in (CONF / "generator").glob("[!_]*.yaml")}
NEGATIVE = "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
NEGATIVE += "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The text encoder of each version, as arguments."""
    folder = tmp_path_factory.mktemp("texts")
    t5, mt5, clip = save_t5(folder / "t5"), save_t5(folder / "mt5", "mt5"), save_clip(folder / "clip")
    one = {"v10": [f"text.path={t5}"], "v11": [f"text.path={t5}"]}
    one |= {version: [f"text.path={mt5}"] for version in ("v12", "v13")}
    return one | {"v15": [f"text.tokens.path={t5}", f"text.pooled.path={clip}"]}


def version_of(name: str) -> str:
    return next(part for part in name.split("_") if part[0] == "v" and part[1:].isdigit())


def test_each_release_has_a_generator_of_its_name_and_the_other_way_round() -> None:
    assert not GENERATORS - {*RELEASES, "trained"}


@pytest.mark.parametrize("name", sorted(GENERATORS - {"trained"}))
def test_a_folder_as_on_the_hub_is_imported_and_sampled_by_one_command_each(
    osp: Osp, tmp_path: Path, texts: dict[str, list[str]], name: str
) -> None:
    frames = 1 if "1x480p" in name else 9
    model = save_release(name, tmp_path / "hub", frames=frames)
    code, out, err = osp("import-weights", f"release={name}", "source=hub", "output=weights")
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert (said["release"], sorted(said)[:3]) == (name, ["denoiser", "output", "release"])
    imported = load_pretrained(tmp_path / "weights" / "denoiser")
    assert imported.settings == model.settings
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in imported.state_dict().items())
    size = ["clip.height=32", "clip.width=32", f"clip.frames={frames}", "solver.steps=4"]
    text = texts[version_of(name)]
    code, out, err = osp(
        "sample", f"generator={name}", "path=weights", *text, "prompt=A cat, asleep", *size, "output=out"
    )
    assert code == 0, err
    (video,) = (path for path in (tmp_path / "out").iterdir() if path.suffix == ".mp4")
    assert read_clip(video, frames=frames, size=(32, 32)).float().std() > 1
