"""The conditions that ask for a video beside its prompt, and how they reach the denoiser.

A new kind of condition is one file here: a class with the methods of `Condition`. Neither the generator nor the
training step knows more of it than these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from osp.conditioning.text import EncodedText
from osp.data.media.shape import Shape
from osp.denoiser import Denoiser
from osp.errors import UsageError
from osp.vae import LatentCodec


@dataclass(frozen=True)
class ConditionInputs:
    """A condition as the denoiser and the sampler take it, for a batch of `B` videos.

    `beside` (`B C T H W`, on the latent's grid) follows the channels of the noisy latent. `named` are further inputs of
    the denoiser, by name, each with `B` rows. Where `known` (bool, `B 1 T 1 1`) the clean latent is that of `clean`
    (`B C T H W`), so that sampling may hold it there; None: it is known nowhere.
    """

    beside: Tensor | None = None
    named: Mapping[str, Tensor] = field(default_factory=dict)
    clean: Tensor | None = None
    known: Tensor | None = None

    def expanded(self, videos: int) -> "ConditionInputs":
        """The inputs of one video repeated for so many videos; inputs of so many videos stay as they are."""

        def each(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.expand(videos, *value.shape[1:])

        named = {name: value.expand(videos, *value.shape[1:]) for name, value in self.named.items()}
        return ConditionInputs(each(self.beside), named, each(self.clean), each(self.known))


class Condition(Protocol):
    """Something that videos are asked for by beside their prompts: for each video of a batch, or one for all.

    `guided` says whether guidance leads away from it: then the model's call without the prompt gets `without()`.
    Otherwise both calls get the condition itself.
    """

    @property
    def guided(self) -> bool:
        """Whether guidance leads away from it, as it does from the prompt."""
        ...

    def channels(self, codec: LatentCodec) -> int:
        """How many channels it puts beside the noisy latent."""
        ...

    def check(self, size: Shape, videos: int) -> None:
        """Raise UsageError unless it is for so many videos of this size, in frames and pixels."""
        ...

    def encode(
        self,
        codec: LatentCodec,
        denoiser: Denoiser | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> ConditionInputs:
        """The condition's inputs of the denoiser, on the codec's device.

        What is random about them is drawn from the `generators`, one for each video that is made; None: nothing is.
        """
        ...

    def without(self) -> "Condition":
        """The condition that asks for nothing, for as many videos of the same size."""
        ...


def denoiser_inputs(
    denoiser: Denoiser, text: EncodedText, condition: ConditionInputs | None = None
) -> dict[str, Tensor]:
    """The named inputs of `call_denoiser` beside latent and time, each with a row a video."""
    inputs = {"text": text.text, "text_mask": text.mask}
    if denoiser.pooled_channels is not None and text.pooled is not None:
        inputs["pooled_text"] = text.pooled
    if condition is None:
        return inputs
    beside = {} if condition.beside is None else {"beside": condition.beside}
    return {**inputs, **beside, **condition.named}


def call_denoiser(
    denoiser: Denoiser, latent: Tensor, time: Tensor, *, beside: Tensor | None = None, **named: Any
) -> Tensor:
    """The prediction `B C T H W` for a noisy latent of that shape and times `B`, with `denoiser_inputs`.

    Raises UsageError if what stands beside the latent is on another grid, or is not what the denoiser takes.
    """
    if beside is not None:
        latent = with_conditions(latent, beside)
    if latent.shape[1] != denoiser.latent_channels:
        raise UsageError(
            f"the denoiser takes {denoiser.latent_channels} channels, and the latent with its conditions has "
            f"{latent.shape[1]}; its own latent has {denoiser.config.channels}"
        )
    return denoiser(latent, time, **named)


def with_conditions(noisy: Tensor, beside: Tensor) -> Tensor:
    """[noisy latent | conditions] by channels, in the noisy latent's type; both are `B C T H W` on one grid.

    Raises UsageError if the grids differ.
    """
    if beside.ndim != 5 or (beside.shape[0], *beside.shape[2:]) != (noisy.shape[0], *noisy.shape[2:]):
        raise UsageError(f"the conditions have the shape {tuple(beside.shape)}, the noisy latent {tuple(noisy.shape)}")
    return torch.cat((noisy, beside.to(noisy)), dim=1)
