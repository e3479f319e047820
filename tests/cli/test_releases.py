"""Released folders as on the hub: imported by one command, sampled by another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import save_release
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from text_folders import save_clip, save_t5

from osp.cli.settings import read_sampling
from osp.data.media.video import read_clip
from osp.sampling.outputs import read_settings
from osp.weights import load_pretrained
from osp.weights.families import find_kind
from osp.weights.releases import RELEASES

Osp = Callable[..., tuple[int, str, str]]
CONF = Path(__file__).resolve().parents[2] / "conf"
GENERATORS = {path.stem for path in (CONF / "generator").glob("[!_]*.yaml")}
NEGATIVE = "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
V12 = "(masterpiece), (best quality), (ultra-detailed), {}."
V13 = "high quality, high aesthetic, {}"
V15 = (
    "Worst quality, Normal quality, Low quality, Low res, Blurry, Jpeg artifacts, Grainy, watermark, banner, Cropped, "
)
V15 += "Out of frame, Out of focus, Bad anatomy, Bad proportions, Deformed, Disconnected limbs, Disfigured, username, "
V15 += "error, sketch, duplicate, ugly, monochrome, horror, geometry, mutation, disgusting, overexposed, underexposed."
READ = {  # by the text encoder, of "A Cat, asleep"
    "v10": "a cat, asleep",
    "v11": "a cat, asleep",
    "v12": "masterpiece , best quality , ultra-detailed , a cat, asleep.",
    "v13": "high quality, high aesthetic, A Cat, asleep",
    "v15": "high quality, a cat, asleep",
}
SAMPLED = [  # one of each shape of model and layout of a folder
    *("opensora_v10_17x256", "opensora_v11_221x512", "opensora_v12_29x720p", "opensora_inpaint_v12_93x480p"),
    *("opensora_v13", "opensora_inpaint_v13", "suv_v15"),
]
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


def steps_of(name: str) -> int:
    return 50 if any(part in name for part in ("v10", "v11", "inpaint_v12")) else 4  # PNDM begins with noise from 50 on


def test_each_release_has_a_generator_of_its_name_and_the_other_way_round() -> None:
    assert {*RELEASES, "trained"} == GENERATORS


# The clip, solver, guidance, frames a second, and what a prompt and a negative prompt go through, as published
@pytest.mark.parametrize(
    ("name", "clip", "solver", "guidance", "fps", "template", "negative", "cleaned"),
    [
        ("opensora_v10_17x256", (17, 256, 256), ("pndm", 250), 7.5, 24, "none", "", ("twice_no_cjk",) * 2),
        ("opensora_v10_65x256", (65, 256, 256), ("pndm", 250), 7.5, 24, "none", "", ("twice_no_cjk",) * 2),
        ("opensora_v10_65x512", (65, 512, 512), ("pndm", 250), 7.5, 24, "none", "", ("twice_no_cjk",) * 2),
        ("opensora_v11_65x512", (65, 512, 512), ("pndm", 150), 7.5, 24, "none", "", ("twice_no_cjk",) * 2),
        ("opensora_v11_221x512", (221, 512, 512), ("pndm", 150), 7.5, 24, "none", "", ("twice_no_cjk",) * 2),
        ("opensora_v12_1x480p", (1, 480, 640), ("euler_ancestral", 100), 7.5, 24, V12, NEGATIVE, ("twice",) * 2),
        ("opensora_v12_93x480p", (93, 480, 640), ("euler_ancestral", 100), 7.5, 24, V12, NEGATIVE, ("twice",) * 2),
        ("opensora_v12_29x720p", (29, 720, 1280), ("euler_ancestral", 100), 7.5, 24, V12, NEGATIVE, ("twice",) * 2),
        ("opensora_v12_93x720p", (93, 720, 1280), ("euler_ancestral", 100), 7.5, 24, V12, NEGATIVE, ("twice",) * 2),
        ("opensora_inpaint_v12_93x480p", (93, 480, 640), ("pndm", 100), 7.5, 24, V12, NEGATIVE, ("twice",) * 2),
        ("opensora_v13", (93, 352, 640), ("euler_ancestral", 100), 7.5, 18, V13, NEGATIVE, ("once", "none")),
        ("opensora_inpaint_v13", (93, 352, 640), ("euler_ancestral", 100), 7.5, 18, V13, NEGATIVE, ("once", "none")),
        ("suv_v15", (121, 576, 1024), ("euler", 50), 8.0, 24, "high quality, {}", V15, ("twice_no_cjk",) * 2),
    ],
)
def test_a_generator_samples_as_its_version_was_published(
    name: str,
    clip: tuple[int, int, int],
    solver: tuple[str, int],
    guidance: float,
    fps: int,
    template: str,
    negative: str,
    cleaned: tuple[str, str],
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("sample", [f"generator={name}", "path=weights"])
    sampling = read_sampling(cfg)
    assert tuple(cfg.generator.clip[key] for key in ("frames", "height", "width")) == clip
    assert (sampling.solver.name, sampling.solver.steps, sampling.guidance) == (*solver, guidance)
    assert (sampling.fps or cfg.generator.fps) == fps
    assert (sampling.template, sampling.negative()) == (template, negative)
    assert (cfg.text.cleaning, cfg.text.prompt_cleaning) == cleaned
    assert sampling.negative("rain") == ("high quality, rain" if name == "suv_v15" else "rain")
    assert cfg.text.get("cut_to_prompt", False) == (template == "none")
    learned = OmegaConf.select(cfg, "generator.objective.learned_variance", default=False)
    assert learned == (template == "none")


@pytest.mark.parametrize("name", SAMPLED)
def test_a_folder_as_on_the_hub_is_imported_and_sampled_by_one_command_each(
    osp: Osp, tmp_path: Path, texts: dict[str, list[str]], name: str
) -> None:
    model = save_release(name, tmp_path / "hub", frames=9)
    code, out, err = osp("import-weights", f"release={name}", "source=hub", "output=weights")
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert (said["release"], sorted(said)[:3]) == (name, ["denoiser", "output", "release"])
    imported = load_pretrained(tmp_path / "weights" / "denoiser")
    assert imported.settings == model.settings
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in imported.state_dict().items())
    size = ["clip.height=32", "clip.width=32", "clip.frames=9", f"solver.steps={steps_of(name)}"]
    sample = ["sample", f"generator={name}", "path=weights", *texts[version_of(name)], "output=out", *size]
    code, out, err = osp(*sample, "prompt=A Cat, asleep")
    assert code == 0, err
    (video,) = (path for path in (tmp_path / "out").iterdir() if path.suffix == ".mp4")
    assert read_clip(video, frames=9, size=(32, 32)).float().std() > 1
    record = read_settings(video)
    assert record["prompt"] == "A Cat, asleep"
    assert record["read"]["prompt"] == READ[version_of(name)]
    assert record["fps"] == (18 if "v13" in name else 24)


def test_folders_of_other_names_and_parts_that_are_not_there(osp: Osp, tmp_path: Path) -> None:
    save_release("opensora_v13", tmp_path / "hub", "any93x640x640")
    (tmp_path / "hub" / "text_encoder").mkdir()
    (tmp_path / "hub" / "text_encoder" / "config.json").write_text('{"model_type": "mt5"}')
    asked = ("import-weights", "release=opensora_v13", "source=hub", "output=weights")
    assert osp(*asked)[0] == 0
    (tmp_path / "hub" / "other").mkdir()
    code, _, err = osp(*asked)
    assert code == 1
    assert err.endswith(
        "several folders that may be the denoiser's, but any93x640x640, other; name it by folders.denoiser=NAME"
    )
    assert osp(*asked, "folders.denoiser=any93x640x640", "folders.vae=vae")[0] == 0
    code, _, err = osp(*asked, "folders.denoiser=any93x640x640", "folders.vae=nothing")
    assert (code, err) == (1, f"osp import-weights: folders.vae=nothing: {tmp_path}/hub has no such folder or file")
    code, _, err = osp("import-weights", "release=opensora_v10_65x512", "source=hub", "output=old")
    assert (code, "holds no folder of the denoiser (65x512x512)" in err) == (1, True), err
    assert not (tmp_path / "old").exists()
    code, _, err = osp("import-weights", "source=hub", "output=old")
    assert (code, err.startswith("osp import-weights: give kind=KIND for one model, or release=NAME")) == (2, True), err


def test_a_folder_without_a_configuration_has_the_shape_of_its_release(tmp_path: Path) -> None:
    scales = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
    wide, square = dict(zip(scales, (1.0, 1.5, 2.0), strict=True)), dict.fromkeys(scales, 1.0)
    for name, settings in {
        "opensora_v10_17x256": {"sample_size": [32, 32], "video_length": 5},
        "opensora_v10_65x512": {"sample_size": [64, 64], "video_length": 17},
        "opensora_v11_221x512": {"sample_size": [64, 64], "video_length": 56},
        "opensora_v12_29x720p": {"sample_size": [90, 160], "sample_size_t": 8, **wide},
        "opensora_v12_93x480p": {"sample_size": [60, 80], "sample_size_t": 24, **square},
    }.items():
        release = RELEASES[name]
        assert release.settings == settings
        kind = find_kind(release.denoiser)[1]
        with torch.device("meta"):
            kind.build({**kind.defaults, **kind.full_sizes[0], **settings}, {})
