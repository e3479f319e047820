"""The operations of the full-size denoisers in one forward pass, sparse and dense: `python tools/denoiser_flops.py`.

The table is counted, not measured (`osp.denoiser.flops`). The speed-ups are those of the operations alone, at the same
rate; `osp bench target=denoiser` measures. For orientation, the published ones of sparse against dense: v1.3, k=4, a
step of 93x720p in 42 s instead of 100 s and of 93x480p in 8 s instead of 15 s (2.4x and 1.9x); v1.5 at 121x576x1024
more than 35 % in all and more than 45 % in attention.
"""

import argparse

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from osp.cli import config_folder
from osp.data.media.shape import Strides
from osp.denoiser import Stage
from osp.denoiser.flops import DenoiserFlops, denoiser_flops

# Configuration -> frames to a latent frame of the VAE it goes with; all VAEs have 8 pixels to a side.
MODELS = {"opensora_v12": 4, "opensora_v13": 4, "suv_v15": 8, "mmdit_v15": 8}


def main() -> None:
    """Print one row for each size and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    sizes = ["93x480x640", "93x720x1280", "121x576x1024"]
    parser.add_argument("--videos", nargs="+", default=sizes, metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--text-tokens", type=int, default=512)
    args = parser.parse_args()

    heads: tuple[str, ...] = ("video", "denoiser", "latent", "tokens", "dense TFLOP", "of it attention", "sparse TFLOP")
    heads += ("of it attention", "speed-up in all", "of attention")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for video in args.videos:
        frames, height, width = map(int, video.split("x"))
        for name in args.models:
            latent = Strides(MODELS[name], 8).latent(frames, height, width)
            sparse, dense = count(name, latent, args.text_tokens)
            tokens = latent[0] * (latent[1] // 2) * (latent[2] // 2)
            cells = [video, name, "x".join(map(str, latent)), f"{tokens:,}", *described(dense)]
            cells += ["-"] * 4 if sparse == dense else described(sparse)
            if sparse != dense:
                cells += [f"{dense.forward / sparse.forward:.2f}x", f"{dense.attention / sparse.attention:.2f}x"]
            print(f"| {' | '.join(cells)} |", flush=True)


def count(name: str, latent: tuple[int, int, int], text: int) -> tuple[DenoiserFlops, DenoiserFlops]:
    """The operations of a configuration's model, and of the same model with dense attention in all blocks."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"), torch.device("meta"):
        model = instantiate(compose("bench", ["bench/target=denoiser", f"denoiser={name}"]).denoiser)
        dense = type(model)(**(model.settings | {"stages": [Stage(stage.blocks) for stage in model.stages]}))
    return denoiser_flops(model, latent, text), denoiser_flops(dense, latent, text)


def described(flops: DenoiserFlops) -> list[str]:
    """TFLOP, and the share of the patterns' attention."""
    return [f"{flops.forward / 1e12:,.1f}", f"{flops.attention_share:.0%}"]


if __name__ == "__main__":
    main()
