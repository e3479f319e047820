"""Operations of one forward pass of denoisers, sparse and dense: `python tools/denoiser_flops.py [denoiser=NAME ...]`.

Settings are those of `osp bench target=denoiser`, for one denoiser: any of conf/denoiser, with other stages as in
'denoiser.stages=[{blocks: 32, pattern: mine}]', where imports=[my_patterns] is the module that registers the pattern.
Without settings the table has the full-size models.

The table is counted, not measured (`osp.denoiser.flops`). The speed-ups are those of the operations alone, at the same
rate; `osp bench target=denoiser` measures. For orientation, the published ones of sparse against dense: v1.3, k=4, a
step of 93x720p in 42 s instead of 100 s and of 93x480p in 8 s instead of 15 s (2.4x and 1.9x); v1.5 at 121x576x1024
more than 35 % in all and more than 45 % in attention.
"""

import argparse
import json
import math
from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from osp.benchmark.denoiser import denoiser_shape
from osp.benchmark.models import ModelSource
from osp.checks import check_number
from osp.cli import config_folder, user_error
from osp.cli.plain import instantiate
from osp.data.media.shape import Strides
from osp.denoiser import Denoiser, Stage
from osp.denoiser.flops import DenoiserFlops, denoiser_flops
from osp.errors import UsageError
from osp.extensions import import_modules

# Configuration -> frames to a latent frame of the VAE it goes with; all VAEs have 8 pixels to a side.
MODELS = {"opensora_v12": 4, "opensora_v13": 4, "suv_v15": 8, "mmdit_v15": 8}


def main() -> None:
    """Print one row for each size and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of one denoiser, as for `osp bench`")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="of conf/denoiser")
    sizes = ["93x480x640", "93x720x1280", "121x576x1024"]
    parser.add_argument("--videos", nargs="+", default=sizes, metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--text-tokens", type=int, default=512)
    frames = "frames to a latent frame of the VAE; default: 8 for the models of v1.5, 4 for others"
    parser.add_argument("--latent-frame", type=int, metavar="FRAMES", help=frames)
    args = parser.parse_intermixed_args()
    try:
        print_table(args)
    except Exception as error:
        if (told := user_error(error, "bench")) is None:
            raise
        parser.exit(told.exit_code, f"denoiser_flops: {told}\n")


def print_table(args: argparse.Namespace) -> None:
    """Raises UsageError for settings and sizes that no denoiser takes."""
    check_number("--text-tokens", args.text_tokens, 1, whole=True)
    check_number("--latent-frame", args.latent_frame, 1, whole=True, null="that of the model")
    videos = {video: parsed_size(video) for video in args.videos}
    given = [args.settings] if args.settings else [[f"denoiser={name}"] for name in args.models]
    models = dict(denoiser_of(settings) for settings in given)
    heads: tuple[str, ...] = ("video", "denoiser", "latent", "tokens", "dense TFLOP", "of it attention", "sparse TFLOP")
    heads += ("of it attention", "speed-up in all", "of attention")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for video, size in videos.items():
        for name, model in models.items():
            latent = Strides(args.latent_frame or MODELS.get(name, 4), 8).latent(*size)
            sparse, dense = count(model, latent, args.text_tokens)
            tokens = math.prod(latent) // model.patch_size**2
            cells = [video, name, "x".join(map(str, latent)), f"{tokens:,}", *described(dense)]
            cells += ["-"] * 4 if sparse == dense else described(sparse)
            if sparse != dense:
                cells += [f"{dense.forward / sparse.forward:.2f}x", f"{dense.attention / sparse.attention:.2f}x"]
            print(f"| {' | '.join(cells)} |", flush=True)


def parsed_size(video: str) -> tuple[int, int, int]:
    """The numbers of FRAMESxHEIGHTxWIDTH. Raises UsageError where there are no three of them."""
    sides = video.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UsageError(f"--videos {video}: must be FRAMESxHEIGHTxWIDTH, for example 93x480x640")
    frames, height, width = map(int, sides)
    return frames, height, width


def denoiser_of(settings: Sequence[str]) -> tuple[str, Denoiser]:
    """The name of a denoiser that settings of `osp bench` choose, and the denoiser without memory for its weights."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("bench", ["bench/target=denoiser", *settings], return_hydra_config=True)
    name = str(cfg.hydra.runtime.choices.denoiser)
    if missing := sorted(OmegaConf.missing_keys(cfg.denoiser)):
        raise UsageError(f"denoiser={name} needs {' and '.join(f'{key}=...' for key in missing)}")
    config = OmegaConf.to_container(cfg.denoiser, resolve=True)
    import_modules(cfg.imports)
    return name, denoiser_shape(ModelSource(name, json.dumps(config), instantiate))


def count(model: Denoiser, latent: tuple[int, int, int], text: int) -> tuple[DenoiserFlops, DenoiserFlops]:
    """Operations of a denoiser, and of the same one with dense attention in all blocks."""
    with torch.device("meta"):
        dense = type(model)(**(model.settings | {"stages": [Stage(stage.blocks) for stage in model.stages]}))
    return denoiser_flops(model, latent, text), denoiser_flops(dense, latent, text)


def described(flops: DenoiserFlops) -> list[str]:
    """TFLOP, and the share of the patterns' attention."""
    return [f"{flops.forward / 1e12:,.1f}", f"{flops.attention_share:.0%}"]


if __name__ == "__main__":
    main()
