"""WF-VAE: a causal video VAE whose main path is bridged by the low-frequency bands of a wavelet pyramid.

Li et al., "WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow", arXiv:2411.17459. The pyramid has three levels:
the input level works on the video, level 1 on its lowest band, level 2 on level 1's lowest band. The energy flow takes
levels 1 and 2 around the main path, in the encoder and, mirrored, in the decoder.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osp.checks import check_choice, check_number
from osp.errors import UsageError
from osp.vae.autoencoder import COLOURS, Autoencoding, VideoVAE
from osp.vae.layers import (
    CausalConv3d,
    Downsample,
    FrameAttention,
    Interpolation,
    Norm,
    ResidualBlock,
    Upsample,
    activated,
    norm_layer,
)
from osp.vae.posterior import GaussianPosterior
from osp.vae.stream import Chain, Join, StreamState, run
from osp.vae.wavelet import (
    EXACT_SCALE_3D,
    HaarTransform,
    InverseHaarTransform,
    haar_filters_2d,
    haar_filters_3d,
)


@dataclass(frozen=True)
class WFVAEConfig:
    """The shape of a WF-VAE.

    `level1` says whether wavelet level 1 works on frames alone ("2d": 4x8x8 compression) or in time too ("3d": 8x8x8).
    `encoder_flow_channels` and `decoder_flow_channels` are the energy flow's widths, `flow_blocks` the residual blocks
    on the decoder's flow, `encoder_blocks` and `decoder_blocks` those of a main level. `haar_scale` is the size of the
    3D filters' values: 0.3536 in the published weights.
    """

    latent_channels: int = 8
    base_channels: int = 128
    level1: Literal["2d", "3d"] = "2d"
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    encoder_flow_channels: int = 128
    decoder_flow_channels: int = 128
    flow_blocks: int = 1
    norm: Norm = "layer"
    attention: bool = True
    temporal_interpolation: Interpolation = "trilinear"
    dropout: float = 0.0
    haar_scale: float = EXACT_SCALE_3D

    def __post_init__(self) -> None:
        check_choice("level1", self.level1, ("2d", "3d"))
        for name, least in (
            ("latent_channels", 1),
            ("base_channels", 1),
            ("encoder_flow_channels", 1),
            ("decoder_flow_channels", 1),
            ("encoder_blocks", 1),
            ("decoder_blocks", 1),
            ("flow_blocks", 0),
        ):
            check_number(name, getattr(self, name), least, whole=True)


class Encoder(nn.Module):
    """Video `B 3 T H W` to the mean and log variance of the posterior."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        c, base, flow, norm = config, config.base_channels, config.encoder_flow_channels, config.norm
        time = c.level1 == "3d"
        filters_3d, filters_1 = haar_filters_3d(c.haar_scale), _level1_filters(c)
        self.wavelet_in = HaarTransform(filters_3d)
        self.wavelet_l1 = HaarTransform(filters_1)
        self.wavelet_l2 = HaarTransform(filters_3d)
        self.flow_l1 = CausalConv3d(COLOURS * len(filters_1), flow, (1, 3, 3))
        self.flow_l2 = CausalConv3d(COLOURS * len(filters_3d), flow, (1, 3, 3))
        self.down1 = Chain(
            CausalConv3d(COLOURS * len(filters_3d), base, (1, 3, 3)),
            *(ResidualBlock(base, base, norm=norm, time=False, dropout=c.dropout) for _ in range(c.encoder_blocks)),
            Downsample(base, time=time),
        )
        self.down2 = Chain(
            CausalConv3d(base + flow, 2 * base, (1, 3, 3)),
            *(ResidualBlock(2 * base, 2 * base, norm=norm, dropout=c.dropout) for _ in range(c.encoder_blocks)),
            Downsample(2 * base, time=True),
        )
        self.mid = _mid(2 * base + flow, 4 * base, 4 * base, c)
        self.norm_out = norm_layer(norm, 4 * base)
        self.conv_out = CausalConv3d(4 * base, 2 * c.latent_channels, (3, 3, 3))

    def forward(self, video: Tensor, state: StreamState | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`B 3 T H W` -> moments `B 2L T' H/8 W/8` and the coefficients of levels 1 and 2."""
        # Both branches of a level emit a frame at the same input frame, so they need no `Join` in a stream.
        coefficients = self.wavelet_in(video, state)
        l1 = self.wavelet_l1(coefficients[:, :COLOURS], state)
        l2 = self.wavelet_l2(l1[:, :COLOURS], state)
        h = self.down1(coefficients, state)
        h = self.down2(torch.cat([h, self.flow_l1(l1, state)], dim=1), state)
        h = self.mid(torch.cat([h, self.flow_l2(l2, state)], dim=1), state)
        return activated(self.norm_out, self.conv_out, h, state), (l1, l2)


class Decoder(nn.Module):
    """Latent `B L T' H/8 W/8` to video."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        c, base, flow, norm = config, config.base_channels, config.decoder_flow_channels, config.norm
        time = c.level1 == "3d"
        self.flow_channels = flow
        filters_3d, filters_1 = haar_filters_3d(c.haar_scale), _level1_filters(c)
        self.conv_in = CausalConv3d(c.latent_channels, 4 * base, (3, 3, 3))
        self.mid = _mid(4 * base, 4 * base, 4 * base + flow, c)
        self.up2 = Chain(
            *(ResidualBlock(4 * base, 4 * base, norm=norm, dropout=c.dropout) for _ in range(c.decoder_blocks)),
            Upsample(4 * base, time=True, interpolation=c.temporal_interpolation),
            ResidualBlock(4 * base, 4 * base + flow, norm=norm, dropout=c.dropout),
        )
        self.up1 = Chain(
            *(
                ResidualBlock(4 * base if i == 0 else 2 * base, 2 * base, norm=norm, dropout=c.dropout)
                for i in range(c.decoder_blocks)
            ),
            Upsample(2 * base, time=time, interpolation=c.temporal_interpolation),
            ResidualBlock(2 * base, 2 * base, norm=norm, dropout=c.dropout),
        )
        self.head = Chain(
            ResidualBlock(2 * base, base, norm=norm, dropout=c.dropout),
            ResidualBlock(base, base, norm=norm, dropout=c.dropout),
        )
        self.flow_l1 = _flow(flow, COLOURS * len(filters_1), c)
        self.flow_l2 = _flow(flow, COLOURS * len(filters_3d), c)
        self.norm_out = norm_layer(norm, base)
        self.conv_out = CausalConv3d(base, COLOURS * len(filters_3d), (1, 3, 3))
        self.wavelet_out = InverseHaarTransform(filters_3d)
        self.wavelet_l1 = InverseHaarTransform(filters_1)
        self.wavelet_l2 = InverseHaarTransform(filters_3d)
        # The main path looks ahead where it grows in time, the flow does not.
        self.join_l1, self.join_out = Join(), Join()

    def forward(self, latent: Tensor, state: StreamState | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`B L T' H/8 W/8` -> video `B 3 T H W` and the coefficients of levels 1 and 2."""
        h = self.mid(self.conv_in(latent, state), state)
        l2 = self.flow_l2(h[:, -self.flow_channels :], state)
        h = self.up2(h[:, : -self.flow_channels], state)
        l1 = self.flow_l1(h[:, -self.flow_channels :], state)
        l1 = _add_to_lowest_band(*self.join_l1(l1, self.wavelet_l2(l2, state), state))
        # These layers run in one go, since the tensors between them are the largest by far.
        layers = (*self.up1, *self.head, partial(activated, self.norm_out, self.conv_out))
        h = run(layers, h[:, : -self.flow_channels], state)
        h = _add_to_lowest_band(*self.join_out(h, self.wavelet_l1(l1, state), state))
        return self.wavelet_out(h, state), (l1, l2)


class WFVAE(VideoVAE):
    """The WF-VAE of v1.3 (4x8x8) and v1.5 (8x8x8) and any other shape of the family.

    Takes the fields of `WFVAEConfig` as keyword arguments. Raises UsageError for a shape that cannot be built.
    """

    space_stride = 8
    has_wavelets = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        unknown = settings.keys() - {field.name for field in fields(WFVAEConfig)}
        if unknown:
            known = ", ".join(field.name for field in fields(WFVAEConfig))
            raise UsageError(f"WF-VAE has no setting {', '.join(sorted(unknown))}; it has {known}")
        self.config = WFVAEConfig(**settings)
        self.latent_channels = self.config.latent_channels
        self.time_stride = 4 if self.config.level1 == "2d" else 8
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that build this VAE again."""
        return asdict(self.config)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The levels with most of the weights, which run one after another."""
        return [self.encoder.down1, self.encoder.down2, self.encoder.mid, self.decoder.mid, self.decoder.up2]

    @property
    def last_layer(self) -> CausalConv3d:
        """The last layer that learns, where the adversarial loss is balanced."""
        return self.decoder.conv_out

    def encode_moments(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        """Mean and log variance, see `VideoVAE`."""
        return self.encoder(video, state)[0]

    def decode_latent(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        """Video, see `VideoVAE`."""
        return self.decoder(latent, state)[0]

    def forward(
        self, video: Tensor, generator: torch.Generator | None = None, share: tuple[int, int] = (0, 1)
    ) -> Autoencoding:
        """`B 3 T H W` to a latent (`GaussianPosterior.sample`) and back, with what the losses need."""
        moments, encoder_coefficients = self.encoder(self.pad_frames(video))
        posterior = GaussianPosterior.from_moments(moments, video.shape[2])
        reconstruction, decoder_coefficients = self.decoder(posterior.sample(generator, share))
        return Autoencoding(
            reconstruction[:, :, : video.shape[2]], posterior, encoder_coefficients, decoder_coefficients
        )


def _level1_filters(config: WFVAEConfig) -> Tensor:
    return haar_filters_2d() if config.level1 == "2d" else haar_filters_3d(config.haar_scale)


def _mid(inputs: int, width: int, outputs: int, config: WFVAEConfig) -> Chain:
    first = ResidualBlock(inputs, width, norm=config.norm, dropout=config.dropout)
    last = ResidualBlock(width, outputs, norm=config.norm, dropout=config.dropout)
    attention = [FrameAttention(width, norm=config.norm)] if config.attention else []
    return Chain(first, *attention, last)


def _flow(channels: int, outputs: int, config: WFVAEConfig) -> Chain:
    """The layers from the energy flow's share of the main path to the coefficients of one level."""
    blocks = (
        ResidualBlock(channels, channels, norm=config.norm, dropout=config.dropout) for _ in range(config.flow_blocks)
    )
    return Chain(*blocks, CausalConv3d(channels, outputs, (1, 3, 3)))


def _add_to_lowest_band(coefficients: Tensor, lowest: Tensor) -> Tensor:
    return torch.cat([coefficients[:, :COLOURS] + lowest, coefficients[:, COLOURS:]], dim=1)
