"""`osp bench target=denoiser`: one pass of a denoiser, sparse and dense."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from osp.benchmark.case import Target, start_compiler
from osp.benchmark.distance import attention_distance
from osp.benchmark.models import PRECISIONS, ModelSource, weights_dtype
from osp.benchmark.settings import choices, sizes, whole_numbers
from osp.denoiser import Denoiser, Grid, Stage, restage
from osp.denoiser.flops import denoiser_flops
from osp.errors import UsageError
from osp.weights.pretrained import open_pretrained
from osp.weights.published import open_published

_PASSES = ("forward", "train")
_SCHEDULES = ("sparse", "dense")


@dataclass(frozen=True)
class DenoiserCase:
    """One row: what goes through a denoiser, and how.

    `direction` is "forward" or "train", `tokens` are the video's in one sample, and `flops` the nominal count.
    `distance` is `attention_distance`; None where it cannot be counted, or tokens never hear of each other.
    """

    denoiser: ModelSource
    latent: tuple[int, ...]
    text_tokens: int
    batch: int
    direction: str
    schedule: str
    precision: str
    compiled: bool
    recompute_every: int
    tokens: int
    flops: int
    note: str = ""
    distance: float | None = None

    @property
    def about(self) -> dict[str, Any]:
        """The row's first columns."""
        return {
            "latent": "x".join(map(str, self.latent)),
            "tokens": self.tokens,
            "text_tokens": self.text_tokens,
            "batch": self.batch,
            "pass": self.direction,
            "schedule": self.schedule,
            "precision": self.precision,
            "compiled": self.compiled,
            "recompute_every": self.recompute_every or None,
        }

    @property
    def group(self) -> tuple[Any, ...]:
        """The settings that rows share if they are compared with each other."""
        what = (self.latent, self.text_tokens, self.batch, self.direction)
        return (*what, self.precision, self.compiled, self.recompute_every)

    @property
    def is_reference(self) -> bool:
        """Whether the others of the group are compared with this one."""
        return self.schedule == "dense"

    @property
    def work(self) -> dict[str, float]:
        """The tokens of one run; the table gives them per second."""
        return {"tokens": self.batch * self.tokens}

    @property
    def counted(self) -> dict[str, float | None]:
        """How far apart attention leaves the tokens."""
        return {"attention_distance": self.distance}

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the arithmetic."""
        return PRECISIONS[self.precision]

    def load(self, device: torch.device) -> Denoiser:
        """The denoiser with the attention to measure, on the device."""
        model = _scheduled(_load(self.denoiser, device, weights_dtype(self.precision)), self.schedule)
        model.recompute_every = self.recompute_every
        if self.compiled:
            start_compiler()
            model.compile_blocks()
        return model

    def inputs(self, model: Denoiser) -> dict[str, Tensor]:
        """Latent, time and text."""
        parameter = next(model.parameters())
        how: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        inputs = {
            "latent": torch.randn(self.batch, model.latent_channels, *self.latent, **how),
            "time": torch.rand(self.batch, **how) * 1000,
            "text": torch.randn(self.batch, self.text_tokens, model.text_channels, **how),
        }
        if model.pooled_channels is not None:
            inputs["pooled_text"] = torch.randn(self.batch, model.pooled_channels, **how)
        return inputs

    def run(self, model: Denoiser, inputs: dict[str, Tensor]) -> None:
        """Once forward, and in training back."""
        kind, mixed = inputs["latent"].device.type, self.precision.endswith("mixed")
        training = self.direction == "train"
        with torch.set_grad_enabled(training), torch.autocast(kind, dtype=self.dtype, enabled=mixed):
            out = model(**inputs)
        if training:
            out.sum().backward()
            model.zero_grad()  # or the next run would add to gradients instead of making them


@dataclass(frozen=True)
class DenoiserSweep:
    """The settings of the rows: every combination is one."""

    latents: list[tuple[int, ...]]
    texts: list[int]
    batches: list[int]
    directions: list[str]
    schedules: list[str]
    precisions: list[str]
    compiled: list[bool]
    recomputed: list[int]

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "DenoiserSweep":
        """The sweep that plain values ask for. Raises UsageError for values that make no sense."""
        return cls(
            latents=sizes(settings, "latents", "FRAMESxHEIGHTxWIDTH", "8x64x64"),
            texts=whole_numbers(settings, "text_tokens"),
            batches=whole_numbers(settings, "batch"),
            directions=choices(settings, "pass", _PASSES),
            schedules=choices(settings, "schedule", _SCHEDULES),
            precisions=choices(settings, "precision", tuple(PRECISIONS)),
            compiled=choices(settings, "compile", (False, True)),
            recomputed=whole_numbers(settings, "recompute_every", least=0),
        )


def cases(settings: Mapping[str, Any], source: ModelSource) -> tuple[list[DenoiserCase], str]:
    """The rows that the settings ask for, those to compare next to each other; and what the model is.

    Raises UsageError for settings that make no sense, before anything is measured.
    """
    sweep, model = DenoiserSweep.read(settings), denoiser_shape(source)
    models = _by_schedule(model, sweep.schedules)
    rows = []
    what = product(sweep.precisions, sweep.compiled, sweep.latents, sweep.texts, sweep.batches)
    distances: dict[tuple[str, tuple[int, ...]], float | None] = {}
    for number, how, latent, text, batch in what:
        tokens = math.prod(latent) // model.patch_size**2
        for direction, every, (schedule, one) in product(sweep.directions, sweep.recomputed, models.items()):
            if direction == "forward" and every != sweep.recomputed[0]:
                continue  # it keeps nothing, so it is one row
            counted = denoiser_flops(one, latent, text, batch)
            flops = counted.forward + (counted.backward if direction == "train" else 0)
            every = every if direction == "train" else 0
            about = (source, latent, text, batch, direction, schedule, number, how, every)
            if (schedule, latent) not in distances:
                distances[schedule, latent] = _distance(one, latent)
            rows.append(DenoiserCase(*about, tokens=tokens, flops=flops, distance=distances[schedule, latent]))
    return rows, source.title(model)


def _distance(model: Denoiser, latent: tuple[int, ...]) -> float | None:
    frames, height, width = latent
    try:
        found = attention_distance(model, Grid(frames, height // model.patch_size, width // model.patch_size))
    except UsageError:  # it would take minutes to count
        return None
    return found if math.isfinite(found) else None


def _by_schedule(model: Denoiser, schedules: list[str]) -> dict[str, Denoiser]:
    """The model with each schedule; without "sparse" where that is dense too. Raises UsageError if nothing is left."""
    models = {schedule: _scheduled(model, schedule) for schedule in schedules}
    if "sparse" in schedules and model.schedule == _scheduled(model, "dense").schedule:
        if schedules == ["sparse"]:
            raise UsageError("schedule=sparse: all blocks of this denoiser are dense; give schedule=dense")
        del models["sparse"]  # it would be the same once more
    return models


@lru_cache(maxsize=1)
def _load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Denoiser:
    return _build(source, device, dtype)


def denoiser_shape(source: ModelSource) -> Denoiser:
    """A denoiser without memory, to count what it has. Raises UsageError for another model."""
    settings = source.settings
    if settings["_target_"] == "osp.weights.load_pretrained":
        return _checked(open_pretrained(settings["path"])[0])
    if settings["_target_"] == "osp.weights.load_published":
        return _checked(open_published(settings["kind"], settings["source"], settings["config"]).model)
    return _build(source, torch.device("meta"), torch.float32)


def _build(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """A denoiser; with random weights it is made where and as it will run, never in float32 first."""
    if source.origin:
        model = source.built(dtype=str(dtype).removeprefix("torch."))
    else:
        with _made_in(device, dtype):
            model = source.built()
    return _checked(model).to(device, dtype)


def _checked(model: Any) -> Denoiser:
    if not isinstance(model, Denoiser):
        raise UsageError(f"denoiser is a {type(model).__name__}, which is none; give weights of a denoiser")
    return model


@contextmanager
def _made_in(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _scheduled(model: Denoiser, schedule: str) -> Denoiser:
    """Another module with the same weights, whose blocks attend as they did, or densely."""
    return restage(model, [Stage(stage.blocks) for stage in model.stages] if schedule == "dense" else None)


DENOISER = Target(
    cases,
    notes=(
        "TFLOP are nominal: linear layers and attention, a multiply-add being two. Attention is that within the groups "
        "of the schedule; its backward pass counts 2.5 times the forward, as a kernel that keeps no scores computes "
        "them again. What checkpointing computes again is not counted.",
        "Tokens are the video's, in all samples of the batch.",
        "Attention distance is the average number of attentions from a token to another, by the sparse blocks alone "
        "where there are any; - where it takes too long to count, or tokens never hear of each other.",
        "Memory taken is what comes on top of the process with its weights: the inputs, what is computed on the way, "
        "and in training the gradients, but no optimiser.",
        "Ratios are to dense attention in all blocks of the same model; the FLOP ratio is what the time ratio would be "
        "at the same rate.",
    ),
    speed="tokens_per_second",
    panel="pass",
    x="tokens",
    style=("schedule",),
)
