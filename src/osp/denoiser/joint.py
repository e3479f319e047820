"""The joint transformer of v1.5: video and text in one attention, sparse towards the middle, with long skips.

Open-Sora Plan report v1.5, "SUV" (sparse U-shaped video transformer). Its blocks are those of MMDiT (Esser et al.,
arXiv:2403.03206); with k = 1 everywhere and without skips it is a dense MMDiT.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.denoiser.attention import QKV, TokenBatch
from osp.denoiser.denoiser import Denoiser, LinearLayers, check_heads, make_config, trim_text
from osp.denoiser.layers import MLP, NORM_EPS, FeedForward, PatchEmbedding, initialise, modulated_norm, sinusoid
from osp.denoiser.placement import Attend
from osp.denoiser.rotary import rotary_tables, rotate
from osp.denoiser.schedule import Stage
from osp.devices.norm import RMSNorm
from osp.errors import UsageError

# Under autocast the input is in half precision and the weight is not: torch then takes another kernel, which is right.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)

_U = ((2, 1), (4, 2), (6, 4), (8, 8), (6, 4), (4, 2), (2, 1))


@dataclass(frozen=True)
class JointTransformerConfig:
    """The shape of a joint transformer.

    `stages` is the schedule. With `long_skips`, what comes out of each stage of the first half returns before the
    stage that mirrors it. `modulation_width` is the width of the conditioning by time and pooled text.
    """

    former_names: ClassVar[Mapping[str, str]] = {"condition_channels": "modulation_width"}

    channels: int = 32
    out_channels: int = 32
    heads: int = 24
    head_dim: int = 128
    text_channels: int = 2048
    pooled_channels: int = 1280
    modulation_width: int = 1024
    patch_size: int = 2
    stages: tuple[Stage, ...] = tuple(Stage(blocks, "skiparse", k) for blocks, k in _U)
    long_skips: bool = True

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def rotary_parts(self) -> tuple[int, int, int]:
        """Channels of a head that turn with frame, row and column: 4/16, 6/16 and 6/16."""
        return (self.head_dim // 16 * 4, self.head_dim // 16 * 6, self.head_dim // 16 * 6)


class JointTransformer(Denoiser):
    """See the module; settings are those of `JointTransformerConfig`. Raises UsageError for impossible ones."""

    config: JointTransformerConfig
    splits_tokens = True
    linear_layers = LinearLayers(
        {
            "patch.linear": "video",
            "time.up": "once",
            "time.down": "once",
            "pooled_text.up": "once",
            "pooled_text.down": "once",
            "text": "text",
            "video_skips.*.linear": "video",
            "text_skips.*.linear": "text",
            "blocks.*.attention_modulation": "once",
            "blocks.*.feed_forward_modulation": "once",
            "blocks.*.video.qkv": "video",
            "blocks.*.video.attention_out": "video",
            "blocks.*.video.feed_forward.up": "video",
            "blocks.*.video.feed_forward.down": "video",
            "blocks.*.text.qkv": "text",
            "blocks.*.text.attention_out": "text",
            "blocks.*.text.feed_forward.up": "text",
            "blocks.*.text.feed_forward.down": "text",
            "out_modulation": "once",
            "out": "video",
        },
        inputs=("patch.linear", "time.up", "pooled_text.up", "text"),
        joint_text=True,
    )

    def __init__(self, stages: Sequence[Stage | Mapping[str, Any]] | None = None, **settings: Any) -> None:
        c = make_config(JointTransformerConfig, settings if stages is None else settings | {"stages": stages})
        if c.modulation_width % 2:
            raise UsageError(f"modulation_width={c.modulation_width} must be even")
        check_heads(c.head_dim, c.rotary_parts)
        super().__init__(c, c.channels, c.text_channels, c.pooled_channels)
        self.patch = PatchEmbedding(c.channels, c.width, c.patch_size)
        self.time = MLP(c.modulation_width, c.modulation_width, c.modulation_width, nn.SiLU())
        self.pooled_text = MLP(c.pooled_channels, c.modulation_width, c.modulation_width, nn.SiLU())
        self.text = nn.Linear(c.text_channels, c.width)
        last = len(self.schedule) - 1
        self.blocks = nn.ModuleList(JointBlock(c, is_last=i == last) for i in range(last + 1))
        skips = len(c.stages) // 2 if c.long_skips else 0
        self.video_skips = nn.ModuleList(LongSkip(c.width) for _ in range(skips))
        self.text_skips = nn.ModuleList(LongSkip(c.width) for _ in range(skips))
        self.norm = nn.LayerNorm(c.width, NORM_EPS)
        self.out_norm = nn.LayerNorm(c.width, NORM_EPS)
        self.out_modulation = nn.Linear(c.modulation_width, 2 * c.width)
        self.out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        # A new model predicts zero, and its blocks pass on what they are given (adaLN-Zero, arXiv:2212.09748).
        initialise(self, "out", "out_modulation", "attention_modulation", "feed_forward_modulation")
        for part in self.neutral_parts():
            part.reset_parameters()

    def neutral_parts(self) -> list[Any]:
        """The long skips, which pass on the current tokens alone at first."""
        return [*self.video_skips, *self.text_skips]

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        pooled_text: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> Tensor:
        """Latent `B C T H W`, time `B` (1000 sigma), text `B L D`, pooled text `B P` -> `B C_out T H W`.

        Masks (`B L` and `B T H W`) are 1 where there is something. Raises UsageError naming the input that does not
        fit.
        """
        c = self.config
        grid = self.check(latent, time, text, text_mask, pooled_text, video_mask)
        assert pooled_text is not None
        text, text_mask = trim_text(text, text_mask, empty_is_all=False)
        masks = self.token_mask(video_mask), text_mask
        placement = self.placed(TokenBatch(grid, len(latent), latent.device, *masks, text.shape[1]))

        dtype = self.out.weight.dtype
        x, text = self.patch(latent.to(dtype)), self.text(text.to(dtype))
        condition = self.time(sinusoid(time, c.modulation_width).to(dtype)) + self.pooled_text(pooled_text.to(dtype))
        condition = F.silu(condition)
        rotary = rotary_tables(c.rotary_parts, grid, (1.0, 1.0, 1.0), x.device, _precise(x.dtype))
        x = placement.split(x)
        held: list[tuple[Tensor, Tensor, int]] = []
        block = here = 0  # the block that comes next, and the one as which the tokens lie
        for number, stage in enumerate(c.stages):
            returns = number - (len(c.stages) - len(self.video_skips))  # which skip does so here; below 0: none
            if returns >= 0:
                video_before, text_before, there = held.pop()
                x, here = placement.moved(x, here, block), block
                x = self.video_skips[returns](x, placement.moved(video_before, there, block))
                text = self.text_skips[returns](text, text_before)
            for _ in range(stage.blocks):
                x, here = placement.moved(x, here, block), block
                attend, cut = placement.attention(block), placement.cut(rotary, block)
                x, text = self.run_block(block, x, text, condition, cut, attend)
                block += 1
            if number < len(self.video_skips):
                held.append((x, text, here))
        x = _norm(self.norm, x)
        shift, scale = self.out_modulation(condition).chunk(2, dim=1)
        x = _norm(self.out_norm, x, scale, shift)
        return self.to_latent(placement.gathered(self.out(x)), grid).to(latent.dtype)


class LongSkip(nn.Module):
    """Linear layer over [current, skipped], which starts by passing on the current."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def reset_parameters(self) -> None:
        """Start as new: the identity for the current tokens, zeros for the skipped ones."""
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, current: Tensor, skipped: Tensor) -> Tensor:
        """Current and skipped tokens, both `B N D` -> `B N D`."""
        return self.linear(torch.cat((current, skipped), dim=2))


class Branch(nn.Module):
    """The layers of a block that video and text each have; `goes_on` is False if nothing reads the result."""

    def __init__(self, config: JointTransformerConfig, goes_on: bool) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.attention_norm = nn.LayerNorm(width, NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, NORM_EPS)
        if goes_on:
            self.attention_out = nn.Linear(width, width)
            self.feed_forward_norm = nn.LayerNorm(width, NORM_EPS)
            self.feed_forward = FeedForward(width, bias=False)

    def project(self, x: Tensor, scale: Tensor, shift: Tensor, rotary: tuple[Tensor, Tensor] | None) -> QKV:
        """Tokens `B N D` -> queries, keys and values, `B N H D`."""
        qkv = self.qkv(_norm(self.attention_norm, x, scale, shift))
        q, k, v = qkv.unflatten(2, (3, -1, self.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary), v)

    def attended(self, x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        """Tokens `B N D` with what attention gave (`B N H D`) added."""
        return _gated(x, gate, self.attention_out(out.flatten(2)))

    def fed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Tokens `B N D` with what the feed-forward gives added."""
        return _gated(x, gate, self.feed_forward(_norm(self.feed_forward_norm, x, scale, shift)))


class JointBlock(nn.Module):
    """Joint attention by a pattern, then feed-forward, each with its own modulation of both video and text."""

    def __init__(self, config: JointTransformerConfig, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.attention_modulation = nn.Linear(config.modulation_width, 6 * config.width)
        self.feed_forward_modulation = nn.Linear(config.modulation_width, 6 * config.width)
        self.video = Branch(config, goes_on=True)
        self.text = Branch(config, goes_on=not is_last)

    def forward(
        self, x: Tensor, text: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Tokens `B N D`, text `B L D`, conditioning `B C` -> tokens and text; the last block's text is as it was."""
        modulation = self.attention_modulation(condition)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=1)
        out, text_out = attend(
            self.video.project(x, scale, shift, rotary), self.text.project(text, text_scale, text_shift, None)
        )
        x = self.video.attended(x, out, gate)
        if not self.is_last:
            assert text_out is not None
            text = self.text.attended(text, text_out, text_gate)

        modulation = self.feed_forward_modulation(condition)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=1)
        x = self.video.fed_forward(x, shift, scale, gate)
        if not self.is_last:
            text = self.text.fed_forward(text, text_shift, text_scale, text_gate)
        return x, text


def _norm(norm: nn.LayerNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """norm(x) (1 + scale) + shift, in float32 as published."""
    dtype = _precise(x.dtype)
    if scale is None or shift is None:
        return F.layer_norm(x.to(dtype), x.shape[-1:], norm.weight.to(dtype), norm.bias.to(dtype), NORM_EPS).to(x.dtype)
    scale = 1 + scale.to(dtype)
    out = modulated_norm(x.to(dtype), norm.weight.to(dtype) * scale, norm.bias.to(dtype) * scale + shift.to(dtype))
    return out.to(x.dtype)


def _gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """x + gate out, in float32 as published."""
    dtype = _precise(x.dtype)
    return torch.addcmul(x.to(dtype), gate.to(dtype)[:, None], out.to(dtype)).to(x.dtype)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """float32, or what is more precise."""
    return torch.promote_types(dtype, torch.float32)
