"""RMSNorm: one module for every model, on every device."""

from torch import Tensor, nn

from osp.devices.kernels import are_fused


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) times a weight, over the last dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape; by Ascend's operator where `choose_kernels` has said so."""
        if are_fused(x.device) and self.eps is not None and len(self.normalized_shape) == 1:
            from osp.devices.npu import fused_rms_norm  # here: it brings Lightning

            return fused_rms_norm(x, self.weight, self.eps)
        return super().forward(x)
