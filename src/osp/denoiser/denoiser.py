"""The part that both transformers share: the checks of their inputs, and the way through their blocks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import Field, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from osp.checks import check_choice, check_number
from osp.denoiser.attention import TokenBatch
from osp.denoiser.grid import Grid
from osp.denoiser.layers import PatchEmbedding
from osp.denoiser.patterns import Pattern
from osp.denoiser.placement import Placement
from osp.denoiser.schedule import Stage, make_stages
from osp.errors import UsageError

Rows = Literal["video", "text", "once"]
"""What a linear layer sees of a sample: its video tokens, its text tokens, or one row."""
FrameEncoding = Literal["v12", "v13"]
"""The version as which given frames are encoded for a denoiser; see `osp.conditioning.GivenFrames`."""


class DenoiserConfig(Protocol):
    """The shape of a denoiser, a frozen dataclass: what those of all families have.

    Older files may call a setting by its former name.
    """

    former_names: ClassVar[Mapping[str, str]]

    @property
    def channels(self) -> int:
        """The channels of the latent."""
        ...

    @property
    def out_channels(self) -> int:
        """The channels of the prediction."""
        ...

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a patch."""
        ...

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The schedule."""
        ...

    @property
    def width(self) -> int:
        """Channels of a token, all heads together."""
        ...


Config = TypeVar("Config", bound=DenoiserConfig)


@dataclass(frozen=True)
class LinearLayers:
    """A family's linear layers, described so that their operations can be counted (`osp.denoiser.flops`).

    `rows` says for each, by its name with `*` for a number, which rows of a sample it sees: the "video" tokens, the
    "text" tokens, or one row ("once"). `inputs` are those that see an input of the model itself. `joint_text`: text
    takes part in the attention of the patterns; else the video's tokens attend to it once more, in the first of every
    `text_every` blocks.
    """

    rows: Mapping[str, Rows]
    inputs: Collection[str]
    joint_text: bool
    text_every: int = 1


class Denoiser(nn.Module):
    """A transformer from a noisy latent, the diffusion time and text to a prediction of the latent's shape.

    A family has the attributes below. `recompute_every` trades time for memory in training: of every so many blocks one
    keeps only its inputs and is computed again for the backward pass; 1: all of them, 0: none. `placement` makes the
    `Placement` of each call; a family that hands its tokens through all of its methods says so in `splits_tokens`. One
    whose schedule is its own says so in `takes_stages`.
    """

    linear_layers: ClassVar[LinearLayers]
    takes_stages: ClassVar[bool] = True
    frame_encoding: FrameEncoding = "v13"
    splits_tokens: ClassVar[bool] = False
    placement: Callable[..., Placement]
    blocks: nn.ModuleList
    patch: PatchEmbedding
    out: nn.Linear
    published_kind: str | None = None
    """The published kind that it was read as (`osp.weights.load_published`), if it was."""

    def __init__(self, config: Any, channels: int, text_channels: int, pooled_channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = channels
        self.text_channels = text_channels
        self.pooled_channels = pooled_channels
        self.patch_size: int = config.patch_size
        self.stages: tuple[Stage, ...] = config.stages
        self.schedule: list[Pattern] = [pattern for stage in self.stages for pattern in stage.patterns]
        self.recompute_every = 0
        self.offload_activations = False
        self.placement = Placement

    def neutral_parts(self) -> list[Any]:
        """The modules that start without effect, so that `restage` may add them to a trained model."""
        return []

    @property
    def clip_frames(self) -> int | None:
        """The latent frames of a clip where the model takes no other length but single images; None: it takes any."""
        return None

    def block_grids(self, grid: Grid, images: int = 0) -> list[Grid | None]:
        """The tokens that each block works on; None for one that is passed by.

        `images` are the last frames of the grid, where these are images of a joint batch. Raises UsageError for images,
        which only some families take.
        """
        if images:
            raise UsageError(
                f"images={images}: {type(self).__name__} takes no joint batches of clips and images; Latte does"
            )
        return [grid] * len(self.schedule)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The blocks, which run one after another."""
        return list(self.blocks)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that build the model again, as plain values."""
        settings = asdict(self.config)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}

    def check(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        pooled_text: Tensor | None,
        video_mask: Tensor | None,
    ) -> Grid:
        """The grid of tokens. Raises UsageError naming the input that does not fit, before anything is computed."""
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels or not latent.numel():
            raise UsageError(f"latent {_shape(latent)} does not fit; it must be B {self.latent_channels} T H W")
        if not latent.is_floating_point():
            raise UsageError(f"latent is of {latent.dtype}; it must be of floating point")
        batch, _, frames, height, width = latent.shape
        for name, side in (("height", height), ("width", width)):
            if side % self.patch_size:
                raise UsageError(f"latent {name} {side} is no multiple of the patch size {self.patch_size}")
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"time": (time, (batch,))}
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != self.text_channels or not text.shape[1]:
            raise UsageError(f"text {_shape(text)} does not fit; it must be {batch} L {self.text_channels}")
        wanted["text_mask"] = text_mask, (batch, text.shape[1])
        wanted["video_mask"] = video_mask, (batch, frames, height, width)
        if self.pooled_channels is not None:
            wanted["pooled_text"] = pooled_text, (batch, self.pooled_channels)
            if pooled_text is None:
                raise UsageError(f"pooled_text is missing; it must be {batch} {self.pooled_channels}")
        for name, (value, shape) in wanted.items():
            if value is not None and tuple(value.shape) != shape:
                raise UsageError(f"{name} {_shape(value)} does not fit; it must be {' '.join(map(str, shape))}")
        return Grid(frames, height // self.patch_size, width // self.patch_size)

    def token_mask(self, video_mask: Tensor | None) -> Tensor | None:
        """`B T H W` -> `B N`: a token is real if any part of its patch is; None if all are."""
        if video_mask is None:
            return None
        mask = as_bool("video_mask", video_mask)
        if bool(mask.all()):
            return None
        patches = mask.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        return patches.any(dim=5).any(dim=3).flatten(1)

    @torch.compiler.disable  # it looks into the masks; the blocks themselves compile as a whole
    def placed(self, tokens: TokenBatch) -> Placement:
        """The placement of a call's tokens."""
        return self.placement(self.schedule, tokens)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, with the options of torch.compile.

        There is one program for each pattern and size of input; blocks share them. Beyond 64 sizes torch warns, and
        runs blocks of further ones as they are.
        """
        # Sizes as variables gain nothing: the groups of another grid are another program.
        config, programs = torch._dynamo.config, 64 * (len(set(self.schedule)) + 1)
        config.recompile_limit = max(config.recompile_limit, programs)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, programs)
        for block in self.blocks:
            block.compile(**{"dynamic": False} | options)

    def run_block(self, index: int, *inputs: Any) -> Any:
        """One block, which is computed again for the backward pass if `recompute_every` says so."""
        block = self.blocks[index]
        if self.recompute_every and index % self.recompute_every == 0 and torch.is_grad_enabled():
            pinned = inputs[0].device.type != "cpu"
            with save_on_cpu(pin_memory=pinned) if self.offload_activations else nullcontext():
                return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def to_latent(self, patches: Tensor, grid: Grid) -> Tensor:
        """Patches `B N (p q C)` -> `B C T H W`."""
        x = patches.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, grid)  # B T H W p q C
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def trim_text(text: Tensor, mask: Tensor | None, empty_is_all: bool) -> tuple[Tensor, Tensor | None]:
    """Text `B L D` cut to the longest real prompt, and its mask, or None if nothing is left to mask.

    With `empty_is_all` a prompt without a real token counts as wholly real: so do the published models where text is
    attended to by itself, and such a prompt would leave nothing to attend to.
    """
    if mask is None:
        return text, None
    mask = as_bool("text_mask", mask)
    if empty_is_all:
        mask = mask | ~mask.any(dim=1, keepdim=True)
    used = mask.any(dim=0).tolist()
    length = max([i + 1 for i, real in enumerate(used) if real], default=1)
    text, mask = text[:, :length], mask[:, :length]
    return text, None if bool(mask.all()) else mask


def as_bool(name: str, mask: Tensor) -> Tensor:
    """A mask of 1 and 0. Raises UsageError for other values, such as those of an additive mask."""
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise UsageError(f"{name} has values other than 1 (there is something) and 0 (padding)")
    return mask.bool()


def make_config(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """The configuration of these settings. Raises UsageError naming one that is unknown or makes no sense."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    settings = {kind.former_names.get(key, key): value for key, value in settings.items()}
    if unknown := [key for key in settings if key not in known]:
        raise UsageError(f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    return kind(**{key: _checked(key, value, known[key]) for key, value in settings.items()})


def _checked(key: str, value: Any, field: Field[Any]) -> Any:
    """A setting as the configuration holds it, of the same type as its default."""
    default = field.default
    if key == "stages":
        return make_stages(value)
    if isinstance(default, str):
        check_choice(key, value, get_args(field.type))
        return value
    if isinstance(default, tuple):
        scale = key == "position_scale"
        if not isinstance(value, Sequence) or isinstance(value, str) or (scale and len(value) != len(default)):
            wanted = "three numbers above 0: frames, rows, columns" if scale else "a list of whole numbers from 1"
            raise UsageError(f"{key}={value}: must be {wanted}")
        for part in value:
            if scale:
                check_number(key, part, above=0)
            else:
                check_number(key, part, 1, whole=True)
        return tuple(map(float, value)) if scale else tuple(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{key}={value}: must be true or false")
    else:
        check_number(key, value, 1, whole=True)
    return value


def check_heads(head_dim: int, parts: Sequence[int]) -> None:
    """Raise UsageError for heads that cannot be rotated: `parts` are the channels for frames, rows and columns."""
    if sum(parts) != head_dim or any(part % 2 or part < 2 for part in parts):
        raise UsageError(f"head_dim={head_dim} cannot be split into even parts for each axis of the grid")


def _shape(x: Tensor) -> str:
    return f"of shape {' '.join(map(str, x.shape))}"
