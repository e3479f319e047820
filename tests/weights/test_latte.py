"""Published Latte weights: settings of both versions, the buffer that nothing reads, and export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.audit.case import Case
from osp.denoiser import LatteTransformer
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

GOLDEN = Path(__file__).parent.parent / "golden"
UNUSED = "caption_projection.y_embedding"
CASES = [(kind, path.stem) for kind in ("latte_v10", "latte_v11") for path in sorted((GOLDEN / kind).glob("*.json"))]


def recorded(kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    case = Case(kind, name, GOLDEN / kind)
    return case.below("weights/"), dict(case.settings["config"])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_weights_and_settings_come_back_as_they_were(kind: str, name: str, tmp_path: Path) -> None:
    weights, config = recorded(kind, name)
    save_pretrained(load_published(kind, weights, config), tmp_path / "ours")
    model = load_pretrained(tmp_path / "ours")
    written = save_published(model, tmp_path / "theirs", kind=kind)
    assert written["_class_name"] == "LatteT2V"
    again = load_published(kind, tmp_path / "theirs")
    for back in (to_published(model), to_published(model, kind), to_published(again)):
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], value) for key, value in weights.items())
    shaping = {key: value for key, value in config.items() if key in written}
    assert shaping == {key: written[key] for key in shaping}
    not_shaping = {"attention_mode", "num_embeds_ada_norm", "model_max_length"}
    assert config.keys() - shaping.keys() <= not_shaping
    assert again.settings == model.settings


def test_the_buffer_that_nothing_reads_may_be_missing_and_is_written_all_the_same() -> None:
    weights, config = recorded("latte_v10", "b_interp")
    without = {key: value for key, value in weights.items() if key != UNUSED}
    model = load_published("latte_v10", without, config)
    assert not model.unused_text.any()
    assert {key: tuple(value.shape) for key, value in to_published(model).items()} == {
        key: tuple(value.shape) for key, value in weights.items()
    }
    with pytest.raises(WeightImportError, match=f"of another shape: {UNUSED}"):
        load_published("latte_v10", weights | {UNUSED: weights[UNUSED][:1]}, config)
    with pytest.raises(WeightImportError, match="1 missing: scale_shift_table"):
        load_published(
            "latte_v10", {key: value for key, value in without.items() if key != "scale_shift_table"}, config
        )


SCALES = [("latte_v10", 5, 1), ("latte_v10", 17, 3), ("latte_v10", 4, 1), ("latte_v11", 17, 1), ("latte_v11", 56, 3)]
SCALES += [("latte_v11", 33, 2), ("latte_v11", 31, 1), ("latte_v11", 5, 1)]


@pytest.mark.parametrize(("kind", "frames", "scale"), SCALES)
def test_time_positions_of_both_versions(kind: str, frames: int, scale: int) -> None:
    _, config = recorded("latte_v10", "b_interp")
    with torch.device("meta"):
        model = load_published(kind, meta_weights(), config | {"video_length": frames, "num_layers": 1})
    assert model.config.position_scale == (float(scale), 2.0, 2.0)
    assert published_settings(model, kind)["video_length"] == frames


def meta_weights() -> dict[str, Tensor]:
    """Weights of one pair of blocks for the settings of the recorded case."""
    weights, _ = recorded("latte_v10", "b_interp")
    return {key: value for key, value in weights.items() if ".1." not in key}


def test_a_scale_of_ones_own_is_that_of_v11s_setting() -> None:
    _, config = recorded("latte_v11", "b_interp")
    model = load_published("latte_v11", meta_weights(), config | {"num_layers": 1, "interpolation_scale_1d": 5})
    assert model.config.position_scale[0] == 5.0
    assert published_settings(model)["interpolation_scale_1d"] == 5
    with pytest.raises(UsageError, match="divides the positions of 34 frames by 6, and rotates none; export it as"):
        published_settings(model, "latte_v10")
    with pytest.raises(UsageError, match=r"kind=opensora_v13: is of CrossTransformer; choose latte_v10, latte_v11"):
        published_settings(model, "opensora_v13")


def test_the_version_follows_from_time_positions_where_no_kind_is_given() -> None:
    with torch.device("meta"):
        v10, v11 = LatteTransformer(), LatteTransformer(position_scale=(1.0, 1.0, 1.0))
    assert "use_rope" not in published_settings(v10)
    assert published_settings(v11)["interpolation_scale_1d"] is None
    with torch.device("meta"), pytest.raises(UsageError, match="divides rows and columns by 1 for native_rows=32"):
        published_settings(LatteTransformer(position_scale=(3.0, 2.0, 2.0)))


WRONG = [
    ("latte_v10", {"use_rope": True}, "a published denoiser of v1.0 has no setting use_rope"),
    ("latte_v11", {"compress_kv_factor": 2}, "compress_kv_factor=2 is of no published denoiser of v1.1; all have 1"),
    ("latte_v10", {"sample_size": 32}, "sample_size=32: must be two numbers, rows and columns of the latent"),
    ("latte_v10", {"video_length": 0}, "video_length=0: must be a whole number"),
    ("latte_v10", {"cross_attention_dim": 5}, "cross_attention_dim=5: must be heads x head_dim, 1152"),
    ("latte_v11", {"interpolation_scale_1d": 0}, "interpolation_scale_1d=0: must be a number above 0"),
    ("latte_v10", {"norm_type": "layer_norm"}, "norm_type='layer_norm' is of no published denoiser of v1.0"),
    ("latte_v10", {"attention_head_dim": 73, "num_attention_heads": 1}, "positions need a width that 4 divides"),
]


@pytest.mark.parametrize(("kind", "config", "message"), WRONG)
def test_impossible_settings_are_refused(kind: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_published(kind, {}, config)
