"""VoVNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge


class OsaBlock(ConcatAdapter):
    """One-shot aggregation: ``conv_mid``'s layers in a row, and ``conv_concat`` over the input and all they gave.

    ``conv_mid`` is a Sequential that is called with a list to append to, and concatenates it. Before it
    ``conv_reduction``, behind it ``attn`` and ``drop_path``, each or none; ``residual`` adds the input at the end.
    """

    child = "conv_concat"
    passes = ("conv_mid",)

    def resembles(self, module: nn.Module) -> bool:
        return {"conv_mid", "conv_concat"} <= module._modules.keys()

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        maps = [x]
        y = x if module.conv_reduction is None else module.conv_reduction(x)
        for layer in module.conv_mid.children():
            y = layer(y)
            maps.append(y)
        y = merge(maps)
        if module.attn is not None:
            y = module.attn(y)
        if module.drop_path is not None:
            y = module.drop_path(y)
        return y + x if module.residual else y
