"""Published checkpoints become our models and come back unchanged."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from osp.errors import UsageError
from osp.vae import WFVAE, CausalVideoVAE
from osp.vae.wavelet import EXACT_SCALE_3D, PUBLISHED_SCALE_3D
from osp.weights import WeightImportError, load_published, published_settings, save_published, to_published
from osp.weights.published import open_published

MANIFESTS = Path(__file__).parent.parent / "golden" / "manifests"
Case = tuple[str, dict, dict[str, Tensor]]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], value) for key, value in b.items())


def test_every_published_kind_has_a_recorded_model(kinds_without_a_case: set[str]) -> None:
    assert not kinds_without_a_case


def test_published_to_ours_to_published_is_the_identity(case: Case) -> None:
    kind, config, weights = case
    model = load_published(kind, weights, config)
    further = open_published(kind, weights, config).further_settings
    assert not model.training
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    back = to_published(model, kind)
    assert equal(back, weights)
    assert equal(to_published(model), weights)
    settings = published_settings(model, kind)
    assert {key: (further | settings)[key] for key in config} == config
    again = load_published(kind, back, settings)
    assert again.settings == model.settings
    assert equal(again.state_dict(), model.state_dict())


WF = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 6}
CAUSAL = {"base_channels": 32, "blocks": 1}
OWN = [
    ("wfvae_v13", WFVAE, {**WF, "level1": "2d"}),
    ("wfvae_v15", WFVAE, {**WF, "level1": "3d", "attention": False, "haar_scale": PUBLISHED_SCALE_3D}),
    (
        "wfvae_v13",
        WFVAE,
        {**WF, "base_channels": 32, "encoder_flow_channels": 32, "decoder_flow_channels": 32, "norm": "group"},
    ),
    ("causalvae", CausalVideoVAE, CAUSAL),
    ("causalvae", CausalVideoVAE, {**CAUSAL, "conv_in": "2d", "encoder_attention": "mixed", "norm": "layer"}),
    (
        "causalvae",
        CausalVideoVAE,
        {
            **CAUSAL,
            "multipliers": (1, 2),
            "encoder_blocks": ("2d", "2d"),
            "encoder_resize": ("frame", "space_time"),
            "encoder_time": ("none", "mixed"),
            "decoder_blocks": ("2d", "3d"),
            "decoder_resize": ("frame", "space_time"),
            "decoder_time": ("mixed", "none"),
            "decoder_attention": "mixed",
        },
    ),
]


@pytest.mark.parametrize(("kind", "model", "settings"), OWN)
def test_ours_to_published_to_ours_is_the_identity(kind: str, model: type, settings: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = model(**settings).eval()
    save_published(vae, tmp_path, {"use_tiling": True})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] in ("WFVAEModel", "CausalVAEModel")
    scaling = {"scale": [1.0] * vae.latent_channels, "shift": [0.0] * vae.latent_channels}
    further = open_published(kind, tmp_path).further_settings
    further.pop("vae_scale_factor", None)
    assert further == {"use_tiling": True} | scaling
    again = load_published(kind, tmp_path)
    assert again.settings == vae.settings
    assert equal(again.state_dict(), vae.state_dict())
    frozen = {key for key, value in vae.named_parameters() if not value.requires_grad}
    assert {key for key, value in again.named_parameters() if not value.requires_grad} == frozen


def test_the_settings_say_what_filters_the_weights_hold(small: Case) -> None:
    kind, config, weights = small
    assert load_published(kind, weights, config).settings["haar_scale"] == PUBLISHED_SCALE_3D
    own = WFVAE(**{**load_published(kind, weights, config).settings, "haar_scale": EXACT_SCALE_3D})
    vae = load_published(kind, to_published(own), config)
    assert vae.settings["haar_scale"] == EXACT_SCALE_3D
    assert torch.equal(vae.encoder.wavelet_in.filters, own.encoder.wavelet_in.filters)
    halved = load_published(kind, {key: value.half() for key, value in weights.items()}, config)
    again = WFVAE(**halved.settings)
    assert torch.equal(again.encoder.wavelet_in.filters, halved.encoder.wavelet_in.filters)


def test_half_precision_becomes_float32_and_nothing_is_shared(small: Case) -> None:
    kind, config, weights = small
    halves = {key: value.to(torch.bfloat16) for key, value in weights.items()}
    loaded = load_published(kind, halves, config).state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    vae = load_published(kind, weights, config)
    with torch.no_grad():
        for value in vae.state_dict().values():
            value.zero_()
    assert any(value.abs().sum() > 0 for value in weights.values())


@pytest.mark.parametrize("layout", ["folder", "file", "shards", "training"])
def test_weights_load_from_wherever_they_are(layout: str, small: Case, tmp_path: Path) -> None:
    kind, config, weights = small
    source = tmp_path
    if layout == "folder":
        save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    elif layout == "file":
        save_file(weights, source := tmp_path / "weights.safetensors")
    elif layout == "training":
        torch.save({"ema_state_dict": {f"module.{key}": v for key, v in weights.items()}}, tmp_path / "checkpoint.ckpt")
    else:
        half = len(weights) // 2
        parts = dict(list(weights.items())[:half]), dict(list(weights.items())[half:])
        names = {key: f"{i}.safetensors" for i, part in enumerate(parts) for key in part}
        for i, part in enumerate(parts):
            save_file(part, tmp_path / f"{i}.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WFVAEModel", **config}))
    vae = load_published(kind, source)
    assert equal(to_published(vae), weights)
    assert vae.settings == load_published(kind, weights, config).settings


FULL_SIZE = {
    "causalvae_defaults_4x8x8_4ch": "causalvae",
    "causalvae_v1_0_release": "causalvae",
    "causalvae_v1_1_release": "causalvae",
    "odvae_v1_2_4x8x8_4ch": "causalvae",
    "odvae_v1_2_release": "causalvae",
    "wfvae_large_16ch": "wfvae_v13",
    "wfvae_v1_3_4x8x8_4ch": "wfvae_v13",
    "wfvae_v1_3_4x8x8_8ch": "wfvae_v13",
    "wfvae_v1_5_8x8x8_32ch": "wfvae_v15",
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_checkpoint_without_config_is_recognised(name: str) -> None:
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    weights = {key: torch.ones(()).expand(shape) for key, shape in manifest["keys"].items()}  # takes no memory
    del weights["encoder.conv_out.conv.bias"]
    with pytest.raises(WeightImportError, match=r"full-size settings.*1 missing: encoder\.conv_out\.conv\.bias$"):
        load_published(FULL_SIZE[name], weights)


@pytest.mark.parametrize(
    ("name", "times", "attention"),
    [
        ("causalvae_v1_0_release", ("plain", "plain", "none", "none"), "mixed"),
        ("causalvae_v1_1_release", ("none", "mixed", "mixed", "none"), "frame"),
        ("odvae_v1_2_release", ("none", "none", "none", "none"), "frame"),
    ],
)
def test_what_the_keys_of_earlier_vaes_do_not_say_is_what_was_released(
    name: str, times: tuple[str, ...], attention: str
) -> None:
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    weights = {key: torch.ones(()).expand(shape) for key, shape in manifest["keys"].items()}
    model = open_published("causalvae", weights).model
    assert model.config.encoder_time == times
    assert (model.config.encoder_attention, model.config.decoder_attention) == (attention, attention)
    assert model.settings == open_published("causalvae", weights, manifest["config"]).model.settings


@pytest.mark.parametrize("form", ["safetensors", "torch", "wrapped", "averaged"])
def test_the_loss_in_a_file_of_an_earlier_vae_is_left_out(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = CausalVideoVAE(**CAUSAL, encoder_time=("none", "mixed", "mixed", "none"))
    weights = to_published(vae)
    further = weights | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4)}
    (tmp_path / "config.json").write_text(json.dumps(published_settings(vae) | {"in_channels": 3, "out_channels": 3}))
    if form == "safetensors":
        save_file(further, tmp_path / "diffusion_pytorch_model.safetensors")
    elif form == "torch":
        torch.save(further, tmp_path / "pytorch_model.bin")
    elif form == "wrapped":
        torch.save({"state_dict": further, "epoch": 3}, tmp_path / "last.ckpt")
    else:
        last = {key: torch.zeros_like(value) for key, value in further.items()}
        averaged = {f"module.{key}": value for key, value in further.items()}
        content = {
            "ema_state_dict": averaged,
            "state_dict": {"gen_model": last, "dics_model": {"main.0.bias": torch.ones(1)}},
        }
        torch.save(content, tmp_path / "checkpoint-7.ckpt")
    again = load_published("causalvae", tmp_path)
    assert equal(to_published(again), weights)


def test_a_checkpoint_without_averages_gives_its_generator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = CausalVideoVAE(**CAUSAL)
    weights = to_published(vae)
    content = {"ema_state_dict": {}, "state_dict": {"gen_model": weights, "dics_model": {"main.0.bias": torch.ones(1)}}}
    torch.save(content, tmp_path / "checkpoint-7.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(published_settings(vae)))
    assert equal(to_published(load_published("causalvae", tmp_path)), weights)


def test_what_a_configuration_says_beyond_the_shape_is_kept(small: Case) -> None:
    kind, config, weights = small
    further = {"scale": [0.5] * 4, "shift": [0.0] * 4, "use_tiling": True}
    imported = open_published(kind, weights, config | further | {"_diffusers_version": "0.30"})
    assert imported.further_settings == further


def test_keys_that_do_not_fit_are_listed_with_the_file(small: Case, tmp_path: Path) -> None:
    kind, config, weights = small
    wrong = dict(weights)
    wrong["encoder.extra.weight"] = torch.zeros(1)
    wrong["decoder.conv_out.bias"] = torch.zeros(7)
    del wrong["encoder.conv_out.conv.weight"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(WeightImportError) as caught:
        load_published(kind, tmp_path / "wrong.safetensors", config)
    said = str(caught.value)
    assert said.startswith(str(tmp_path / "wrong.safetensors"))
    for part in (
        "1 missing: encoder.conv_out.conv.weight",
        "1 unknown: encoder.extra.weight",
        "decoder.conv_out.bias ((7,)",
    ):
        assert part in said
    with pytest.raises(WeightImportError, match="does not fit the model"):
        load_published("causalvae", tmp_path / "wrong.safetensors")


WRONG_SETTINGS = [
    ("wfvae_v13", {"latent_dims": 4}, "no setting latent_dims; it has"),
    ("wfvae_v13", {"latent_dim": "4"}, "latent_channels=4: must be a whole number"),
    ("wfvae_v13", {"norm_type": "batchnorm"}, "norm_type='batchnorm': is not known"),
    ("wfvae_v13", {"l1_upsample_block": "Upsampler"}, "no published WF-VAE has these blocks"),
    ("causalvae", {"hidden_sise": 4}, "no setting hidden_sise; it has"),
    ("causalvae", {"attn_resolutions": [16]}, r"attn_resolutions=\[16\] is of no published CausalVideoVAE"),
    ("causalvae", {"q_conv": "Conv2d"}, "q_conv='Conv2d'"),
    ("causalvae", {"in_channels": 1}, "in_channels=1 is of no published CausalVideoVAE; all have 3"),
    ("causalvae", {"encoder_resnet_blocks": ["ResnetBlock4D"]}, "encoder_resnet_blocks='ResnetBlock4D': is not known"),
    ("causalvae", {"encoder_temporal_downsample": None}, "these settings make no CausalVideoVAE"),
    ("causalvae", {"hidden_size_mult": [1, 2, 4, 4, 4]}, "one entry a level"),
    ("causalvae", {"hidden_size": 33}, "multiples of 32"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), WRONG_SETTINGS)
def test_settings_that_no_published_model_has_are_refused(
    kind: str, settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^config: .*{message}"):
        load_published(kind, {"a": torch.ones(1)}, settings)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=f"^{tmp_path / 'config.json'}: .*{message}"):
        load_published(kind, tmp_path)


def test_settings_with_one_value_only_are_accepted() -> None:
    one_value = {
        "attn_resolutions": [],
        "double_z": True,
        "q_conv": "CausalConv3d",
        "encoder_mid_resnet": "ResnetBlock3D",
    }
    idle = {"_class_name": "CausalVAEModel", "resolution": 256, "lr": 1e-5, "loss_params": {"kl_weight": 1e-6}}
    with pytest.raises(WeightImportError, match="does not fit the model"):
        load_published("causalvae", {"a": torch.ones(1)}, {"hidden_size": 32, **one_value, **idle})


def test_other_kinds_and_models_are_refused() -> None:
    with pytest.raises(UsageError, match="kind=wfvae: is not known; choose wfvae_v13, wfvae_v15, causalvae"):
        load_published("wfvae", {})
    with pytest.raises(UsageError, match="no published form of a Linear"):
        to_published(torch.nn.Linear(1, 1))
