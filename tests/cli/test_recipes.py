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
from osp.denoiser import CrossTransformer, JointTransformer, LatteTransformer
from osp.training.start import open_start
from osp.weights import save_pretrained

INPAINT = "opensora_inpaint_v13"

# name: largest shape, fps, steps, rate, global batch, frame masks, denoiser, and the recipe it goes on from
RECIPES: dict[str, tuple[Any, ...]] = {
    "v10_stage1": ((17, 256, 256), None, 20_000, 2e-5, 128, None, "latte_v10", None),
    "v10_stage2": ((65, 256, 256), None, 9_000, 2e-5, 128, None, "latte_v10", "v10_stage1"),
    "v10_stage3": ((65, 512, 512), None, 3_000, 2e-5, 64, None, "latte_v10", "v10_stage2"),
    "v11_stage1": ((65, 512, 512), None, 100_000, 2e-5, 160, None, "latte_v11", None),
    "v11_stage2": ((221, 512, 512), None, 10_000, 2e-5, 64, None, "latte_v11", "v11_stage1"),
    "v12_stage1": ((1, 240, 320), None, 146_000, 1e-4, 256, None, "opensora_v12", None),
    "v12_stage2": ((1, 480, 640), None, 200_000, 1e-4, 256, None, "opensora_v12", "v12_stage1"),
    "v12_stage3": ((29, 480, 640), 24, 30_000, 1e-4, 128, None, "opensora_v12", "v12_stage2"),
    "v12_stage4": ((29, 720, 1280), 24, 21_000, 1e-4, 128, None, "opensora_v12", "v12_stage3"),
    "v12_stage5": ((93, 720, 1280), 24, 3_000, 1e-4, 128, None, "opensora_v12", "v12_stage4"),
    "v12_93x480": ((93, 480, 640), 24, 3_500, 1e-4, 128, None, "opensora_v12", "v12_stage5"),
    "v12_i2v": ((93, 480, 640), 24, 10_000, 1e-5, 128, "v12", "opensora_inpaint_v12", "v12_93x480"),
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
_TRAIN = ["data.train.path=shards", "path=VAE"]
_JOINT = ["data.train.videos.path=shards", "data.train.pictures.path=images", "path=VAE"]
PATHS = {
    "v10": [*_TRAIN, "text.path=T5"],
    "v11": [*_JOINT, "text.path=T5"],
    "v12": [*_TRAIN, "text.path=T5"],
    "v13": [*_TRAIN, "text.path=T5"],
    "v15": [*_TRAIN, "text.tokens.path=T5", "text.pooled.path=CLIP"],
}
# Averaging, text dropout, text tokens, objective, clipping, parameters of the denoisers
SHARED: dict[str, tuple[Any, ...]] = {
    "v10": (0.999, 0.0, 300, "Epsilon", "NormClipping", {1_057_246_880}),
    "v11": (0.999, 0.0, 300, "Epsilon", "NormClipping", {1_057_246_880}),
    "v12": (0.999, 0.1, 512, "Epsilon", "NormClipping", {2_771_907_856, 2_782_603_024}),
    "v13": (0.9999, 0.1, 512, "Velocity", "AbnormalDrop", {2_771_981_600, 2_782_713_632}),
    "v15": (0.9999, 0.1, 512, "Flow", "AdaptiveClipping", {8_504_661_120, 8_391_396_480}),
}
FAMILIES = {"v12": CrossTransformer, "v13": CrossTransformer, "v15": JointTransformer} | dict.fromkeys(
    ("v10", "v11"), LatteTransformer
)
# Latent frames, rows of tokens and divisors of positions of those of v1.0 and v1.1, and images beside each clip
LATTE: dict[str, tuple[int, int, list[float], int]] = {
    "v10_stage1": (5, 16, [1.0, 1.0, 1.0], 4),
    "v10_stage2": (17, 16, [3.0, 1.0, 1.0], 4),
    "v10_stage3": (17, 32, [3.0, 1.0, 1.0], 16),
    "v11_stage1": (17, 32, [1.0, 1.0, 1.0], 4),
    "v11_stage2": (56, 32, [3.0, 1.0, 1.0], 4),
}


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
    here = {path.stem for path in (config_folder() / "experiment").glob("v1?_*.yaml")}
    assert here == {*RECIPES, "v10_shared", "v12_shared", "v13_shared"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    shape, fps, steps, lr, batch, masks, denoiser, before = RECIPES[name]
    cfg = composed(name, *PATHS[name[:3]])
    averaging, dropout, tokens, objective, clipping, sizes = SHARED[name[:3]]
    assert cfg.name == name
    assert (cfg.clip.frames, cfg.clip.height, cfg.clip.width) == shape
    assert (cfg.clip.fps, cfg.clip.stride) == (fps, 1)
    assert cfg.trainer.max_steps == steps
    warmup = 500 if name[:3] == "v12" and name != "v12_i2v" else 0
    assert (cfg.module.lr, cfg.module.warmup_steps) == (lr, warmup)
    assert cfg.global_batch == batch
    assert batch % (8 * cfg.data.batch_size) == 0
    assert cfg.denoiser == composed(name, f"denoiser={denoiser}").denoiser
    assert (cfg.after, cfg.start_from) == (before, None)
    assert (cfg.module.ema_decay, cfg.module.text_dropout, cfg.module.recompute_every) == (averaging, dropout, 1)
    assert (cfg.module.weight_decay, list(cfg.module.betas)) == (0.01, [0.9, 0.999])
    assert (cfg.trainer.precision, cfg.trainer.devices) == ("bf16-mixed", -1)
    assert cfg.module.masks == masks
    if masks is not None:
        assert find_mix(masks) is MIXES[masks]
    if masks in SAMPLES:
        assert 0 <= batch * steps - SAMPLES[masks] * 1_000_000 < batch
        assert cfg.module.image_text
    assert type(instantiate(cfg.objective)).__name__ == objective
    assert type(instantiate(cfg.clipping)).__name__ == clipping
    text = cfg.text if name[:3] != "v15" else cfg.text.tokens
    assert (text.max_tokens, cfg.denoiser.text_channels) == (tokens, text.channels)
    assert sum(value.numel() for value in model(cfg).parameters()) in sizes


@pytest.mark.parametrize("name", [name for name in RECIPES if name[:3] in ("v10", "v11", "v12")])
def test_a_recipe_before_v13_has_its_own_objective_positions_and_images(name: str) -> None:
    cfg = composed(name, *PATHS[name[:3]])
    objective, denoiser = instantiate(cfg.objective), model(cfg)
    frames, height, _ = RECIPES[name][0]
    if name[:3] == "v12":
        assert (objective.min_snr, objective.offset_noise, objective.learned_variance) == (5.0, 0.02, False)
        assert list(denoiser.config.position_scale) == ([1.0, 1.5, 2.0] if height == 720 else [1.0, 1.0, 1.0])
        assert (cfg.seed, cfg.text.cleaning) == (10, "twice")
        if name == "v12_i2v":
            assert cfg.module.condition_noise is False
            assert cfg.module.dropped_text == "The video showcases a scene with coherent and clear visuals."
        return
    assert objective.learned_variance
    assert objective.min_snr is None
    latent, rows, scale, images = LATTE[name]
    c = denoiser.config
    assert (c.frames, c.native_rows, list(c.position_scale)) == (latent, rows, scale)
    assert (c.frames, c.native_rows) == (1 + (frames - 1) // 4, height // 16)
    if name[:3] == "v10":
        assert (cfg.module.joint_images, cfg.data.train.flip) == (images, True)
    else:
        videos, pictures = cfg.data.train.videos, cfg.data.train.pictures
        assert (cfg.data.train.images, videos.flip, pictures.flip) == (images, False, False)
    assert cfg.text.cleaning == "twice_no_cjk"


def test_latte_goes_on_with_longer_and_larger_clips(tmp_path: Path) -> None:
    small = {"channels": 4, "out_channels": 8, "heads": 1, "head_dim": 8, "text_channels": 8, "pairs": 1}
    before = LatteTransformer(**small, frames=2, native_rows=2, position_scale=[1.0, 1.0, 1.0])
    save_pretrained(before, tmp_path)
    later = LatteTransformer(**small, frames=3, native_rows=4, position_scale=[3.0, 1.0, 1.0])
    weights = open_start(tmp_path, later, None).denoiser
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in weights.items())
    assert weights.keys() == later.state_dict().keys()


def test_the_page_of_recipes_says_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    published = page[: page.index("## Batch and devices")]
    rows = {line.split("`")[1]: line for line in published.splitlines() if line.startswith("| `v1")}
    assert list(rows) == list(RECIPES)
    for name, ((frames, height, width), fps, steps, lr, batch, masks, _, _) in RECIPES.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert f"{steps:,}" in rows[name]
        if masks not in SAMPLES:
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


@pytest.mark.parametrize("name", [name for name in RECIPES if name[:3] not in ("v10", "v11")])
def test_a_recipe_gives_clips_their_shapes(name: str) -> None:
    cfg = composed(name, "data.train.path=shards")
    rule = instantiate(cfg.data.train.rule)
    assert cfg.data.val.rule == cfg.data.train.rule
    v15 = name.startswith("v15")
    assert (rule.time_stride, rule.space_stride, rule.patch_size) == ((8, 8, 2) if v15 else (4, 8, 2))
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
    if name.startswith("v13") and "stage1" not in name and name != "v13_stage3":
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
    assert isinstance(now, FAMILIES[name[:3]])
    old, new = ({key: value.shape for key, value in one.state_dict().items()} for one in (before, now))
    assert old.items() <= new.items()
    added = {key.split(".")[0] for key in new.keys() - old.keys()}  # parts that start without effect
    assert added == {
        "v12_i2v": {"condition_patches"},
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
        assert set(cfg.data.train) == {"_target_", "path", "patch_size", "where"}
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
