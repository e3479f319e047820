"""Prompt -> video: text encoder, denoiser with guidance and a solver, VAE."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Self

import torch
from torch import Tensor

from osp.conditioning import (
    Condition,
    ConditionInputs,
    EncodedText,
    TextEncoder,
    call_denoiser,
    denoiser_inputs,
    frame_channels,
    given_frames,
)
from osp.conditioning.text import LengthCheck
from osp.data.media.shape import Shape
from osp.denoiser import Denoiser, Grid
from osp.diffusion import Objective, Progress, Solver, draw_normal, guided_prediction, held_prediction, sample
from osp.errors import UsageError
from osp.sampling.decoding import decode_in_pieces
from osp.sampling.defaults import GUIDANCE, default_solver
from osp.sampling.offload import offloaded
from osp.vae import LatentCodec


class VideoGenerator:
    """What makes videos of prompts: a denoiser, and all that it was trained with.

    Args:
        denoiser: with condition channels it is an inpainting model, which frames may be given to.
        text: encoder of the prompts.
        objective: what the denoiser predicts.
        codec: the VAE, and the scaling of its latents.
        fps: frames a second of the videos that it was trained on.
        clip: their `frames`, `height` and `width`, if known.

    It works on `device`, at first the denoiser's; `to` chooses another. The parts move there when they are needed.
    Raises UsageError for parts that do not fit together.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        text: TextEncoder,
        objective: Objective,
        codec: LatentCodec,
        fps: float = 8.0,
        clip: Mapping[str, int] | None = None,
    ) -> None:
        self.denoiser, self.text, self.objective, self.codec, self.fps = denoiser, text, objective, codec, fps
        self.clip = None if clip is None else {key: int(clip[key]) for key in ("frames", "height", "width")}
        self.device = denoiser.out.weight.device
        self._check_parts()

    def _check_parts(self) -> None:
        config, channels = self.denoiser.config, self.codec.latent_channels
        if config.channels != channels or config.out_channels != channels:
            raise UsageError(
                f"the denoiser takes latents of {config.channels} channels and gives {config.out_channels}, and those "
                f"of the VAE ({self.codec.name}) have {channels}; give the VAE that it was trained with"
            )
        if self.denoiser.text_channels != self.text.channels:
            raise UsageError(
                f"the denoiser reads text {self.denoiser.text_channels} wide, and the text encoder ({self.text.name}) "
                f"gives {self.text.channels}; give the one that it was trained with"
            )
        if self.denoiser.pooled_channels not in (None, self.text.pooled_channels):
            raise UsageError(
                f"the denoiser reads pooled text {self.denoiser.pooled_channels} wide, and the text encoder "
                f"({self.text.name}) gives {self.text.pooled_channels or 'none'}; give the one that it was trained with"
            )
        conditions = self.denoiser.latent_channels - config.channels
        if conditions and tuple(config.frame_channels) != frame_channels(self.codec):
            raise UsageError(
                f"the denoiser's frame_channels={list(config.frame_channels)} are not those of given frames "
                f"with this VAE, {list(frame_channels(self.codec))}"
            )

    @property
    def takes_frames(self) -> bool:
        """Whether frames may be given beside the prompt."""
        return self.denoiser.latent_channels > self.denoiser.config.channels

    def to(self, device: torch.device | str) -> Self:
        """Work on this device from now on."""
        self.device = torch.device(device)
        return self

    def check_size(self, frames: int, height: int, width: int) -> Grid:
        """The grid of tokens of such a video. Raises UsageError naming the nearest sizes that fit, if it does not."""
        stride = self.codec.time_stride
        if frames < 1 or (frames - 1) % stride:
            below = 1 + max(0, frames - 1) // stride * stride
            near = f"{below} or {below + stride}" if frames > 1 else "1"
            raise UsageError(f"frames={frames}: use {near} (1 + a multiple of {stride}, the VAE's stride)")
        patch = self.codec.space_stride * self.denoiser.patch_size
        for name, side in (("height", height), ("width", width)):
            if side < patch or side % patch:
                below = max(patch, side // patch * patch)
                near = f"{below} or {below + patch}" if side > patch else f"{patch}"
                raise UsageError(f"{name}={side}: use {near} (a multiple of {patch}, the VAE's stride times the patch)")
        steps = 1 + (frames - 1) // stride
        return Grid(steps, height // patch, width // patch)

    def check(
        self,
        prompts: Sequence[str],
        frames: int,
        height: int,
        width: int,
        *,
        seeds: Sequence[int],
        solver: Solver | None = None,
        guidance: float = GUIDANCE,
        rescale: float = 0.0,
        negative_prompt: str = "",
        given: Condition | None = None,
    ) -> None:
        """Raise UsageError for what `generate` would refuse, before anything is computed."""
        grid = self.check_size(frames, height, width)
        if not prompts or len(prompts) != len(seeds):
            raise UsageError(f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one, and a seed for each")
        for prompt in prompts:
            if not prompt.strip():
                raise UsageError("the prompt is empty; say what the video should show")
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise UsageError(f"seed={seed} makes no sense; it must be a whole number from 0 to 2^63 - 1")
        read = [*prompts, negative_prompt]
        LengthCheck(self.text.name, self.text.max_tokens)(read, self.text.count_tokens(read), strict=True)
        if not 0 <= guidance < math.inf:
            raise UsageError(f"guidance={guidance} makes no sense; it must be a number from 0 (1: none)")
        if not 0 <= rescale <= 1:
            raise UsageError(f"rescale={rescale} makes no sense; it must lie between 0 and 1")
        if solver is not None:
            if solver.objective != self.objective:
                raise UsageError(f"the solver is for {solver.objective}, and the denoiser learned {self.objective}")
            solver.start(grid.height * grid.width)
        if given is None:
            return
        if not self.takes_frames:
            raise UsageError(
                "frames are given, but this denoiser was not trained with any; sample with mode=text, or with an "
                "inpainting model"
            )
        given.check(Shape(frames, height, width), len(prompts))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        frames: int,
        height: int,
        width: int,
        *,
        seeds: Sequence[int],
        solver: Solver | None = None,
        guidance: float = GUIDANCE,
        rescale: float = 0.0,
        negative_prompt: str = "",
        given: Condition | None = None,
        hold_given: bool = True,
        together: bool = True,
        low_memory: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """Videos `B 3 T H W` in [-1, 1] of prompts, float32 on the CPU; each depends on its prompt and its seed only.

        Args:
            prompts, seeds: one for each video.
            frames, height, width: of each; see `check_size`.
            solver: None: `default_solver`.
            guidance, rescale: see `osp.diffusion.guided`; 1 is none.
            negative_prompt: what guidance leads away from.
            given: frames that are kept, the same for all videos or some for each; for inpainting models, of which
                None means that all frames are to be generated.
            hold_given: the latent frames that the given ones make up, from the first on without a gap, come out as they
                are; without it they are as the model has learnt to copy them, as published.
            together: one call of the model with and without the prompt, or two of half the size.
            low_memory: each part is on the device only while it works; of the denoiser one block after another, unless
                the device is the CPU, where weights stay where they are; guidance takes two calls; videos are decoded
                one by one, in pieces. They are the same but for the last bits.
            progress: called after each call of the model.

        Raises UsageError as `check`.
        """
        solver = default_solver(self.objective) if solver is None else solver
        self.check(
            prompts,
            frames,
            height,
            width,
            seeds=seeds,
            solver=solver,
            guidance=guidance,
            rescale=rescale,
            negative_prompt=negative_prompt,
            given=given,
        )
        texts = self._encode([*prompts, negative_prompt], low_memory)
        conditions: tuple[ConditionInputs | None, ConditionInputs | None] = (None, None)
        if self.takes_frames:
            given = given_frames({}, frames, height, width) if given is None else given
            conditions = self._conditions(given, len(prompts), low_memory)
        wanted, without = map(partial(denoiser_inputs, self.denoiser), texts, conditions)
        offloads = low_memory and self.device.type != "cpu"
        if not offloads:
            self.denoiser.to(self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = self.codec.latent_shape(frames, height, width)
        with offloaded(self.denoiser, self.device) if offloads else nullcontext():
            predict = guided_prediction(
                partial(call_denoiser, self.denoiser),
                wanted,
                without,
                scale=guidance,
                rescale=rescale,
                together=together and not low_memory,
            )
            held = conditions[0]
            if hold_given and held is not None and held.clean is not None and held.known is not None:
                predict = held_prediction(predict, self.objective, held.clean, held.known)
            # The solver's state is float32, whatever the weights are.
            noise = draw_normal((len(prompts), *shape), generators, self.device)
            tokens = shape[2] * shape[3] // self.denoiser.patch_size**2
            latent = sample(predict, noise, solver, generators, tokens=tokens, callback=progress)
        return self._decode(latent, frames, low_memory)

    def _encode(self, prompts: Sequence[str], low_memory: bool) -> tuple[EncodedText, EncodedText]:
        """The text of all prompts but the last, and as often that of the last."""
        self.text.to(self.device)
        encoded = self.text(prompts, strict=True)
        if low_memory:
            self.text.to("cpu")
        encoded = encoded.to(self.device)
        length, last = encoded.text.shape[1], len(prompts) - 1
        # Padded to one length, so that they make one batch.
        return (
            encoded[:last].padded(length),
            encoded[torch.full((last,), last, device=self.device)].padded(length),
        )

    def _conditions(self, given: Condition, batch: int, low_memory: bool) -> tuple[ConditionInputs, ConditionInputs]:
        """What the calls with and without the prompt are given."""
        self.codec.to(self.device)
        wanted = without = given.encode(self.codec).expanded(batch)
        if given.guided:
            without = given.without().encode(self.codec).expanded(batch)
        if low_memory:
            self.codec.to("cpu")
        return wanted, without

    def _decode(self, latent: Tensor, frames: int, low_memory: bool) -> Tensor:
        self.codec.to(self.device)
        if not low_memory:
            return self.codec.decode(latent, frames).cpu()
        video = decode_in_pieces(self.codec, latent, frames)
        self.codec.to("cpu")
        return video
