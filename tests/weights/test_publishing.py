"""Folders for the published code: what its classes can hold, the files they take, and the lines that load them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from osp.denoiser import CrossTransformer, JointTransformer, Stage
from osp.errors import UsageError
from osp.vae import WFVAE, CausalVideoVAE
from osp.weights import causalvae, load_published, published_settings, save_published, to_published
from osp.weights.families import find_kind
from osp.weights.layout import MERGED, TORCH
from osp.weights.publishing import WEIGHTS, loading_lines

JOINT: dict[str, Any] = {
    "channels": 4,
    "out_channels": 4,
    "heads": 2,
    "head_dim": 16,
    "text_channels": 12,
    "pooled_channels": 8,
    "modulation_width": 16,
}


def joint(*stages: Stage, long_skips: bool = True) -> JointTransformer:
    torch.manual_seed(3)
    model = JointTransformer(stages, **JOINT, long_skips=long_skips).eval()
    with torch.no_grad():  # a new model gives zeros
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


@torch.no_grad()
def predicted(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latent, text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 4, 6), (2, 5, 12), (2, 8)))
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return model(latent, torch.tensor([100.0, 700.0]), text, mask, pooled_text=pooled)


@pytest.mark.parametrize(
    ("stages", "written", "sparsities"),
    [
        ([Stage(8)], [2, 4, 2], [1, 1, 1]),
        ([Stage(6)], [2, 2, 2], [1, 1, 1]),
        ([Stage(3), Stage(5)], [2, 4, 2], [1, 1, 1]),
        ([Stage(2), Stage(6, "skiparse", 2)], [2, 2, 4], [1, 2, 2]),
        ([Stage(2), Stage(2, "skiparse", 2), Stage(2)], [2, 2, 2], [1, 2, 1]),
    ],
)
def test_stages_without_skips_are_shared_out_anew_and_compute_the_same(
    stages: list[Stage], written: list[int], sparsities: list[int], tmp_path: Path
) -> None:
    model = joint(*stages, long_skips=False)
    settings = save_published(model, tmp_path)
    assert (settings["num_layers"], settings["sparse_n"]) == (written, sparsities)
    assert settings["skip_connection"] is False
    again = load_published("ummdit_v15", tmp_path)
    torch.testing.assert_close(predicted(again), predicted(model), rtol=0, atol=1e-5)
    for stage, size in enumerate(written):
        assert f"transformer_blocks.{stage}.{size - 1}.attn1.to_q.weight" in to_published(model)


def test_one_dense_stage_has_no_skip_however_it_was_built() -> None:
    assert published_settings(joint(Stage(8)))["skip_connection"] is False


def test_long_skips_are_written_with_the_stages_they_lead_between(tmp_path: Path) -> None:
    model = joint(Stage(2), Stage(2, "skiparse", 2), Stage(2))
    settings = save_published(model, tmp_path)
    assert (settings["num_layers"], settings["skip_connection"]) == ([2, 2, 2], True)
    torch.testing.assert_close(predicted(load_published("ummdit_v15", tmp_path)), predicted(model), rtol=0, atol=1e-5)


def said(*sizes: tuple[int, int]) -> str:
    """The stages that a refusal names, of blocks and k."""
    stages = (f"{{blocks: {blocks}, pattern: {'skiparse' if k > 1 else 'dense'}, k: {k}}}" for blocks, k in sizes)
    return f"the nearest are [{', '.join(stages)}]"


@pytest.mark.parametrize(
    ("stages", "long_skips", "nearest"),
    [
        ([Stage(7)], False, said((2, 1), (4, 1), (2, 1))),
        ([Stage(4)], False, said((2, 1), (2, 1), (2, 1))),
        ([Stage(2), Stage(2, "skiparse", 2)], False, said((2, 1), (2, 1), (2, 2))),
        ([Stage(1), Stage(2, "skiparse", 2), Stage(1)], True, said((2, 1), (2, 2), (2, 1))),
        ([Stage(2), Stage(2, "skiparse", 2)], True, said((2, 1), (2, 1), (2, 2))),
        ([Stage(2), Stage(3, "skiparse", 2), Stage(2)], True, said((2, 1), (4, 2), (2, 1))),
    ],
)
def test_stages_that_the_published_code_lacks_are_refused_with_the_nearest(
    stages: list[Stage], long_skips: bool, nearest: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = JointTransformer(stages, **JOINT, long_skips=long_skips)
    for refused in (
        lambda: to_published(model),
        lambda: published_settings(model),
        lambda: save_published(model, tmp_path / "new"),
    ):
        with pytest.raises(UsageError) as caught:
            refused()
        assert nearest in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


WF = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 6}
SMALL = {"hidden_size": 32, "hidden_size_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def causal(version: str, **settings: Any) -> CausalVideoVAE:
    """A small VAE of the structure of v1.0 or v1.2."""
    sizes = find_kind("causalvae")[1].full_sizes[0 if version == "v10" else -1]
    return causalvae.build({**sizes, **SMALL, **settings}).eval()


TORCH_FILES = [
    (WFVAE(**WF), MERGED, ["state_dict"]),
    (WFVAE(**WF, level1="3d"), MERGED, ["state_dict"]),
    (causal("v12"), MERGED, ["state_dict", "gen_model"]),
    (joint(Stage(2), Stage(2), Stage(2)), TORCH, []),
]


def test_every_torch_file_reads_with_weights_only_and_holds_the_published_tensors(tmp_path: Path) -> None:
    for number, (model, name, within) in enumerate(TORCH_FILES):
        folder = tmp_path / str(number)
        save_published(model, folder)
        content = torch.load(folder / name, weights_only=True)
        for key in within:
            assert [*content] == [key]
            content = content[key]
        published = to_published(model)
        assert content.keys() == published.keys()
        assert all(torch.equal(value, published[key]) for key, value in content.items())
        assert {one.name for one in folder.iterdir()} == {"config.json", WEIGHTS, name}


SAME_IN_CAUSAL = {"double_z", "dropout", "q_conv"}
# What the recorded models of toy size say of the size of their latents, and of attention.
NOT_SHAPING = {"sample_size", "sample_size_h", "sample_size_w", "sample_size_t", "attention_mode"}


@pytest.mark.parametrize(
    ("kind", "case", "beside"),
    [
        ("wfvae_v13", "a_main", {"scale", "shift"}),
        ("wfvae_v15", "a", {"scale", "shift", "vae_scale_factor"}),
        ("causalvae", "a_v12", {"scale", "shift", "attn_resolutions", "decoder_resnet_blocks", *SAME_IN_CAUSAL}),
        ("latte_v10", "a_released_shape", {"norm_num_groups"}),
        ("latte_v11", "a_released_shape", {"norm_num_groups", "rope_scaling_type", "interpolation_scale_1d"}),
        ("opensora_v12", "a_released_shape", {"norm_num_groups"}),
        ("opensora_inpaint_v12", "d_inpaint", {"norm_num_groups"}),
        ("opensora_v13", "a_32l", set()),
        ("opensora_inpaint_v13", "a_6l", set()),
        ("ummdit_v15", "a_n2", set()),
    ],
)
def test_a_configuration_has_all_settings_of_the_published_class_and_no_other(
    kind: str, case: str, beside: set[str], load_golden: Any, tmp_path: Path
) -> None:
    config, weights = load_golden(kind, case)
    save_published(load_published(kind, weights, config), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written.pop("_class_name")
    assert written.keys() == {*config, *beside}
    for key in config.keys() - NOT_SHAPING:
        assert written[key] == config[key]
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # diffusers refuses others
        assert {*file.keys()} == {*weights}


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_a_vae_is_written_with_shift_and_scale_of_each_channel(channels: int, tmp_path: Path) -> None:
    vae = WFVAE(**WF | {"latent_channels": channels})
    assert scaling(vae, tmp_path / "new") == ([0.0] * channels, [1.0] * channels)  # one trained from nothing
    vae.scaling = 0.0, 0.18215
    assert scaling(vae, tmp_path / "published") == ([0.0] * channels, [0.18215] * channels)
    vae.scaling = [float(i) for i in range(channels)], [2.0] * channels
    assert scaling(vae, tmp_path / "measured") == ([float(i) for i in range(channels)], [2.0] * channels)


def scaling(vae: WFVAE, folder: Path) -> tuple[list[float], list[float]]:
    """Shift and scale in the configuration, which the import takes too."""
    config = save_published(vae, folder)
    assert load_published("wfvae_v13", folder).scaling == (config["shift"], config["scale"])
    return config["shift"], config["scale"]


def test_a_published_vae_keeps_its_scaling(tmp_path: Path, load_golden: Any) -> None:
    for number, (kind, further, shift, scale) in enumerate(
        (("wfvae_v13", {}, 0.0, 0.18215), ("wfvae_v15", {"scale": [2.0] * 6, "shift": [0.5] * 6}, 0.5, 2.0))
    ):
        config, weights = load_golden(kind, {"wfvae_v13": "b_wfrepo", "wfvae_v15": "a"}[kind])
        vae = load_published(kind, weights, config | further)
        written = save_published(vae, tmp_path / str(number))
        channels = config["latent_dim"]
        assert (written["shift"], written["scale"]) == ([shift] * channels, [scale] * channels)


LINES = [
    (WFVAE(**WF), ['model = WFVAEModel.from_pretrained("F")']),
    (
        WFVAE(**WF, level1="3d"),
        [
            'weights = torch.load("F/merged.ckpt", map_location="cpu", weights_only=True)["state_dict"]',
            "model.load_state_dict(weights)  # a WFVAEModel of v1.5, made with the settings in config.json",
        ],
    ),
    (causal("v10"), ['model = CausalVAEModel.from_pretrained("F", low_cpu_mem_usage=False)']),
    (causal("v12"), ['model = CausalVAEModel.from_pretrained("F")']),
    (CrossTransformer([Stage(2)], heads=1, head_dim=12), ['model = OpenSoraT2V_v1_3.from_pretrained("F")']),
    (
        joint(Stage(8)),
        [
            'settings = {key: value for key, value in json.load(open("F/config.json")).items() if key[0] != "_"}',
            "model = SparseUMMDiT(**settings)",
            'weights = torch.load("F/diffusion_pytorch_model.pt", map_location="cpu", weights_only=True)',
            "model.load_state_dict(weights, strict=False)",
        ],
    ),
]


@pytest.mark.parametrize(("model", "lines"), LINES)
def test_the_lines_that_load_a_folder_name_it_and_its_class(model: nn.Module, lines: list[str]) -> None:
    assert loading_lines(model, "F") == lines


def test_a_folder_of_another_kind_keeps_no_torch_file_of_the_one_before(tmp_path: Path) -> None:
    save_published(WFVAE(**WF), tmp_path)
    (tmp_path / "mine.ckpt").write_bytes(b"precious")
    save_published(CrossTransformer([Stage(2)], heads=1, head_dim=12), tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"config.json", WEIGHTS, "mine.ckpt"}


def test_a_kind_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"kind=ummdit_v15: is of JointTransformer; choose wfvae_v13, wfvae_v15"):
        save_published(WFVAE(**WF), tmp_path, kind="ummdit_v15")
    with pytest.raises(UsageError, match="kind=wfvae: is not known"):
        to_published(WFVAE(**WF), "wfvae")
