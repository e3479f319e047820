"""The full-size denoisers' keys and sizes, and what a checkpoint of one may have besides."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.denoiser import CrossTransformer, JointTransformer, Stage
from osp.errors import UsageError
from osp.weights import (
    WeightImportError,
    load_pretrained,
    load_published,
    published_settings,
    save_pretrained,
    save_published,
    to_published,
)
from osp.weights.families import find_kind

MANIFESTS = Path(__file__).parent.parent / "golden" / "manifests"
# (kind, manifest, keys, parameters), as published
FULL = [
    ("latte_v10", "latte_v10", 968, 1_057_246_880),
    ("latte_v11", "latte_v11", 968, 1_057_246_880),
    ("opensora_v12", "opensora_v12", 687, 2_771_907_856),
    ("opensora_inpaint_v12", "opensora_inpaint_v12", 693, 2_782_603_024),
    ("opensora_v13", "opensora_t2v_v1_3_2b", 687, 2_771_981_600),
    ("opensora_inpaint_v13", "opensora_inpaint_v1_3_2b", 693, 2_782_713_632),
    ("ummdit_v15", "sparse_ummdit_v1_5_tp1", 1178, 8_504_661_120),
    ("ummdit_v15", "sparse_ummdit_v1_5_tpmerged", 1184, 8_589_604_992),
]


@pytest.mark.parametrize(("kind", "name", "keys", "parameters"), FULL)
def test_full_sizes_are_the_published_ones(kind: str, name: str, keys: int, parameters: int) -> None:
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    family, published = find_kind(kind)
    layout = family.layout_of(published)
    for config in (manifest["config"], {}):  # also where no configuration is at hand
        with torch.device("meta"):
            model = published.build({**published.defaults, **config}, {})
        own = {key: list(pair.published_shape) for pair in layout.key_pairs(model) for key in pair.published}
        own_count = sum(value.numel() for value in model.parameters())
        dead = {key: list(shape) for key, shape in layout.ignored(model).items()} if name.endswith("merged") else {}
        assert own | dead == manifest["keys"]
        assert len(own | dead) == keys
        assert own_count + sum(torch.Size(shape).numel() for shape in dead.values()) == parameters


Case = tuple[str, dict, dict[str, Tensor]]


def dead_weights(model: JointTransformer) -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in find_kind("ummdit_v15")[0].layout.ignored(model).items()}


def test_dead_weights_are_left_out(joint: Case) -> None:
    kind, config, weights = joint
    model = load_published(kind, weights, config)
    dead = dead_weights(model)
    assert len(dead) == 6
    merged = load_published(kind, weights | dead, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), merged.parameters(), strict=True))
    key, value = next(iter(dead.items()))
    with pytest.raises(WeightImportError, match=f"of another shape: {key}"):
        load_published(kind, weights | {key: value[:1]}, config)


def test_a_denoiser_in_our_own_form(joint: Case, tmp_path: Path) -> None:
    kind, config, weights = joint
    model = load_published(kind, weights, config)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.settings == model.settings
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "opensora_v13",
        {"norm_eps": 1e-5},
        "norm_eps=1e-05 is of no published text-to-video denoiser of v1.3; all have 1e-06",
    ),
    ("opensora_v13", {"cross_attention_dim": 5}, "cross_attention_dim=5: must be heads x head_dim, 2304"),
    ("opensora_v13", {"vae_scale_factor_t": 4}, "has no setting vae_scale_factor_t; .*is kind=... the right one"),
    ("opensora_v13", {"num_layers": "32"}, "num_layers=32: must be a whole number"),
    ("opensora_v13", {"interpolation_scale_t": 0}, "position_scale=0: must be a number above 0"),
    ("opensora_v13", {"patch_size": 0}, "patch_size=0: must be a whole number"),
    ("opensora_v12", {"use_rope": False}, "use_rope=False is of no published text-to-video denoiser of v1.2; .* True"),
    ("opensora_v12", {"downsampler": "k333_s222"}, "downsampler='k333_s222' is of no published .*; all have None"),
    ("opensora_v12", {"sparse1d": False}, "denoiser of v1.2 has no setting sparse1d; .*is kind=... the right one"),
    (
        "opensora_v12",
        {"interpolation_scale_t": None},
        "interpolation_scale_t=null: sample_size_t=null: must be a whole",
    ),
    (
        "opensora_v12",
        {"interpolation_scale_t": None, "sample_size_t": 24},
        "interpolation_scale_t=null: is not known for an even sample_size_t=24; give a number",
    ),
    ("opensora_v12", {"interpolation_scale_w": None, "sample_size": 60}, r"must be \[rows, columns\], not 60"),
    ("ummdit_v15", {"num_layers": 3}, "num_layers=3: must be a list"),
    ("opensora_v13", {"blocks": 3}, "has no setting blocks; it has"),
    ("ummdit_v15", {"sparse_n": [1, 2]}, "must be as long as each other"),
    ("ummdit_v15", {"sparse_n": [1, 2, 4, 8, 4, 2, 0]}, "k=0: must be a whole number"),
    ("ummdit_v15", {"patch_size_t": 2}, "patch_size_t=2 is of no published denoiser of v1.5; all have 1"),
    ("ummdit_v15", {"head_dim": 24}, "head_dim=24 cannot be split"),
]


@pytest.mark.parametrize(("kind", "config", "message"), WRONG)
def test_impossible_settings_are_refused(kind: str, config: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_published(kind, {}, config)


def test_only_published_schedules_are_exported() -> None:
    with torch.device("meta"):
        with pytest.raises(UsageError, match="one schedule"):
            published_settings(CrossTransformer([Stage(4, "skiparse", 4)]))
        with pytest.raises(UsageError, match="no pattern 2\\+1d"):
            published_settings(JointTransformer([Stage(4, "2+1d")]))


def test_the_code_of_each_version_gets_the_keys_and_the_class_that_it_has(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 12, "text_channels": 8}
    dense, given = CrossTransformer([Stage(2)], **sizes), {"frame_channels": [4, 4]}
    inpaint = CrossTransformer([Stage(2)], **sizes, **given, frame_encoding="v12")
    for model, kind, name in (
        (dense, None, "OpenSoraT2V_v1_3"),
        (dense, "opensora_v12", "OpenSoraT2V"),
        (inpaint, None, "OpenSoraInpaint"),
        (inpaint, "opensora_inpaint_v12", "OpenSoraInpaint"),
    ):
        config = save_published(model, tmp_path / f"{kind} {name}", {"sample_size_t": 8}, kind)
        assert config["_class_name"] == name
        assert config.get("sample_size") == (None if name.endswith("v1_3") else [60, 80])
        assert config["sample_size_t"] == 8
    assert "pos_embed_masked_video.0.proj.weight" in to_published(inpaint)
    for model, kind, message in (
        (
            CrossTransformer([Stage(2, "skiparse", 2)], **sizes),
            "opensora_v12",
            "dense blocks only, not (GroupSkip|SingleSkip)",
        ),
        (
            CrossTransformer([Stage(2)], **sizes, **given),
            "opensora_inpaint_v12",
            "frame_encoding=v13, where it has v12",
        ),
        (inpaint, "opensora_inpaint_v13", "frame_encoding=v12, where it has v13"),
        (dense, "ummdit_v15", "kind=ummdit_v15: is of JointTransformer; choose opensora_v13"),
    ):
        with pytest.raises(UsageError, match=message):
            published_settings(model, kind)


def test_rotary_scales_that_are_left_open_follow_from_the_native_size() -> None:
    _, kind = find_kind("opensora_v12")
    scales = dict.fromkeys(("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w"))
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 1, "sample_size": [90, 160]}
    for frames, scale in ((1, 1), (15, 1), (17, 2), (33, 3)):
        model = kind.build({**kind.defaults, **scales, **sizes, "sample_size_t": frames}, {})
        assert model.config.position_scale == (scale, 3, 4)


@torch.no_grad()
def test_half_precision_is_kept_where_asked_for(joint: Case, tmp_path: Path) -> None:
    kind, config, weights = joint
    half = load_published(kind, weights, config, "bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    save_pretrained(half, tmp_path)
    assert {value.dtype for value in load_pretrained(tmp_path).parameters()} == {torch.float32}
    again = load_pretrained(tmp_path, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), again.parameters(), strict=True))
    for wrong, name in (("int32", "int32"), ("bf16", "bf16"), (torch.int64, "int64")):
        with pytest.raises(UsageError, match=f"dtype={name}: is not known; choose float32"):
            load_published(kind, weights, config, wrong)
