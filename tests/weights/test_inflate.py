"""An image VAE's weights in a video VAE: for one frame it is the image VAE."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from osp.errors import UsageError
from osp.vae import CausalVideoVAE
from osp.weights import WeightImportError
from osp.weights.inflate import inflated

WEIGHTS = "diffusion_pytorch_model.safetensors"
KERNELS = ("tail", "centre", "average")
SHARED: dict[str, Any] = {"base_channels": 32, "multipliers": (1, 2, 1, 1), "blocks": 1}
FLAT = {"conv_in": "2d", "encoder_blocks": ("2d", "2d", "3d", "3d")}
NONE = ("none",) * 4
SHAPES: dict[str, dict[str, Any]] = {
    "v1.0": {
        "encoder_time": ("plain", "plain", "none", "none"),
        "encoder_attention": "mixed",
        "decoder_attention": "mixed",
    },
    "v1.1": {
        **FLAT,
        "encoder_resize": ("frame", "frame", "frame", "none"),
        "encoder_time": ("none", "mixed", "mixed", "none"),
        "decoder_time": ("none", "none", "mixed", "mixed"),
    },
    "v1.2": {
        **FLAT,
        "encoder_resize": ("frame", "space_time", "space_time", "none"),
        "encoder_time": NONE,
        "decoder_resize": ("none", "space", "space_time", "space_time"),
        "decoder_time": NONE,
    },
}


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderKL, Path]:
    """A tiny image VAE whose weights are all drawn, norms too, and its folder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 64, 32, 32],
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    with torch.no_grad():
        for value in vae.parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("image")
    vae.save_pretrained(folder)
    return vae.double(), folder


def video_vae(shape: str, source: Path, kernels: str, **settings: Any) -> CausalVideoVAE:
    torch.manual_seed(1)
    vae = CausalVideoVAE(**{**SHARED, **SHAPES[shape], **settings}).eval()
    vae.load_state_dict(dict(inflated(vae, source, kernels).weights))
    return vae


def clip(frames: int) -> Tensor:
    return torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(2)).double() * 2 - 1


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_one_frame_is_encoded_and_decoded_as_by_the_image_vae(
    shape: str, kernels: str, image_vae: tuple[AutoencoderKL, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, folder = image_vae
    vae = video_vae(shape, folder, kernels).double()
    if shape == "v1.1":
        for name, value in vae.named_parameters():
            if name.endswith("mix_factor"):
                assert value.item() == 2.0
                value.fill_(100.0)  # the new convolutions, which no image VAE has, count for nothing
    video = clip(1)
    theirs = image.encode(video[:, :, 0]).latent_dist
    ours = vae.encode(video)
    torch.testing.assert_close(ours.mean[:, :, 0], theirs.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logvar[:, :, 0], theirs.logvar, rtol=0, atol=1e-5)
    if shape == "v1.2":
        # Its upsamplers of time and space interpolate, where image VAEs repeat pixels.
        for level in (1, 2):
            upsampler = image.decoder.up_blocks[level - 1].upsamplers[0]
            monkeypatch.setattr(upsampler, "forward", _interpolating(upsampler))
    expected = image.decode(theirs.mean).sample
    torch.testing.assert_close(vae.decode(ours.mean)[:, :, 0], expected, rtol=0, atol=1e-5)


def _interpolating(upsampler: torch.nn.Module) -> Any:
    def forward(x: Tensor, *args: Any, **more: Any) -> Tensor:
        return upsampler.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))

    return forward


@pytest.mark.parametrize(
    ("kernels", "branches", "frames"),
    # In the middle tap each convolution sees one frame earlier, so that residual branches, of two, blur what the main
    # path sees: the frames are those of the main path alone.
    [("tail", 1, (0, 4, 8, 12)), ("centre", 0, (0, 0, 1, 5)), ("average", 1, (0, 0, 0, 0))],
)
@torch.no_grad()
def test_latent_frames_are_those_of_the_frames_that_the_kernels_see(
    kernels: str, branches: int, frames: tuple[int, ...], image_vae: tuple[AutoencoderKL, Path], tmp_path: Path
) -> None:
    weights = load_file(image_vae[1] / WEIGHTS)
    quiet = {key: value * branches if ".conv2." in key else value for key, value in weights.items()}
    save_file(quiet, tmp_path / WEIGHTS)
    shutil.copy(image_vae[1] / "config.json", tmp_path)
    vae, video = video_vae("v1.2", tmp_path, kernels).double(), clip(13)
    alone = torch.cat([vae.encode(video[:, :, i : i + 1]).mean for i in range(13)], dim=2)
    latent = vae.encode(video).mean
    apart = (latent[:, :, :, None] - alone[:, :, None]).square().mean(dim=(0, 1, 4, 5))
    assert tuple(apart.argmin(dim=1).tolist()) == frames


@pytest.mark.parametrize("names", ["former", "first", "wrapped"])
def test_former_names_and_forms_of_the_same_weights_are_read(
    names: str, image_vae: tuple[AutoencoderKL, Path], tmp_path: Path
) -> None:
    weights = load_file(image_vae[1] / WEIGHTS)
    expected = video_vae("v1.2", image_vae[1], "tail").state_dict()
    renamed = {}
    for key, value in weights.items():
        new = key
        if names == "former":
            for present, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                new = new.replace(present, former)
            if new != key and value.ndim == 2:
                value = value[:, :, None, None]  # they were convolutions once
        elif names == "first":
            new = first_name(key)
        renamed[new] = value.contiguous()
    if names == "wrapped":
        torch.save({"state_dict": renamed}, tmp_path / "model.ckpt")
    else:
        save_file(renamed, tmp_path / WEIGHTS)
    shutil.copy(image_vae[1] / "config.json", tmp_path)
    found = video_vae("v1.2", tmp_path, "tail").state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def first_name(key: str) -> str:
    """A key of diffusers in latent diffusion's own names."""
    for pattern, theirs in (
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.to_(q|k|v)", r"attn_1.\1"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        key = re.sub(pattern, theirs, key)
    return key


def test_what_an_image_vae_does_not_have_stays_as_it_was_drawn(image_vae: tuple[AutoencoderKL, Path]) -> None:
    torch.manual_seed(5)
    vae = CausalVideoVAE(**SHARED, **SHAPES["v1.1"])
    made = inflated(vae, image_vae[1])
    assert {key.partition(".time.0.")[2] for key in made.drawn} == {"mix_factor", "conv.weight", "conv.bias"}
    assert len(made.drawn) == 12
    assert all(torch.equal(made.weights[key], vae.state_dict()[key]) for key in made.drawn)
    assert inflated(CausalVideoVAE(**SHARED, **SHAPES["v1.0"]), image_vae[1]).drawn == ()


def test_what_does_not_fit_is_refused(image_vae: tuple[AutoencoderKL, Path], tmp_path: Path) -> None:
    folder = image_vae[1]
    small = CausalVideoVAE(**SHARED)
    with pytest.raises(UsageError, match="kernels=head: is not known"):
        inflated(small, folder, "head")
    with pytest.raises(UsageError, match="norm=layer: an image VAE has group norms"):
        inflated(CausalVideoVAE(**SHARED, norm="layer"), folder)
    with pytest.raises(WeightImportError, match=r"64 missing: encoder\.down_blocks\.0\.resnets\.1\.norm1\.weight"):
        inflated(CausalVideoVAE(**{**SHARED, "blocks": 2}), folder)
    with pytest.raises(WeightImportError, match=r"of another shape: .*vae\.base_channels"):
        inflated(CausalVideoVAE(**{**SHARED, "base_channels": 64}), folder)
    with pytest.raises(WeightImportError, match=r"config\.json: no such file"):
        inflated(small, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, told in (
        ({"_class_name": "UNet2DModel"}, "is of UNet2DModel, where diffusers' AutoencoderKL is wanted"),
        ({"norm_num_groups": 8}, "norm_num_groups=8: must be 32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightImportError, match=told):
            inflated(small, tmp_path)
