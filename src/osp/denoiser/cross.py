"""The cross-attention transformer of v1.2 and v1.3: video attends to itself by a pattern, then to text.

Lin et al., "Open-Sora Plan: Open-Source Large Video Generation Model", arXiv:2412.00131, section 2.2; its conditioning
is that of PixArt-alpha (Chen et al., arXiv:2310.00426).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from osp.denoiser.attention import TokenBatch
from osp.denoiser.denoiser import Denoiser, FrameEncoding, LinearLayers, Rows, check_heads, make_config, trim_text
from osp.denoiser.images import joint_prediction
from osp.denoiser.layers import MLP, FeedForward, PatchEmbedding, initialise, modulated_norm, sinusoid
from osp.denoiser.placement import Attend
from osp.denoiser.rotary import rotary_tables, rotate
from osp.denoiser.schedule import Stage
from osp.devices import attention

TIME_CHANNELS = 256
BLOCKS_AND_ENDS: Mapping[str, Rows] = {
    "patch.linear": "video",
    "time.up": "once",
    "time.down": "once",
    "modulation": "once",
    "text.up": "text",
    "text.down": "text",
    "blocks.*.qkv": "video",
    "blocks.*.attention_out": "video",
    "blocks.*.text_q": "video",
    "blocks.*.text_kv": "text",
    "blocks.*.text_out": "video",
    "blocks.*.feed_forward.up": "video",
    "blocks.*.feed_forward.down": "video",
    "out": "video",
}
"""The `rows` of `LinearLayers` that transformers made of `CrossBlock` have in common."""


@dataclass(frozen=True)
class CrossTransformerConfig:
    """The shape of a cross-attention transformer.

    `frame_channels` are those of further inputs that follow the noisy latent's channels: the masked video's latent
    and the mask, in image-to-video and inpainting models. `frame_encoding` says how these are made of the given frames,
    as in v1.2 or in v1.3 (`osp.conditioning.GivenFrames`). `stages` is the schedule. `position_scale` divides the
    positions of frames, rows and columns.
    """

    former_names: ClassVar[Mapping[str, str]] = {"condition_channels": "frame_channels"}

    channels: int = 8
    out_channels: int = 8
    frame_channels: tuple[int, ...] = ()
    frame_encoding: FrameEncoding = "v13"
    heads: int = 24
    head_dim: int = 96
    text_channels: int = 4096
    patch_size: int = 2
    stages: tuple[Stage, ...] = (Stage(2), Stage(28, "skiparse", 4), Stage(2))
    position_scale: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def rotary_parts(self) -> tuple[int, int, int]:
        """Channels of a head that turn with frame, row and column."""
        return (self.head_dim // 3,) * 3


class CrossTransformer(Denoiser):
    """See the module; settings are those of `CrossTransformerConfig`. Raises UsageError for impossible ones."""

    config: CrossTransformerConfig
    splits_tokens = True
    linear_layers = LinearLayers(
        {**BLOCKS_AND_ENDS, "condition_patches.*.linear": "video", "condition_patches.*.zero": "video"},
        inputs=("patch.linear", "condition_patches.*.linear", "time.up", "text.up"),
        joint_text=False,
    )

    def __init__(self, stages: Sequence[Stage | Mapping[str, Any]] | None = None, **settings: Any) -> None:
        c = make_config(CrossTransformerConfig, settings if stages is None else settings | {"stages": stages})
        check_heads(c.head_dim, c.rotary_parts)
        super().__init__(c, c.channels + sum(c.frame_channels), c.text_channels)
        self.frame_encoding = c.frame_encoding
        self.patch = PatchEmbedding(c.channels, c.width, c.patch_size)
        self.condition_patches = nn.ModuleList(
            ConditionEmbedding(channels, c.width, c.patch_size) for channels in c.frame_channels
        )
        self.time = MLP(TIME_CHANNELS, c.width, c.width, nn.SiLU())
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.text = MLP(c.text_channels, c.width, c.width, nn.GELU(approximate="tanh"))
        self.blocks = nn.ModuleList(CrossBlock(c.width, c.head_dim) for _ in self.schedule)
        self.out_table = nn.Parameter(torch.randn(2, c.width) / c.width**0.5)
        self.out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        # A new model predicts zero, and its text begins without a say, as in PixArt-alpha.
        initialise(self, "text_out", "out")
        for part in self.neutral_parts():
            part.reset_parameters()

    def neutral_parts(self) -> list[Any]:
        """The embeddings of conditions, whose last layer is zero at first."""
        return list(self.condition_patches)

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        pooled_text: Tensor | None = None,
        video_mask: Tensor | None = None,
        images: int = 0,
    ) -> Tensor:
        """Latent `B C T H W`, with the conditions' channels after its own, time `B`, text `B L D` -> `B C_out T H W`.

        Masks (`B L` and `B T H W`) are 1 where there is something; `pooled_text` is not looked at. With `images` so
        many single images follow the video's frames, each a sequence of its own with its own text (`B 1+images L D`,
        mask `B 1+images L`). Raises UsageError naming the input that does not fit.
        """
        if images:
            return joint_prediction(self, latent, time, text, text_mask, video_mask, images)
        c = self.config
        grid = self.check(latent, time, text, text_mask, None, video_mask)
        text, text_mask = trim_text(text, text_mask, empty_is_all=True)
        placement = self.placed(TokenBatch(grid, len(latent), latent.device, self.token_mask(video_mask)))

        dtype = self.out.weight.dtype
        noisy, *conditions = latent.to(dtype).split([c.channels, *c.frame_channels], dim=1)
        x = self.patch(noisy)
        for embed, condition in zip(self.condition_patches, conditions, strict=True):
            x = x + embed(condition)
        rotary = rotary_tables(c.rotary_parts, grid, c.position_scale, x.device, x.dtype)
        text = self.text(text.to(dtype))
        embedded = self.time(sinusoid(time, TIME_CHANNELS).to(dtype))
        modulation = self.modulation(nn.functional.silu(embedded)).unflatten(1, (6, -1))
        x = placement.split(x)
        for i in range(len(self.blocks)):
            x = placement.moved(x, max(i - 1, 0), i)
            x = self.run_block(i, x, text, text_mask, modulation, placement.cut(rotary, i), placement.attention(i))
        shift, scale = (self.out_table + embedded[:, None]).unbind(1)
        patches = placement.gathered(self.out(modulated_norm(x, 1 + scale, shift)))
        return self.to_latent(patches, grid).to(latent.dtype)


class ConditionEmbedding(PatchEmbedding):
    """Patches of a condition, and a linear layer that starts at zero, so that the condition has no say yet."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__(channels, width, patch_size)
        self.zero = nn.Linear(width, width, bias=False)

    def reset_parameters(self) -> None:
        """Start as new: the last layer, `zero`, with zeros."""
        initialise(self, "zero")

    def forward(self, latent: Tensor) -> Tensor:
        """`B C T H W` -> `B N D`."""
        return self.zero(super().forward(latent))


class CrossBlock(nn.Module):
    """Self-attention by a pattern, cross-attention to text, feed-forward.

    All blocks share one modulation, to which each adds a table of its own. A block that does not read text
    (`reads_text`) has no cross-attention.
    """

    def __init__(self, width: int, head_dim: int, reads_text: bool = True) -> None:
        super().__init__()
        self.head_dim, self.reads_text = head_dim, reads_text
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        if reads_text:
            self.text_q = nn.Linear(width, width)
            self.text_kv = nn.Linear(width, 2 * width)
            self.text_out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, bias=True)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attend: Attend,
        image_tokens: int = 0,
    ) -> Tensor:
        """Tokens `B N D`, text `B L D`, its mask `B L`, modulation `B 6 D` -> `B N D`.

        Without `rotary` tables nothing is rotated. In a joint batch the last `image_tokens` tokens are those of n
        images, each with a text of its own: `B 1+n L D`, the mask `B 1+n L`.
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.table + modulation).unbind(1)

        q, k, v = self._heads(self.qkv(modulated_norm(x, 1 + scale, shift)), 3)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out, _ = attend((q, k, v))
        x = torch.addcmul(x, gate[:, None], self.attention_out(out.flatten(2)))

        if self.reads_text:
            x = x + self.text_out(self._read(x, text, text_mask, image_tokens))

        out = self.feed_forward(modulated_norm(x, 1 + ff_scale, ff_shift))
        return torch.addcmul(x, ff_gate[:, None], out)

    def _read(self, x: Tensor, text: Tensor, mask: Tensor | None, image_tokens: int) -> Tensor:
        """Each token's share of its text, `B N D`. All of the text is attended to, so nothing is rearranged."""
        (q,), (k, v) = self._heads(self.text_q(x), 1), self._heads(self.text_kv(text), 2)
        if not image_tokens:
            return attention(q, k, v, mask).flatten(2)
        clip = attention(q[:, :-image_tokens], k[:, 0], v[:, 0], None if mask is None else mask[:, 0])
        images = q[:, -image_tokens:].unflatten(1, (k.shape[1] - 1, -1)).flatten(0, 1)
        k, v = (part[:, 1:].flatten(0, 1) for part in (k, v))
        read = attention(images, k, v, None if mask is None else mask[:, 1:].flatten(0, 1))
        return torch.cat((clip, read.unflatten(0, (len(x), -1)).flatten(1, 2)), dim=1).flatten(2)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`... (parts H D)` -> so many of `... H D`."""
        return x.unflatten(-1, (parts, -1, self.head_dim)).unbind(-3)
