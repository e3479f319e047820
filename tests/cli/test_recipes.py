"""The published recipes compose to the published numbers, build their models, and lead to each other."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from osp.cli import config_folder
from osp.conditioning import MIXES, find_mix
from osp.data.media.shape import Shape
from osp.denoiser import CrossTransformer, JointTransformer

INPAINT = "opensora_inpaint_v13"

# name: largest shape, fps, steps, rate, global batch, frame masks, denoiser, and the recipe it goes on from
RECIPES: dict[str, tuple[Any, ...]] = {
    "v13_stage1": ((1, 320, 320), None, 100_000, 2e-5, 1024, None, "opensora_v13", None),
    "v13_stage2": ((93, 320, 320), 16, 300_000, 2e-5, 1024, None, "opensora_v13", "v13_stage1"),
    "v13_stage3": ((93, 352, 640), 16, 30_000, 1e-5, 1024, None, "opensora_v13", "v13_stage2"),
    "v13_inpaint_step1": ((93, 352, 640), 18, 15_625, 1e-5, 256, "step1", INPAINT, "v13_stage3"),
    "v13_inpaint_step2": ((93, 352, 640), 18, 15_625, 1e-5, 256, "step2", INPAINT, "v13_inpaint_step1"),
    "v13_inpaint_step3": ((93, 352, 640), 18, 15_625, 1e-5, 256, "step3", INPAINT, "v13_inpaint_step2"),
    "v13_inpaint_step4": ((93, 352, 640), 18, 15_625, 1e-5, 256, "step4", INPAINT, "v13_inpaint_step3"),
    "v13_inpaint_step5": ((93, 352, 640), 18, 31_250, 1e-5, 256, "step5", INPAINT, "v13_inpaint_step4"),
    "v13_inpaint_step6": ((93, 352, 640), 18, 62_500, 1e-5, 256, "step6", INPAINT, "v13_inpaint_step5"),
    "v13_inpaint_step7": ((93, 352, 640), 18, 39_063, 1e-5, 256, "step7", INPAINT, "v13_inpaint_step6"),
    "v13_inpaint_stage2": ((93, 352, 640), 18, 58_594, 1e-5, 256, "stage2", INPAINT, "v13_inpaint_step7"),
    "v15_image1": ((1, 256, 256), None, 225_000, 1e-4, 8096, None, "mmdit_v15", None),
    "v15_image2": ((1, 384, 384), None, 150_000, 1e-4, 6144, None, "mmdit_v15", "v15_image1"),
    "v15_image3": ((1, 288, 512), None, 110_000, 1e-4, 4096, None, "mmdit_v15", "v15_image2"),
    "v15_image4": ((1, 288, 512), None, 160_000, 1e-4, 4096, None, "suv_v15", "v15_image3"),
    "v15_video1": ((57, 288, 512), 24, 40_000, 6e-5, 1024, None, "suv_v15", "v15_image4"),
    "v15_video2": ((57, 288, 512), 12, 45_000, 6e-5, 1024, None, "suv_v15", "v15_video1"),
    "v15_video3": ((121, 288, 512), 24, 25_000, 4e-5, 1024, None, "suv_v15", "v15_video2"),
    "v15_video4": ((121, 576, 1024), 24, 16_000, 2e-5, 512, None, "suv_v15", "v15_video3"),
    "v15_video5": ((121, 576, 1024), 24, 5_000, 1e-5, 512, None, "suv_v15", "v15_video4"),
}
SAMPLES = {"step1": 4, "step2": 4, "step3": 4, "step4": 4, "step5": 8, "step6": 16, "step7": 10, "stage2": 15}
PATHS = {"v13": ["text.path=T5"], "v15": ["text.tokens.path=T5", "text.pooled.path=CLIP"]}


@cache
def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", [f"experiment={name}", *overrides])


def model(cfg: DictConfig) -> Any:
    return _model(OmegaConf.to_yaml(cfg.denoiser))


@cache
def _model(denoiser: str) -> Any:
    with torch.device("meta"):
        return instantiate(OmegaConf.create(denoiser))


def test_the_table_has_every_recipe() -> None:
    here = {path.stem for path in (config_folder() / "experiment").glob("v1[35]_*.yaml")}
    assert here == {*RECIPES, "v13_shared"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    shape, fps, steps, lr, batch, masks, denoiser, before = RECIPES[name]
    cfg = composed(name, "data.train.path=shards", "path=VAE", *PATHS[name[:3]])
    assert cfg.name == name
    assert (cfg.clip.frames, cfg.clip.height, cfg.clip.width) == shape
    assert (cfg.clip.fps, cfg.clip.stride) == (fps, 1)
    assert cfg.trainer.max_steps == steps
    assert (cfg.module.lr, cfg.module.warmup_steps) == (lr, 0)
    assert cfg.global_batch == batch
    assert batch % (8 * cfg.data.batch_size) == 0
    assert cfg.denoiser == composed(name, f"denoiser={denoiser}").denoiser
    assert (cfg.after, cfg.start_from) == (before, None)
    assert (cfg.module.ema_decay, cfg.module.text_dropout, cfg.module.recompute_every) == (0.9999, 0.1, 1)
    assert (cfg.trainer.precision, cfg.trainer.devices) == ("bf16-mixed", -1)
    assert cfg.module.masks == masks
    if masks is not None:
        assert find_mix(masks) is MIXES[masks]
        assert 0 <= batch * steps - SAMPLES[masks] * 1_000_000 < batch
        assert cfg.module.image_text
    objective, clipping = {"v13": ("Velocity", "AbnormalDrop"), "v15": ("Flow", "AdaptiveClipping")}[name[:3]]
    assert type(instantiate(cfg.objective)).__name__ == objective
    assert type(instantiate(cfg.clipping)).__name__ == clipping
    tokens = cfg.text if name[:3] == "v13" else cfg.text.tokens
    assert (tokens.max_tokens, cfg.denoiser.text_channels) == (512, tokens.channels)


def test_the_page_of_recipes_says_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    published = page[: page.index("## Batch and devices")]
    rows = {line.split("`")[1]: line for line in published.splitlines() if line.startswith("| `v1")}
    assert list(rows) == list(RECIPES)
    for name, ((frames, height, width), fps, steps, lr, batch, masks, _, _) in RECIPES.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert f"{steps:,}" in rows[name]
        if masks is None:
            size = f"{frames}x{height}x{width}".removeprefix("1x" if name in ("v15_image1", "v15_image2") else "")
            assert size in rows[name]
            rate = f"{lr:.0e}".replace("e-0", "e-")
            assert {str(batch), rate} <= {cell.rstrip("*").split(",")[0] for cell in cells}
            assert fps is None or str(fps) in {cell.rstrip("*") for cell in cells}
        else:
            shares = dict(
                zip(("text", "continuation", "random", "clear", "first", "transition"), cells[2:8], strict=True)
            )
            said = {kind: float(share.rstrip(" %")) for kind, share in shares.items() if share}
            assert said == dict(MIXES[masks].weights)
            kept = cells[8].rstrip(" %")
            assert (0.0 if kept == "any" else float(kept) / 100) == MIXES[masks].least_kept
            assert cells[9] == f"{SAMPLES[masks]} M"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_clips_their_shapes(name: str) -> None:
    cfg = composed(name, "data.train.path=shards")
    rule = instantiate(cfg.data.train.rule)
    assert cfg.data.val.rule == cfg.data.train.rule
    v13 = name.startswith("v13")
    assert (rule.time_stride, rule.space_stride, rule.patch_size) == ((4, 8, 2) if v13 else (8, 8, 2))
    frames, height, width = RECIPES[name][0]
    largest = rule.fit(Shape(frames * 2 - 1, height * 2, width * 2))
    if name == "v13_stage2":
        assert largest == (93, 320, 320)
        assert rule.tokens(largest) == rule.max_tokens
        assert rule.fit(Shape(60, 1080, 1920)) == (57, 224, 416)  # 364 of 400 tokens
        assert rule.fit(Shape(1, 1080, 1920)) == (1, 224, 416)
    elif "inpaint" in name:
        assert rule.frame_tokens == (102_400 // 256, 236_544 // 256)
        assert rule.tokens(Shape(93, 352, 672)) == rule.max_tokens
        assert largest == (93, 352, 640)
    else:
        assert largest == (frames, height, width)
        assert all(side % 16 == 0 for shape in rule.shapes for side in shape[1:])
    if v13 and "stage1" not in name and name != "v13_stage3":
        assert rule.size_stride == 32


@pytest.mark.parametrize(("name", "side"), [("v15_image1", 256), ("v15_image2", 384)])
def test_five_aspects_have_about_the_same_area(name: str, side: int) -> None:
    shapes = instantiate(composed(name).buckets).shapes
    for shape, aspect in zip(shapes, (1, 3 / 4, 4 / 3, 9 / 16, 16 / 9), strict=True):
        assert shape.width / shape.height == pytest.approx(aspect, rel=0.04)
        assert shape.height * shape.width == pytest.approx(side**2, rel=0.03)


@pytest.mark.parametrize("name", [name for name, numbers in RECIPES.items() if numbers[-1] is not None])
def test_a_recipe_takes_the_weights_of_the_one_before(name: str) -> None:
    before, now = model(composed(RECIPES[name][-1])), model(composed(name))
    assert isinstance(now, CrossTransformer if name.startswith("v13") else JointTransformer)
    old, new = ({key: value.shape for key, value in one.state_dict().items()} for one in (before, now))
    assert old.items() <= new.items()
    added = {key.split(".")[0] for key in new.keys() - old.keys()}  # parts that start without effect
    assert added == {
        "v13_inpaint_step1": {"condition_patches"},
        "v15_image4": {"video_skips", "text_skips"},
    }.get(name, set())
    if name == "v15_image4":
        assert not before.settings["long_skips"]
        assert now.settings["long_skips"]
        assert {stage.pattern for stage in before.stages} == {"dense"}


def test_features_take_the_place_of_videos_and_encoders() -> None:
    for name in ("v13_stage2", "v15_video4"):
        cfg = composed(name, "data=features", "~text", "data.train.path=features")
        assert cfg.text is None
        assert set(cfg.data.train) == {"_target_", "path", "patch_size"}
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
