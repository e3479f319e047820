"""The other kernels of the models: norms, rotary embedding, convolutions, products of matrices."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from osp.audit.doctor.kernels import Kernel, check_kernels, drawn
from osp.audit.doctor.result import Result
from osp.audit.doctor.subject import Subject
from osp.denoiser.grid import Grid
from osp.denoiser.layers import NORM_EPS
from osp.denoiser.rotary import rotary_tables, rotate
from osp.vae.layers import CausalConv3d, Downsample

_UPDATE = "update torch and the driver (on Ascend torch-npu and CANN), and report it; do not train with it"
_WEIGHTLESS = f"norms without a weight are refused by some fused kernels: {_UPDATE}"
_FORMATS = f"convolutions are known to fail on some chips and in some memory formats: {_UPDATE}"
_GROUPS = 32


def check_norms(subject: Subject) -> Iterator[Result]:
    """Lines for RMS norm, layer norm and group norm."""
    for device in subject.devices:
        yield check_kernels("norms.rms", rms_norms(subject.head_dims), device, _WEIGHTLESS)
        yield check_kernels("norms.layer", layer_norms(), device, _WEIGHTLESS)
        yield check_kernels("norms.group", group_norms(), device, _UPDATE)


def check_rotary(subject: Subject) -> Iterator[Result]:
    """A line for the rotary embedding, at each head dim."""
    for device in subject.devices:
        yield check_kernels("rotary.rotate", rotations(subject.head_dims), device, _UPDATE)


def check_convolution(subject: Subject) -> Iterator[Result]:
    """A line for the causal convolutions of the VAEs: over time, within frames, with strides."""
    for device in subject.devices:
        yield check_kernels("convolution.causal", convolutions(subject.vae_channels, device), device, _FORMATS)


def check_matmul(subject: Subject) -> Iterator[Result]:
    """A line for linear layers, with and without a bias."""
    for device in subject.devices:
        yield check_kernels("matmul.linear", products(), device, _UPDATE)


def rms_norms(widths: Sequence[int]) -> Iterator[Kernel]:
    """With a weight, as of queries and keys, and without."""

    def formula(x: Tensor, weight: Tensor | None = None) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        return normed if weight is None else normed * weight

    def run(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, NORM_EPS)

    for width in widths:
        x = drawn(2, 40, 3, width)
        yield Kernel(f"width {width}", run, formula, (x, 1 + drawn(width, seed=1) / 4), ("input", "weight"))
        yield Kernel(f"width {width} without a weight", run, formula, (x,), ("input",))


def layer_norms(widths: Sequence[int] = (192, 2304, 3072)) -> Iterator[Kernel]:
    """With weight and bias, and without; the widths are those of denoisers."""

    def formula(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + NORM_EPS).sqrt()
        return normed if weight is None or bias is None else normed * weight + bias

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)

    for width in widths:
        x, weight, bias = drawn(2, 33, width), 1 + drawn(width, seed=1) / 4, drawn(width, seed=2)
        yield Kernel(f"width {width}", run, formula, (x, weight, bias), ("input", "weight", "bias"))
        yield Kernel(f"width {width} without a weight", run, formula, (x,), ("input",))


def group_norms() -> Iterator[Kernel]:
    """Over a clip, and over frames with the channels last in memory."""

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        groups = x.unflatten(1, (_GROUPS, -1)).flatten(2)
        apart = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        shape = (-1, *[1] * (x.ndim - 2))
        return apart.view_as(x) * weight.view(shape) + bias.view(shape)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, _GROUPS, weight, bias, 1e-6)

    def run_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return run(x.contiguous(memory_format=torch.channels_last), weight, bias)

    names, affine = ("input", "weight", "bias"), (1 + drawn(64, seed=1) / 4, drawn(64, seed=2))
    yield Kernel("64 channels of a clip", run, formula, (drawn(2, 64, 3, 8, 8), *affine), names)
    yield Kernel("64 channels last of a frame", run_channels_last, formula, (drawn(2, 64, 9, 8), *affine), names)


def rotations(head_dims: Sequence[int]) -> Iterator[Kernel]:
    """The published positions, with tables in float32 as the models take them."""
    grid = Grid(3, 4, 5)
    for dim in head_dims:
        parts = (dim // 3,) * 3 if dim % 6 == 0 else (dim // 16 * 4, dim // 16 * 6, dim // 16 * 6)
        angle = torch.cat(list(_angles(parts, grid)), dim=1)[:, None]

        def run(x: Tensor, parts: tuple[int, ...] = parts) -> Tensor:
            return rotate(x, *rotary_tables(parts, grid, (1.0, 1.0, 1.0), x.device, torch.float32))

        def formula(x: Tensor, angle: Tensor = angle) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            pair = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
            return torch.cat((pair.real, pair.imag), dim=-1)

        yield Kernel(f"head dim {dim}", run, formula, (drawn(2, 60, 2, dim),), ("input",))


def _angles(parts: Sequence[int], grid: Grid) -> Iterator[Tensor]:
    """The angles `N part/2` along each axis, in float64."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    for part, axis in zip(parts, axes, strict=True):
        yield axis.flatten()[:, None] * 10000.0 ** -(torch.arange(0, part, 2, dtype=torch.float64) / part)


def convolutions(channels: Sequence[int], device: torch.device) -> Iterator[Kernel]:
    """Convolutions over time and within frames, and with strides, at the channels of the VAEs' finest levels.

    On an accelerator at those of a coarsest one too; the CPU has one kernel for all, and is slow.
    """
    wide = [4 * min(channels)] if device.type != "cpu" else []
    layers = [CausalConv3d(width, width, (3, 3, 3)) for width in (*channels, *wide)]
    layers += [CausalConv3d(min(channels), min(channels), (1, 3, 3)), CausalConv3d(3, min(channels), (1, 1, 1))]
    layers += [Downsample(min(channels), time=time) for time in (False, True)]
    for layer in layers:
        layer.requires_grad_(False)
        kernel = "x".join(map(str, layer.kernel_size))
        shape = (1, layer.in_channels, 3, 6, 6)
        weight = drawn(*layer.weight.shape, seed=1) / layer.weight[0].numel() ** 0.5
        inputs = (drawn(*shape), weight, drawn(layer.out_channels, seed=2))
        strided = f" at stride {layer.stride[1]}" if layer.stride[1] > 1 else ""
        about = f"{kernel}{strided} from {layer.in_channels} to {layer.out_channels} channels"

        def run(x: Tensor, weight: Tensor, bias: Tensor, layer: CausalConv3d = layer) -> Tensor:
            return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

        yield Kernel(about, run, run, inputs, ("input", "weight", "bias"), convolution=True)


def products() -> Iterator[Kernel]:
    """Linear layers: few and many rows, widths that no tile divides."""
    for rows, inputs, outputs in ((3, 192, 768), (130, 2304, 96), (257, 100, 33)):
        weight = drawn(outputs, inputs, seed=1) / inputs**0.5
        about = f"{rows} rows from {inputs} to {outputs} channels"
        yield Kernel(about, F.linear, F.linear, (drawn(2, rows, inputs), weight), ("input", "weight"))
        biased = (drawn(2, rows, inputs), weight, drawn(outputs, seed=2))
        yield Kernel(f"{about} with a bias", F.linear, F.linear, biased, ("input", "weight", "bias"))
