"""The transformer of v1.0 and v1.1: pairs of blocks, of which the first attends within frames, the second across them.

After Latte (Ma et al., "Latte: Latent Diffusion Transformer for Video Generation", arXiv:2401.03048), with the
conditioning of PixArt-alpha (Chen et al., arXiv:2310.00426).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from osp.checks import check_number
from osp.denoiser.attention import TokenBatch
from osp.denoiser.cross import BLOCKS_AND_ENDS, TIME_CHANNELS, CrossBlock
from osp.denoiser.denoiser import Denoiser, LinearLayers, make_config, trim_text
from osp.denoiser.grid import Grid
from osp.denoiser.layers import MLP, PatchEmbedding, initialise, modulated_norm, sines, sinusoid
from osp.denoiser.patterns import Temporal
from osp.denoiser.placement import Placement, Tables
from osp.denoiser.rotary import rotary_tables
from osp.denoiser.schedule import Stage
from osp.errors import UsageError

UNUSED_TOKENS = 120
"""Rows of a tensor that published checkpoints hold for the empty text, and that nothing reads."""


@dataclass(frozen=True)
class LatteTransformerConfig:
    """The shape of a Latte transformer.

    `frames` are the latent frames of a clip, whose positions are learnt with: no other number fits. `native_rows` are
    the rows of tokens of the grid it was trained on; other grids are stretched onto it. `position_scale` divides the
    positions of frames, rows and columns. `rotary` adds rotary positions to the sinusoids, of which v1.1's code is
    capable and no released weights make use.
    """

    former_names: ClassVar[Mapping[str, str]] = {}

    channels: int = 4
    out_channels: int = 8
    heads: int = 16
    head_dim: int = 72
    text_channels: int = 4096
    patch_size: int = 2
    pairs: int = 28
    frames: int = 17
    native_rows: int = 32
    position_scale: tuple[float, ...] = (3.0, 1.0, 1.0)
    rotary: bool = False

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The schedule: space and time in turn."""
        return (Stage(2 * self.pairs, "2+1d"),)

    def rotary_parts(self, block: int) -> tuple[int, int, int]:
        """Channels of a head that turn with frame, row and column in a block."""
        return (self.head_dim, 0, 0) if block % 2 else (0, self.head_dim // 2, self.head_dim // 2)


class LatteTransformer(Denoiser):
    """See the module; settings are those of `LatteTransformerConfig`. Raises UsageError for impossible ones.

    It takes clips of `frames` latent frames, single images (one latent frame), which pass by the blocks across frames,
    and joint batches of both.
    """

    config: LatteTransformerConfig
    takes_stages = False
    splits_tokens = True
    linear_layers = LinearLayers(
        BLOCKS_AND_ENDS,
        inputs=("patch.linear", "time.up", "text.up"),
        joint_text=False,
        text_every=2,
    )

    def __init__(self, **settings: Any) -> None:
        c = make_config(LatteTransformerConfig, settings)
        if c.width % 4 or (c.rotary and c.head_dim % 4):
            raise UsageError(f"heads={c.heads}, head_dim={c.head_dim}: positions need a width that 4 divides")
        super().__init__(c, c.channels, c.text_channels)
        self.patch = PatchEmbedding(c.channels, c.width, c.patch_size)
        self.time = MLP(TIME_CHANNELS, c.width, c.width, nn.SiLU())
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.text = MLP(c.text_channels, c.width, c.width, nn.GELU(approximate="tanh"))
        self.blocks = nn.ModuleList(CrossBlock(c.width, c.head_dim, i % 2 == 0) for i in range(2 * c.pairs))
        self.out_table = nn.Parameter(torch.randn(2, c.width) / c.width**0.5)
        self.out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        self.register_buffer("unused_text", torch.zeros(UNUSED_TOKENS, c.text_channels))
        initialise(self, "text_out", "out")

    @property
    def clip_frames(self) -> int:
        """See `Denoiser`."""
        return self.config.frames

    def block_grids(self, grid: Grid, images: int = 0) -> list[Grid | None]:
        """See `Denoiser`: images are frames to the blocks within frames, and pass by those across them."""
        clip = grid._replace(frames=grid.frames - images)
        return [grid, None if clip.frames == 1 else clip] * self.config.pairs

    def check(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        pooled_text: Tensor | None,
        video_mask: Tensor | None,
        images: int = 0,
    ) -> Grid:
        """See `Denoiser`, and `forward` for `images`."""
        check_number("images", images, 0, whole=True)
        if images:
            for name, value, shape in (("text", text, "B {} L D"), ("text_mask", text_mask, "B {} L")):
                wanted = shape.format(1 + images)
                if value is not None and (value.ndim != len(wanted.split()) or value.shape[1] != 1 + images):
                    found = " ".join(map(str, value.shape))
                    raise UsageError(f"{name} of shape {found} does not fit; with images={images} it must be {wanted}")
            text, text_mask = text[:, 0], None if text_mask is None else text_mask[:, 0]
        grid = super().check(latent, time, text, text_mask, pooled_text, video_mask)
        clip = grid.frames - images
        if clip not in (1, self.config.frames):
            beside = f" beside images={images}" if images else ""
            raise UsageError(
                f"latent has {clip} frames{beside}; this denoiser takes {self.config.frames}, the length that it was "
                "trained at, or 1, an image"
            )
        return grid

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
        """Latent `B C T H W`, time `B`, text `B L D` -> `B C_out T H W`, T being 1 or the `frames` of the settings.

        In a joint batch each clip is followed by as many `images`: the latent is `B C T+n H W`, text is `B 1+n L D`,
        that of the clip and of each image, and all have the one time. Masks (`B L` or `B 1+n L`, and `B T H W`) are 1
        where there is something; that of the video counts within frames alone. `pooled_text` is not looked at. Raises
        UsageError naming the input that does not fit.
        """
        c = self.config
        grid = self.check(latent, time, text, text_mask, None, video_mask, images)
        text, text_mask = self._trimmed(text, text_mask)
        grids = self.block_grids(grid, images)
        placement, clip_placement = self._placements(grid, grids[1], len(latent), latent.device, video_mask)

        dtype = self.out.weight.dtype
        x = self.patch(latent.to(dtype))
        x = x + space_positions(c, grid, x.device).to(x.dtype).flatten(0, 1).repeat(grid.frames, 1)
        text = self.text(text.to(dtype))
        embedded = self.time(sinusoid(time, TIME_CHANNELS).to(dtype))
        modulation = self.modulation(nn.functional.silu(embedded)).unflatten(1, (6, -1))
        x = placement.split(x)
        image_tokens = images * grid.height * grid.width
        before = 0
        for i, own in enumerate(grids):
            if own is None:
                continue
            across = i % 2 == 1
            placed = clip_placement if across else placement
            x = placed.moved(x, before, i)
            clip, rest = x.tensor_split([x.shape[1] - image_tokens * across], dim=1)
            if i == 1:
                frame = torch.arange(own.frames, device=x.device).repeat_interleave(own.tokens // own.frames)
                clip = clip + time_positions(c, own, x.device).to(x.dtype)[placed.cut((frame, frame), i)[0]]
            rotary = placed.cut(self._rotary(own, i, x), i) if c.rotary else None
            read = text, text_mask, modulation, rotary, placed.attention(i), image_tokens * (not across)
            clip = self.run_block(i, clip, *read)
            x, before = torch.cat((clip, rest), dim=1) if rest.numel() else clip, i
        x = placement.moved(x, before, len(grids) - 1)
        shift, scale = (self.out_table + embedded[:, None]).unbind(1)
        patches = placement.gathered(self.out(modulated_norm(x, 1 + scale, shift)))
        return self.to_latent(patches, grid).to(latent.dtype)

    def _trimmed(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text and its mask as `trim_text` gives them, with the texts of a joint batch (`B 1+n L D`) cut alike."""
        if text.ndim == 3:
            return trim_text(text, mask, empty_is_all=True)
        cut, kept = trim_text(text.flatten(0, 1), None if mask is None else mask.flatten(0, 1), empty_is_all=True)
        texts = text.shape[:2]
        return cut.unflatten(0, texts), None if kept is None else kept.unflatten(0, texts)

    def _placements(
        self, grid: Grid, clip: Grid | None, batch: int, device: torch.device, video_mask: Tensor | None
    ) -> tuple[Placement, Placement]:
        """Where all tokens lie for the blocks within frames, and where those of the clips lie for those across them."""
        unmasked = frozenset({Temporal()})
        placement = self.placed(TokenBatch(grid, batch, device, self.token_mask(video_mask), unmasked=unmasked))
        if clip in (None, grid):
            return placement, placement
        if self.placement is not Placement:
            raise UsageError("joint batches of clips and images cannot be split over processes; use sequence=1")
        assert clip is not None
        return placement, self.placed(TokenBatch(clip, batch, device))

    def _rotary(self, grid: Grid, block: int, x: Tensor) -> Tables:
        c = self.config
        return rotary_tables(c.rotary_parts(block), grid, c.position_scale, x.device, x.dtype, whole=True)


def space_positions(config: LatteTransformerConfig, grid: Grid, device: torch.device) -> Tensor:
    """The sinusoids of column and row of each place of a frame, `H W D` in float32: half of the channels each.

    A grid of another size than the native one is stretched onto the rows of that, in both directions.
    """
    rows, columns = (
        torch.arange(size, dtype=torch.float64, device=device) * config.native_rows / (size * scale)
        for size, scale in zip(grid[1:], config.position_scale[1:], strict=True)
    )
    row, column = (sines(axis, config.width // 2).float() for axis in (rows, columns))
    shape = (grid.height, grid.width, -1)
    return torch.cat((column[None].expand(shape), row[:, None].expand(shape)), dim=-1)


def time_positions(config: LatteTransformerConfig, grid: Grid, device: torch.device) -> Tensor:
    """The sinusoids of each frame, `T D` in float32."""
    frames = torch.arange(grid.frames, dtype=torch.float64, device=device) / config.position_scale[0]
    return sines(frames, config.width).float()
