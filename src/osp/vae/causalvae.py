"""CausalVideoVAE: the causal convolutional video VAE of v1.0 and v1.1, and OD-VAE, its faster heir of v1.2.

Chen et al., "OD-VAE: An Omni-dimensional Video Compressor for Improving Latent Video Diffusion Model",
arXiv:2409.01199. A pyramid of residual levels; v1.0 works in 3D throughout and halves time by averaging, v1.1 and v1.2
start with levels that see single frames. v1.1 halves time by an average and a convolution, mixed in a learned
proportion, v1.2 with convolutions that are strided in time and space.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osp.checks import check_choice, check_number
from osp.errors import UsageError
from osp.vae.autoencoder import COLOURS, VideoVAE
from osp.vae.layers import (
    CausalConv3d,
    Downsample,
    FrameAttention,
    Norm,
    ResidualBlock,
    TimeUpsample,
    Upsample,
    activated,
    add,
    norm_layer,
)
from osp.vae.stream import Chain, StreamState

Kernel = Literal["2d", "3d"]
Resize = Literal["none", "frame", "space", "space_time"]
TimeResize = Literal["none", "plain", "mixed"]
Attention = Literal["frame", "mixed"]

# As they were saved when there was no other change of time than the plain one.
_FORMER_TIMES = {False: "none", True: "plain"}

_FIRST_LOGVAR = -6.0  # a standard deviation of 0.05

MIX_FACTOR = 2.0
"""What a mixed time layer's proportion begins with, before the sigmoid: 0.88 of the part without weights."""


@dataclass(frozen=True)
class CausalVAEConfig:
    """The shape of a CausalVideoVAE.

    Lists have one entry a level, the finest level first, in the decoder too; level i is `base_channels *
    multipliers[i]` wide. `encoder_blocks` and `decoder_blocks` say whether the residual blocks of a level see single
    frames or three, `conv_in` the same of the encoder's first layer. `encoder_resize` and `decoder_resize` are the
    learned changes of size: "space" alone, or "space_time"; "frame" computes what "space" does and differs in the
    layout of published checkpoints only. `encoder_time` and `decoder_time` add a halving or doubling of time: "plain"
    without weights, "mixed" with a convolution beside it (v1.1). `inner_channels` are those between encoder or decoder
    and the 1x1x1 convolution at the latent. "mixed" is an older form of attention.
    """

    latent_channels: int = 4
    inner_channels: int = 4
    base_channels: int = 128
    multipliers: Sequence[int] = (1, 2, 4, 4)
    blocks: int = 2
    conv_in: Kernel = "3d"
    encoder_blocks: Sequence[Kernel] = ("3d", "3d", "3d", "3d")
    encoder_resize: Sequence[Resize] = ("space", "space", "space", "none")
    encoder_time: Sequence[TimeResize] = ("none", "plain", "plain", "none")
    encoder_attention: Attention = "frame"
    decoder_blocks: Sequence[Kernel] = ("3d", "3d", "3d", "3d")
    decoder_resize: Sequence[Resize] = ("none", "space", "space", "space")
    decoder_time: Sequence[TimeResize] = ("none", "none", "plain", "plain")
    decoder_attention: Attention = "frame"
    norm: Norm = "group"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "inner_channels", "base_channels", "blocks"):
            check_number(name, getattr(self, name), 1, whole=True)
        if not self.multipliers:
            raise UsageError("multipliers is empty; it needs one number a level")
        for multiplier in self.multipliers:
            check_number("multipliers", multiplier, 1, whole=True)
        for name in ("encoder_attention", "decoder_attention"):
            check_choice(name, getattr(self, name), get_args(Attention))
        check_choice("conv_in", self.conv_in, get_args(Kernel))
        for part, choices in (("blocks", Kernel), ("resize", Resize), ("time", TimeResize)):
            for name in (f"encoder_{part}", f"decoder_{part}"):
                self._check_levels(name, get_args(choices))
        # Values from YAML or JSON are lists; equal settings must compare as equal.
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Sequence) and not isinstance(value, str):
                object.__setattr__(self, field.name, tuple(value))
        if self.strides("encoder") != self.strides("decoder"):
            raise UsageError(
                f"the encoder shrinks time and space by {self.strides('encoder')}, "
                f"the decoder grows them by {self.strides('decoder')}; make the resize and time entries agree"
            )

    def _check_levels(self, name: str, choices: Sequence[str]) -> None:
        levels = getattr(self, name)
        if isinstance(levels, str) or len(levels) != len(self.multipliers):
            raise UsageError(
                f"{name}={levels} does not fit multipliers={list(self.multipliers)}; it needs one entry a level"
            )
        if name.endswith("_time"):
            levels = [_FORMER_TIMES[level] if isinstance(level, bool) else level for level in levels]
            object.__setattr__(self, name, levels)
        for level in levels:
            check_choice(name, level, choices)

    def strides(self, half: Literal["encoder", "decoder"]) -> tuple[int, int]:
        """The factors by which one half changes time and space."""
        resizes, times = getattr(self, f"{half}_resize"), getattr(self, f"{half}_time")
        doublings = sum(time != "none" for time in times) + sum(resize == "space_time" for resize in resizes)
        return 2**doublings, 2 ** sum(resize != "none" for resize in resizes)


class TimeDownsample(nn.Module):
    """Averages three frames at every second one; the first frame is repeated twice in front."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B C 1+(T-1)/2 H W`."""
        held = state.take(self) if state is not None else None
        past = x[:, :, :1].expand(-1, -1, 2, -1, -1) if held is None else held[0]
        x = torch.cat([past, x], dim=2)
        outputs = max(0, (x.shape[2] - 3) // 2 + 1)
        if state is not None:
            state.keep(self, x[:, :, outputs * 2 :])
        return F.avg_pool3d(x, (3, 1, 1), (2, 1, 1)) if outputs else x[:, :, :0]


class _Mixed(nn.Module):
    """Two ways to change the length of a clip, in a learned proportion: sigmoid(`mix_factor`) of the plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([MIX_FACTOR]))

    def mixed(self, plain: Tensor, convolved: Tensor) -> Tensor:
        share = self.mix_factor.sigmoid().to(plain.dtype)
        return share * plain + (1 - share) * convolved.to(plain.dtype)


class MixedTimeDownsample(_Mixed):
    """Halves the frames after the first one: the average of three frames, and a strided 3x3x3 convolution (v1.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.average = TimeDownsample()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3), (2, 1, 1))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B C 1+(T-1)/2 H W`."""
        return self.mixed(self.average(x, state), self.conv(x, state))


class MixedTimeUpsample(_Mixed):
    """Doubles the frames after the first one: interpolated, and the same after a causal 3x3x3 convolution (v1.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.growth = 2
        self.interpolate = TimeUpsample()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B C 1+2(T-1) H W`; in a stream, the frames that are ready."""
        doubled = self.interpolate(x, state)
        return self.mixed(doubled, self.conv(doubled, state))


class MixedAttention(FrameAttention):
    """The older attention that some published weights were trained with.

    It cuts `B C T H W` into B*T blocks as the numbers lie in memory, channels before frames. With more than one frame
    a block is no frame but some channels' history, so this can never stream. Its norm is always a group norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, norm="group")

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> the same shape. Raises UsageError in a stream."""
        normed = self.norm(x, state)
        batch, channels, frames, height, width = x.shape
        q, k, v = (
            layer(normed).reshape(batch * frames, 1, channels, height * width).transpose(2, 3)
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return add(self.output(attended.transpose(2, 3).reshape(x.shape)), x)


class Encoder(nn.Module):
    """Video `B 3 T H W` to the mean and log variance of the posterior."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        c = config
        widths = [c.base_channels * multiplier for multiplier in c.multipliers]
        self.conv_in = CausalConv3d(COLOURS, c.base_channels, (3, 3, 3) if c.conv_in == "3d" else (1, 3, 3))
        self.levels = Chain()
        for level, (inputs, width) in enumerate(zip([c.base_channels, *widths], widths, strict=False)):
            blocks = _blocks(c.blocks, inputs, width, c.encoder_blocks[level], c)
            resize, time = c.encoder_resize[level], c.encoder_time[level]
            resizes = [] if resize == "none" else [Downsample(width, time=resize == "space_time")]
            self.levels.append(_level(blocks, resizes, _halvings(time, width)))
        # The published encoder's attention has a group norm whatever the others have.
        self.mid = _mid(widths[-1], c.encoder_attention, "group", c)
        self.norm_out = norm_layer(c.norm, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * c.inner_channels, (3, 3, 3))
        self.moments = CausalConv3d(2 * c.inner_channels, 2 * c.latent_channels, (1, 1, 1))

    def forward(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        """`B 3 T H W` -> moments `B 2L T' H' W'`."""
        h = self.mid(self.levels(self.conv_in(video, state), state), state)
        return self.moments(activated(self.norm_out, self.conv_out, h, state), state)


class Decoder(nn.Module):
    """Latent to video. `levels` are those of the encoder in its order, the finest first; they run from the last."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        c = config
        widths = [c.base_channels * multiplier for multiplier in c.multipliers]
        self.from_latent = CausalConv3d(c.latent_channels, c.inner_channels, (1, 1, 1))
        self.conv_in = CausalConv3d(c.inner_channels, widths[-1], (3, 3, 3))
        self.mid = _mid(widths[-1], c.decoder_attention, c.norm, c)
        self.levels = nn.ModuleList()
        for level, (width, inputs) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            blocks = _blocks(c.blocks + 1, inputs, width, c.decoder_blocks[level], c)
            resize, time = c.decoder_resize[level], c.decoder_time[level]
            resizes = [] if resize == "none" else [Upsample(width, time=resize == "space_time")]
            self.levels.append(_level(blocks, resizes, _doublings(time, width)))
        self.norm_out = norm_layer(c.norm, widths[0])
        self.conv_out = CausalConv3d(widths[0], COLOURS, (3, 3, 3))

    def forward(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        """`B L T' H' W'` -> video `B 3 T H W`."""
        h = self.mid(self.conv_in(self.from_latent(latent, state), state), state)
        for level in reversed(self.levels):
            h = level(h, state)
        return activated(self.norm_out, self.conv_out, h, state)


class CausalVideoVAE(VideoVAE):
    """The CausalVideoVAE of v1.0 and v1.1, OD-VAE of v1.2, and any other shape of the family.

    Takes the fields of `CausalVAEConfig` as keyword arguments. Raises UsageError for a shape that cannot be built. The
    encoder of this family cannot stream, because its attention normalises over all frames.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = [field.name for field in fields(CausalVAEConfig)]
        if unknown := sorted(settings.keys() - set(known)):
            raise UsageError(f"CausalVideoVAE has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        self.config = CausalVAEConfig(**settings)
        self.latent_channels = self.config.latent_channels
        self.time_stride, self.space_stride = self.config.strides("encoder")
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        _initialise(self)

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that build this VAE again."""
        return asdict(self.config)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The levels and the middles, which hold most of the weights and run one after another."""
        return [*self.encoder.levels, self.encoder.mid, self.decoder.mid, *reversed(self.decoder.levels)]

    @property
    def last_layer(self) -> CausalConv3d:
        """The last layer that learns, where the adversarial loss is balanced."""
        return self.decoder.conv_out

    def encode_moments(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        """`B 3 T H W` -> mean and log variance, `B 2L T' H' W'`. Raises UsageError in a stream."""
        return self.encoder(video, state)

    def decode_latent(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        """`B L T' H' W'` -> video `B 3 T H W`. Raises UsageError in a stream unless norm=layer."""
        return self.decoder(latent, state)


@torch.no_grad()
def _initialise(vae: CausalVideoVAE) -> None:
    """Start new weights so that colours go through from the first step on.

    Convolutions keep the variance of what goes through and have no bias, residual branches end in zeros, and the
    posterior has little noise, as those of image VAEs have. PyTorch's own start makes signals small beside biases, so
    that training stays at the mean colour of all clips.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock | FrameAttention):
            nn.init.zeros_((module.conv2 if isinstance(module, ResidualBlock) else module.output).weight)
    moments, latent_channels = vae.encoder.moments, vae.latent_channels
    assert moments.bias is not None
    moments.weight[latent_channels:] = 0
    moments.bias[latent_channels:] = _FIRST_LOGVAR


def _blocks(count: int, inputs: int, width: int, kernel: Kernel, config: CausalVAEConfig) -> list[nn.Module]:
    return [
        ResidualBlock(inputs if i == 0 else width, width, norm=config.norm, time=kernel == "3d", dropout=config.dropout)
        for i in range(count)
    ]


def _level(blocks: Sequence[nn.Module], resize: Sequence[nn.Module], time: Sequence[nn.Module]) -> Chain:
    return Chain(OrderedDict(blocks=Chain(*blocks), resize=Chain(*resize), time=Chain(*time)))


def _halvings(time: TimeResize, width: int) -> Sequence[nn.Module]:
    if time == "none":
        return ()
    return (TimeDownsample() if time == "plain" else MixedTimeDownsample(width),)


def _doublings(time: TimeResize, width: int) -> Sequence[nn.Module]:
    if time == "none":
        return ()
    return (TimeUpsample() if time == "plain" else MixedTimeUpsample(width),)


def _mid(width: int, attention: Attention, norm: Norm, config: CausalVAEConfig) -> Chain:
    attend = FrameAttention(width, norm=norm) if attention == "frame" else MixedAttention(width)
    first, last = (ResidualBlock(width, width, norm=config.norm, dropout=config.dropout) for _ in range(2))
    return Chain(first, attend, last)
