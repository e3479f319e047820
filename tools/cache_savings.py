"""The savings of training on features, against encoding every clip in every step: `python tools/cache_savings.py`.

Measures one training step of a denoiser of v1.3 (forward and backward pass in bfloat16, AdamW in float32) twice, each
in a process of its own: on raw clips, which a frozen VAE and a frozen T5 encode in the step, and on what they would
have given. Reading files is left out of both, since loaders read ahead. Published for the 2.7 billion parameters of
v1.3 on 8 A800: about 30 % less time and 20 % less memory.

The default sizes suit a CPU: the VAE is that of v1.3 whole, denoiser and T5 have about 1/36 of their parameters, so
that the two keep their proportion. The published sizes: `--heads 24 --blocks 32 --text-width 4096 --text-layers 24
--checkpoint-every 1 --device cuda --frames 93 --height 352 --width 640`.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from osp.cli import config_folder
from osp.conditioning import EncodedText, T5Text
from osp.data.media.video import to_float
from osp.denoiser import CrossTransformer, Stage
from osp.devices import PeakMemory, choose_device, describe_device, synchronize
from osp.diffusion import Velocity, draw_normal, squared_error
from osp.vae import LatentCodec, VideoVAE

CASES = ("raw clips", "features")


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured."""

    device: str
    batch: int
    frames: int
    height: int
    width: int
    heads: int
    blocks: int
    recompute_every: int
    text_width: int
    text_layers: int
    text_tokens: int
    repeats: int
    threads: int


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"batch": 1, "frames": 17, "height": 128, "width": 128, "heads": 8, "blocks": 8, "recompute_every": 0}
    defaults |= {"text_width": 1024, "text_layers": 12, "text_tokens": 128, "repeats": 10}
    defaults["threads"] = torch.get_num_threads()
    parser.add_argument("--device", default="auto")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    sizes = Sizes(**vars(parser.parse_args()))
    device = choose_device(sizes.device)
    torch.set_num_threads(sizes.threads)

    load = os.getloadavg()[0]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        save_text_encoder(Path(folder), sizes)
        for case in CASES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                results.append(pool.submit(measure, case, sizes, folder).result())

    print("| step on | s/step | peak memory, GiB | parameters |\n|---|---|---|---|")
    for case, result in zip(CASES, results, strict=True):
        print(f"| {case} | {result['seconds']:.2f} | {result['peak'] / 2**30:.2f} | {result['parameters']} |")
    raw, features = results
    changes = [f"{features[key] / raw[key] - 1:+.0%}" for key in ("seconds", "peak")]
    print(f"| change (published: -30 %, -20 %) | {changes[0]} | {changes[1]} | |\n")
    shape = f"{sizes.batch} x {sizes.frames}x{sizes.height}x{sizes.width}"
    print(f"{shape} -> latent {raw['latent']}; {sizes.text_tokens} text tokens; bfloat16 (autocast), AdamW in float32;")
    print(f"{describe_device(device)}; torch {torch.__version__}; memory: {PeakMemory(device).how};")
    print(f"load average before: {load:.2f}; {asdict(sizes)}")


def measure(case: str, sizes: Sizes, text_folder: str) -> dict[str, Any]:
    """Median seconds of a step, peak memory in bytes, the latent's shape, and how large the models are."""
    torch.set_num_threads(sizes.threads)
    torch.manual_seed(0)
    device = choose_device(sizes.device)
    stages = [Stage(1), Stage(sizes.blocks - 2, "skiparse", 4), Stage(1)]
    denoiser = CrossTransformer(heads=sizes.heads, text_channels=sizes.text_width, stages=stages).to(device)
    denoiser.recompute_every = sizes.recompute_every
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5)
    parts: dict[str, torch.nn.Module] = {"denoiser": denoiser}
    if case == "raw clips":
        codec = LatentCodec(make_vae(), scale=0.18215).to(device)
        text = T5Text(text_folder, max_tokens=sizes.text_tokens).to(device)
        parts |= {"VAE": codec.vae, "T5": text.model}
        video = torch.randint(256, (sizes.batch, 3, sizes.frames, sizes.height, sizes.width), dtype=torch.uint8)
        prompts = ["x" * (sizes.text_tokens - 1)] * sizes.batch  # a token each, and one for the end

        def inputs() -> tuple[Tensor, EncodedText]:
            return codec.encode(to_float(video.to(device))), text(prompts)
    else:
        with torch.device("meta"):
            shape = LatentCodec(make_vae(), scale=0.18215).latent_shape(sizes.frames, sizes.height, sizes.width)
        stored = torch.randn(sizes.batch, *shape)
        words = torch.randn(sizes.batch, sizes.text_tokens, sizes.text_width, dtype=torch.bfloat16)

        def inputs() -> tuple[Tensor, EncodedText]:
            mask = torch.ones(words.shape[:2], dtype=torch.bool, device=device)
            return stored.to(device), EncodedText(words.to(device), mask)

    objective = Velocity()

    def step() -> tuple[int, ...]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            latent, encoded = inputs()
            instant = objective.sample_time(len(latent)).to(device)
            noise = draw_normal(latent.shape, None, device)
            noisy = objective.corrupt(latent, noise, instant)
            prediction = denoiser(noisy, instant, encoded.text, encoded.mask)
        errors, values = squared_error(prediction, objective.target(latent, noise, instant), objective.weight(instant))
        (errors.sum() / values.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return tuple(latent.shape)

    seconds = []
    latent_shape = step()  # the optimiser makes its state
    with PeakMemory(device) as memory:
        for _ in range(sizes.repeats):
            synchronize(device)
            begun = time.perf_counter()
            step()
            synchronize(device)
            seconds.append(time.perf_counter() - begun)
    counts = {name: sum(weight.numel() for weight in model.parameters()) / 1e6 for name, model in parts.items()}
    return {
        "seconds": statistics.median(seconds),
        "peak": memory.peak,
        "latent": "x".join(map(str, latent_shape)),
        "parameters": ", ".join(f"{name} {count:,.0f} M" for name, count in counts.items()),
    }


def make_vae() -> VideoVAE:
    """The VAE of v1.3 with random weights."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        vae: VideoVAE = instantiate(compose("bench", ["vae=wfvae_v13_8ch"]).vae)
    return vae


def save_text_encoder(folder: Path, sizes: Sizes) -> None:
    """A T5 of that size with random weights, whose tokens are bytes."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    width = sizes.text_width
    shape: dict[str, Any] = {"d_model": width, "d_kv": 64, "d_ff": 5 * width // 2, "num_heads": width // 64}
    config = T5Config(**shape, num_layers=sizes.text_layers, vocab_size=384, feed_forward_proj="gated-gelu")
    model: Any = T5EncoderModel(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
