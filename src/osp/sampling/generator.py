"""Prompt -> video in three steps: text encoder, denoiser with guidance and a solver, VAE."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from osp.checks import check_finite, check_number
from osp.conditioning import (
    Condition,
    ConditionInputs,
    EncodedText,
    TextEncoder,
    call_denoiser,
    clean_texts,
    denoiser_inputs,
    frame_channels,
    given_frames,
)
from osp.conditioning.text import LengthCheck
from osp.data.media.shape import Shape
from osp.denoiser import Denoiser, Grid
from osp.diffusion import Objective, Solver, draw_normal, guided_prediction, held_prediction, sample
from osp.diffusion.guidance import Predict
from osp.errors import UsageError
from osp.parallel.exchange import Exchange
from osp.parallel.guidance import branch_prediction, split_sampling
from osp.parallel.tiles import own_tiles
from osp.sampling.decoding import decode_in_pieces
from osp.sampling.defaults import GUIDANCE, named_solver
from osp.sampling.offload import offloaded
from osp.sampling.progress import Progress, Watch, unwatched
from osp.seeds import seeded
from osp.vae import LatentCodec

MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Encoded:
    """The encoded inputs that videos are made from, on the generator's device.

    `text` and `condition` are what is asked for, a row a video; `without_text` and `without_condition` are what
    guidance leads away from, as many rows of the same length. Conditions are None where the denoiser takes none.
    """

    size: Shape
    text: EncodedText
    without_text: EncodedText
    condition: ConditionInputs | None = None
    without_condition: ConditionInputs | None = None


def check_length(denoiser: Denoiser, frames: int, latent_frames: int, time_stride: int) -> None:
    """Raise UsageError for a clip of so many frames where the denoiser takes clips of another length alone."""
    taken = denoiser.clip_frames
    if taken is not None and latent_frames not in (1, taken):
        raise UsageError(
            f"frames={frames}: makes {latent_frames} latent frames, and this denoiser takes {taken}, the length that "
            f"it was trained at; use frames={(taken - 1) * time_stride + 1}, or 1 for an image"
        )


class VideoGenerator:
    """A generator of videos from prompts: a denoiser, and all that it was trained with.

    Args:
        denoiser: with frame channels it is an inpainting model, which frames may be given to.
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
        self._every: Exchange | None = None
        self._branches: Exchange | None = None
        self._check_parts()

    def _check_parts(self) -> None:
        config, channels = self.denoiser.config, self.codec.latent_channels
        if config.channels != channels:
            raise UsageError(
                f"the denoiser takes latents of {config.channels} channels, and those of the VAE ({self.codec.name}) "
                f"have {channels}; give the VAE that it was trained with"
            )
        self.objective.check_channels(channels, config.out_channels)
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

    def share(self, guidance: float) -> Self:
        """Make each video together with all other processes, which are given the same and get the same.

        With guidance an even number is halved: one half predicts with the prompt and the other without. The processes
        of a half share the tokens; all share what is to be decoded: the tiles of each video, where the VAE has a
        `tiling`, else the videos of a batch. Raises UsageError for a denoiser that cannot be split so.
        """
        self._every, self._branches = split_sampling(self.denoiser, self.device, guidance != 1)
        return self

    @property
    def writes(self) -> bool:
        """Whether this process is the one of those that share their videos which writes them."""
        return self._every is None or self._every.rank == 0

    def check_size(self, frames: int, height: int, width: int) -> Grid:
        """The grid of tokens of such a video. Raises UsageError naming the nearest sizes that fit, if it does not."""
        strides = self.codec.strides.patched(self.denoiser.patch_size)
        strides.check_frames(frames)
        strides.check_sides(height, width, "the VAE's stride times the patch")
        grid = Grid(*strides.latent(frames, height, width))
        check_length(self.denoiser, frames, grid.frames, strides.time)
        return grid

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
        self._check_prompts(prompts, negative_prompt)
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(prompts)} prompts and {len(seeds)} seeds: give a seed for each prompt")
        for seed in seeds:
            check_number("seed", seed, 0, MOST_SEED, whole=True)
        check_number("guidance", guidance, 0)
        check_number("rescale", rescale, 0, 1)
        if solver is not None:
            if solver.objective != self.objective:
                raise UsageError(f"the solver is for {solver.objective}, and the denoiser learned {self.objective}")
            solver.start(grid.height * grid.width)
        if given is not None:
            self._check_given(given, Shape(frames, height, width), len(prompts))

    def _seeds(self, seeds: Any, videos: int) -> list[int]:
        """A seed for each video; one number stands for all of them."""
        if isinstance(seeds, int):
            return [seeds] * videos
        if isinstance(seeds, str) or not isinstance(seeds, Sequence):
            raise UsageError(f"seeds={seeds}: must be a whole number, or a list with one for each prompt")
        return list(seeds)

    def _size(self, *given: int | None) -> tuple[int, int, int]:
        """Frames, height and width, where None is that of the training clips."""
        trained = self.clip or {}
        sides = ("frames", "height", "width")
        size = [trained.get(side) if value is None else value for side, value in zip(sides, given, strict=True)]
        for side, value in zip(sides, size, strict=True):
            if value is None:
                raise UsageError(f"{side}: is to be given, as it is not known what clips the denoiser was trained on")
        return size[0], size[1], size[2]  # type: ignore[return-value]

    def read(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as the text encoder reads them, after its cleaning. Raises UsageError if that leaves nothing."""
        read = clean_texts(prompts, self.text.prompt_cleaning)
        for prompt, left in zip(prompts, read, strict=True):
            if prompt.strip() and not left:
                raise UsageError(
                    f"the cleaning of prompts (text.prompt_cleaning={self.text.prompt_cleaning}) leaves nothing of "
                    f"{prompt[:40]!r}; say it in words, or give text.prompt_cleaning=none"
                )
        return read

    def _check_prompts(self, prompts: Sequence[str], negative_prompt: str) -> None:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UsageError("prompts: must be a list of texts")
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise UsageError("the prompt is empty; say what the video should show")
        read = [*self.read(prompts), *clean_texts([negative_prompt], self.text.prompt_cleaning)]
        LengthCheck(self.text.name, self.text.max_tokens)(read, self.text.count_tokens(read), strict=True)

    def _check_given(self, given: Condition, size: Shape, videos: int) -> None:
        if given.channels(self.codec) and not self.takes_frames:
            raise UsageError(
                "frames are given, but this denoiser was not trained with any; sample with mode=text, or with an "
                "inpainting model"
            )
        given.check(size, videos)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        solver: Solver | str | None = None,
        guidance: float = GUIDANCE,
        rescale: float = 0.0,
        negative_prompt: str = "",
        given: Condition | None = None,
        hold_given: bool = True,
        together: bool = True,
        low_memory: bool = False,
        progress: Watch = unwatched,
    ) -> Tensor:
        """Videos `B 3 T H W` in [-1, 1] of prompts, float32 on the CPU: `encode`, `denoise` and `decode`.

        Each depends on its prompt and its seed only, of which there is one for each video; a single prompt, or a single
        seed for all, need no list. A size that is None is that of the training clips. A solver's name stands for
        that solver in its usual number of steps, None for `default_solver`; the other arguments are those of the steps.
        With `low_memory` each part is on the device only while it works, as the steps say; videos are the same but for
        the last bits. Raises UsageError as `check`, and NotFiniteError if a part gives numbers that are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = self._seeds(seeds, len(prompts))
        frames, height, width = self._size(frames, height, width)
        solver = named_solver(self.objective, solver)
        asked: dict[str, Any] = {"negative_prompt": negative_prompt, "given": given}
        guiding: dict[str, Any] = {"solver": solver, "guidance": guidance, "rescale": rescale}
        self.check(prompts, frames, height, width, seeds=seeds, **asked, **guiding)
        doing: dict[str, Any] = {"low_memory": low_memory, "progress": progress}
        encoded = self.encode(prompts, frames, height, width, seeds=seeds, **asked, **doing)
        latent = self.denoise(encoded, seeds=seeds, hold_given=hold_given, together=together, **guiding, **doing)
        return self.decode(latent, frames, **doing)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        frames: int,
        height: int,
        width: int,
        *,
        negative_prompt: str = "",
        given: Condition | None = None,
        seeds: Sequence[int] | None = None,
        low_memory: bool = False,
        progress: Watch = unwatched,
    ) -> Encoded:
        """First step: what is asked for -> the denoiser's inputs.

        Args:
            prompts: one for each video.
            frames, height, width: of each video; see `check_size`.
            negative_prompt: what guidance leads away from.
            given: frames that are kept, the same for all videos or some for each; for inpainting models, of which
                None means that all frames are to be generated.
            seeds: one for each video, where a condition is encoded by chance (v1.2's given frames); None: it is not.
            low_memory: text encoder and VAE leave the device when they have done their part.
            progress: the pieces are all texts together, and the encodings of what is given.

        Raises UsageError for a prompt that is too long.
        """
        size = Shape(frames, height, width)
        if self.takes_frames and given is None:
            given = given_frames({}, *size)
        conditions = [] if given is None else [given, given.without()] if given.guided else [given]
        total = 1 + len(conditions)
        progress(Progress("encode", 0, total))
        with _working(self.text, self.device, low_memory):
            negative = clean_texts([negative_prompt], self.text.prompt_cleaning)
            texts = self._encode_texts(self.read(prompts), *negative)
        progress(Progress("encode", 1, total))
        inputs = []
        with _working(self.codec, self.device, low_memory) if conditions else nullcontext():
            for done, condition in enumerate(conditions, start=2):
                drawn = None if seeds is None else [seeded(seed, "given") for seed in seeds]
                inputs.append(condition.encode(self.codec, self.denoiser, drawn).expanded(len(prompts)))
                progress(Progress("encode", done, total))
        return Encoded(size, *texts, *(inputs and (inputs[0], inputs[-1])))

    def _encode_texts(self, prompts: Sequence[str], negative: str) -> tuple[EncodedText, EncodedText]:
        """The text of the prompts, and as many rows of what guidance leads away from."""
        asked, against = self.text.with_negative(prompts, negative)
        for values in (asked.text, asked.pooled, against.text, against.pooled):
            if values is not None:
                check_finite(f"the numbers that the text encoder ({self.text.name}) gives", values)
        return asked.to(self.device), against.to(self.device)

    @torch.no_grad()
    def denoise(
        self,
        encoded: Encoded,
        *,
        seeds: Sequence[int],
        solver: Solver,
        guidance: float = GUIDANCE,
        rescale: float = 0.0,
        hold_given: bool = True,
        together: bool = True,
        low_memory: bool = False,
        progress: Watch = unwatched,
    ) -> Tensor:
        """Second step: noise -> the latent `B C T H W` of what was asked for, float32 on the generator's device.

        Args:
            encoded: what `encode` gave.
            seeds: one for each video.
            solver: for the generator's objective.
            guidance, rescale: see `osp.diffusion.guided`; 1 is none.
            hold_given: the latent frames that the given ones make up, from the first on without a gap, come out as they
                are; without it they are as the model has learnt to copy them, as published.
            together: one call of the model with and without the prompt, or two of half the size.
            low_memory: two calls of half the size, and one block of the denoiser on the device after another, unless
                the device is the CPU, where weights stay where they are.
            progress: the pieces are the calls that the solver makes.
        """
        offloads = low_memory and self.device.type != "cpu"
        if not offloads:
            self.denoiser.to(self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = self.codec.latent_shape(*encoded.size)
        tokens = shape[2] * shape[3] // self.denoiser.patch_size**2
        predict = self._predict(encoded, guidance, rescale, together and not low_memory)
        held = encoded.condition if hold_given else None
        clean, known = (None, None) if held is None else (held.clean, held.known)
        if clean is not None and known is not None:
            predict = held_prediction(predict, self.objective, clean, known)

        def tell(call: int, calls: int, state: Tensor) -> None:
            progress(Progress("denoise", call, calls, state))

        progress(Progress("denoise", 0, len(solver.start(tokens).times)))
        # The solver's state is float32, whatever the weights are.
        noise = draw_normal((len(seeds), *shape), generators, self.device)
        with offloaded(self.denoiser, self.device) if offloads else nullcontext():
            latent = sample(predict, noise, solver, generators, tokens=tokens, callback=tell)
        if clean is not None and known is not None:  # some solvers leave a little noise
            latent = torch.where(known, clean, latent)
        check_finite(f"the latents that the denoiser ({type(self.denoiser).__name__}) gives", latent)
        return latent

    def _predict(self, encoded: Encoded, guidance: float, rescale: float, together: bool) -> Predict:
        """The prediction to sample with; of its two calls this process makes one if another makes the other."""

        def model(latent: Tensor, time: Tensor, **named: Any) -> Tensor:
            return self.objective.predicted(call_denoiser(self.denoiser, latent, time, **named))

        inputs = (
            denoiser_inputs(self.denoiser, encoded.text, encoded.condition),
            denoiser_inputs(self.denoiser, encoded.without_text, encoded.without_condition),
        )
        if self._branches is not None and guidance != 1:
            return branch_prediction(model, *inputs, scale=guidance, rescale=rescale, over=self._branches)
        return guided_prediction(model, *inputs, scale=guidance, rescale=rescale, together=together)

    @torch.no_grad()
    def decode(self, latent: Tensor, frames: int, *, low_memory: bool = False, progress: Watch = unwatched) -> Tensor:
        """Third step: a latent `B C T' H W` -> videos `B 3 T H W` of so many frames, in [-1, 1], float32 on the CPU.

        With `low_memory` one video is decoded after another, in pieces that leave the device at once, and so does the
        VAE at the end. The pieces of `progress` are frames: of all videos together, or of one tile after another, of
        those that are decoded here.
        """

        def tell(done: int, total: int) -> None:
            progress(Progress("decode", done, total))

        with _working(self.codec, self.device, low_memory):
            if low_memory or self._every is not None:
                how: dict[str, Any] = {"over": self._every, "leaves": low_memory}
                return decode_in_pieces(self.codec, latent, frames, tell, **how).cpu()
            tell(0, frames * own_tiles(self.codec.vae, "decoder", latent[:1], None))
            return self.codec.decode(latent, frames, tell).cpu()


class _Movable(Protocol):
    def to(self, device: torch.device | str) -> object: ...


@contextmanager
def _working(part: _Movable, device: torch.device, leaves: bool) -> Iterator[None]:
    """Inside, the part is on the device; if it `leaves`, it is in the CPU's memory afterwards, whatever happens."""
    part.to(device)
    try:
        yield
    finally:
        if leaves:
            part.to("cpu")
