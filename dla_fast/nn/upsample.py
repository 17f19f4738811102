"""IDA's learned upsampling as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dla_fast import checks, functional


def bilinear_kernel(factor: int) -> Tensor:
    """The (2f, 2f) kernel with which a transposed convolution of stride f interpolates bilinearly.

    For odd f it is centred half a pixel off, as the published networks initialise it (Long, Shelhamer, Darrell, Fully
    Convolutional Networks, CVPR 2015).
    """
    centre = (2 * factor - 1 - factor % 2) / (2 * factor)
    side = 1 - (torch.arange(2 * factor) / factor - centre).abs()
    return side[:, None] * side[None, :]


class Upsample(nn.Module):
    """Depthwise transposed convolution with kernel 2f, stride f, padding f // 2: learned weights, bilinear at first.

    Takes the place of ``nn.ConvTranspose2d(C, C, 2 * f, stride=f, padding=f // 2, groups=C, bias=False)``, whose state
    dict it has: ``weight`` of shape (C, 1, 2f, 2f). Deep Layer Aggregation (CVPR 2018), section 3.1.

    Args:
        channels: C.
        factor: f, an integer of at least 2.
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: a factor below 2; in ``forward`` shapes that do not fit.
        TypeError: a factor that is not an integer.

    Shape:
        ``forward(x, skip=None)``: x (N, C, H, W); the output, and ``skip`` which is added, (N, C, H', W') with
        H' = (H - 1) f - 2 (f // 2) + 2 f: f H for even f, f H + 1 for odd.
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_factor(factor)
        self.channels, self.factor = channels, factor
        self.weight = nn.Parameter(torch.empty(channels, 1, 2 * factor, 2 * factor, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it bilinear interpolation."""
        with torch.no_grad():
            self.weight.copy_(bilinear_kernel(self.factor))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            return functional.upsample(x, self.weight, self.factor)
        return functional.upsample_add(x, skip, self.weight, self.factor)

    def extra_repr(self) -> str:
        return f"{self.channels}, factor={self.factor}"
