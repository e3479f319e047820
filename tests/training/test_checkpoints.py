"""Checkpoints are read back as they were written, or refused in one line, whatever they say."""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from osp.conditioning import WordText
from osp.data.media.encode import write_video
from osp.denoiser import CrossTransformer
from osp.errors import OspError
from osp.training.checkpoints import load_generator, load_trained_vae
from osp.vae import WFVAE, LatentCodec
from osp.weights import WeightImportError, load_pretrained, save_pretrained

SIZES = {"encoder_flow_channels": 4, "decoder_flow_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
SETTINGS = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 12, "text_channels": 8, "stages": [{"blocks": 2}]}


def new_vae() -> WFVAE:
    torch.manual_seed(1)
    return WFVAE(latent_channels=4, base_channels=4, attention=False, **SIZES).eval()


def averaged(module: nn.Module, part: str = "") -> dict[str, Any]:
    return {f"ema.model.{part}{key}": value for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def vae_state() -> dict[str, Any]:
    vae = new_vae()
    return {"state_dict": averaged(vae), "vae_settings": vae.settings, "global_step": 1}


@pytest.fixture(scope="module")
def denoiser_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(2)
    denoiser, text = CrossTransformer(**SETTINGS), WordText(8, None, layers=1, heads=2)
    folder = tmp_path_factory.mktemp("vae")
    save_pretrained(new_vae(), folder)
    codec = LatentCodec(new_vae(), 0.1, 2.0)
    return {
        "state_dict": averaged(denoiser, "denoiser.") | averaged(text, "text."),
        "generator": {
            "denoiser": {"model": "CrossTransformer", "settings": denoiser.settings},
            "text": {"encoder": "WordText", "settings": text.settings},
            "objective": {"name": "Flow", "settings": {"shift": 1.0}},
            "latent": codec.identity() | {"origin": str(folder)},
            "fps": 8.0,
            "clip": {"frames": 5, "height": 16, "width": 16},
        },
        "global_step": 1,
    }


OTHERS = (None, "x", [1], {}, -1, 0, True, 1e30, float("nan"), 10**30, ((1,),))
PART = 23  # one of so many mutations is tried, another one at each place


def mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each place in plain values, with each other value."""
    if path:
        yield from ((path, other) for other in OTHERS)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from mutations(one, (*path, key))


def changed(value: dict[str, Any], path: tuple[Any, ...], other: Any) -> dict[str, Any]:
    whole = copy.deepcopy(value)
    inner: Any = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other
    return whole


def check_mutations(state: dict[str, Any], entry: str, load: Callable[[Path], Any], path: Path) -> int:
    """Write each mutation of an entry, and read it; gives how many were refused."""
    told: list[str] = []
    for place, other in islice(mutations({entry: state[entry]}), 0, None, PART):
        torch.save(state | changed({entry: state[entry]}, place, other), path)
        try:  # any other error is a traceback, which fails the test
            load(path)
        except OspError as error:
            told.append(str(error))
    assert not any("\n" in line for line in told)
    return len(told)


def test_whatever_a_checkpoint_says_of_its_generator_is_read_or_refused(
    denoiser_state: dict[str, Any], tmp_path: Path
) -> None:
    assert check_mutations(denoiser_state, "generator", load_generator, tmp_path / "a.ckpt") > 8


def test_whatever_a_checkpoint_says_of_its_vae_is_read_or_refused(vae_state: dict[str, Any], tmp_path: Path) -> None:
    assert check_mutations(vae_state, "vae_settings", load_trained_vae, tmp_path / "a.ckpt") > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_channels": 1 << 15}, "does not fit the model"),
        ({"encoder_blocks": 10**7}, "encoder_blocks: is a number of more than"),
        ({"encoder_blocks": 1 << 20}, "many more tensors than the file holds"),
    ],
)
def test_a_model_is_not_built_larger_than_its_file(
    change: dict[str, Any], message: str, vae_state: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(vae_state | {"vae_settings": vae_state["vae_settings"] | change}, tmp_path / "a.ckpt")
    with pytest.raises(OspError, match=message):
        load_trained_vae(tmp_path / "a.ckpt")


def test_weights_in_half_precision_become_float32(vae_state: dict[str, Any], tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {key: value.to(dtype) for key, value in vae_state["state_dict"].items()}
        torch.save(vae_state | {"state_dict": weights}, tmp_path / "a.ckpt")
        vae = load_trained_vae(tmp_path / "a.ckpt")
        assert {value.dtype for value in vae.state_dict().values()} == {torch.float32}
        assert torch.isfinite(vae.encode(torch.zeros(1, 3, 5, 16, 16)).mean).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    dtype: torch.dtype, vae_state: dict[str, Any], tmp_path: Path
) -> None:
    weights = {key: value.to(dtype) for key, value in vae_state["state_dict"].items()}
    torch.save(vae_state | {"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(WeightImportError, match=r"a\.ckpt: .* is torch\.\w+, where floating-point weights belong"):
        load_trained_vae(tmp_path / "a.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_key(
    value: float, vae_state: dict[str, Any], denoiser_state: dict[str, Any], tmp_path: Path
) -> None:
    for state, load, key in (
        (vae_state, load_trained_vae, "encoder.conv_out.bias"),
        (denoiser_state, load_generator, "denoiser.out.bias"),
    ):
        weights = {name: one.clone() for name, one in state["state_dict"].items()}
        weights[f"ema.model.{key}"][0] = value
        torch.save(state | {"state_dict": weights}, tmp_path / "a.ckpt")
        name = key.removeprefix("denoiser.")
        with pytest.raises(WeightImportError, match=rf"a\.ckpt: {name} holds numbers that are not finite"):
            load(tmp_path / "a.ckpt")  # type: ignore[operator]


def flips(path: Path, load: Callable[[], Any], content: Callable[[Any], Any], count: int) -> None:
    """Flip bits of a file: it is refused in one line, or what is read is the same."""
    whole = path.read_bytes()
    expected = content(load())
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(8 * len(whole), (count,), generator=generator).tolist():
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        with suppress(OspError):
            loaded = content(load())
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[key], value) for key, value in expected.items()), at
    path.write_bytes(whole)


def test_no_flipped_bit_of_a_checkpoint_or_a_folder_goes_unnoticed(vae_state: dict[str, Any], tmp_path: Path) -> None:
    def content(vae: Any) -> dict[str, Any]:
        return {**vae.state_dict(), "settings": torch.tensor([hash(repr((vae.settings, vae.scaling)))])}

    torch.save(vae_state, tmp_path / "a.ckpt")
    flips(tmp_path / "a.ckpt", lambda: load_trained_vae(tmp_path / "a.ckpt"), content, 30)
    save_pretrained(new_vae(), tmp_path / "folder", {"scale": 0.5})
    for name in ("model.safetensors", "config.json"):
        flips(tmp_path / "folder" / name, lambda: load_pretrained(tmp_path / "folder"), content, 15)


def test_the_quick_start_makes_a_video(denoiser_state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(denoiser_state, tmp_path / "last.ckpt")
    generator = load_generator(tmp_path / "last.ckpt")
    video = generator.generate("a red circle slides left", seeds=0, solver="euler")
    write_video(tmp_path / "circle.mp4", video[0], generator.fps)
    assert video.shape == (1, 3, 5, 16, 16)
    assert (tmp_path / "circle.mp4").stat().st_size > 0
    assert torch.equal(video, generator.generate(["a red circle slides left"], 5, 16, 16, seeds=[0]))
    with pytest.raises(WeightImportError, match=r"last\.ckpt: is a file.*load_generator"):
        load_pretrained(tmp_path / "last.ckpt")
