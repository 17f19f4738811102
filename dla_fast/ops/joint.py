"""The collectives of a batch norm whose batch lies on several processes: one in the forward pass, one in the backward.

Both move vectors of channels alone. No process asks another's device for a number, so nothing waits for a GPU but where
the process itself has one value per channel or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def joint_moments(
    mean: Tensor,
    var: Tensor,
    values: int,
    group: Any,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance over all processes from each one's own; updates the running statistics with them.

    Every process of the group has to call it, whatever it has. Merged by Chan's formula in float64.

    Args:
        mean: (C,), of this process.
        var: (C,), biased, likewise.
        values: how many values per channel they are of; 0 for a process without any.
        group: the process group.
        running: running mean and variance, each (C,) or None.
        momentum: weight of the batch in them.
        conv_bias: (C,), what was left out of the values, or None.

    Returns:
        The joint mean and biased variance, in the dtype of ``mean``, and this process's share of the values, a float64
        scalar for :func:`joint_sums`.

    Raises:
        ValueError: all processes together have one value per channel.
    """
    channels = mean.shape[0]
    if values:
        own = torch.cat((mean.double(), var.double() * values, mean.new_full((1,), values, dtype=torch.float64)))
    else:
        own = mean.new_zeros(2 * channels + 1, dtype=torch.float64)
    rows = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(rows.unbind(0)), own, group=group)
    means, squares, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    count = counts.sum()
    if values < 2:
        # Whoever has more knows that there are more.
        there = int(count.item())
        if there == 1:
            raise ValueError(
                "xs: expected more than 1 value per channel when training, got 1 on all processes together (N * H * W)"
            )
        if there == 0:
            return torch.zeros_like(mean), torch.zeros_like(var), count
    joint = (counts * means).sum(0) / count
    square = (squares + counts * (means - joint).square()).sum(0)
    running_mean, running_var = running
    if running_mean is not None and running_var is not None:
        center = joint if conv_bias is None else joint + conv_bias
        running_mean.copy_((1 - momentum) * running_mean + momentum * center)
        running_var.copy_((1 - momentum) * running_var + momentum * (square / (count - 1)))
    return joint.to(mean.dtype), (square / count).to(var.dtype), values / count


def joint_sums(sums: Sequence[Tensor], share: Tensor, group: Any) -> list[Tensor]:
    """The sums of a norm's backward over all processes, as operators take them that divide by their own count.

    Every process of the group has to call it, whatever it has.

    Args:
        sums: (C,) each, of this process: of dy' and of dy' * x_hat.
        share: from :func:`joint_moments`.
        group: the process group.

    Returns:
        The joint sums times this process's share of the values.
    """
    both = torch.stack(tuple(sums))
    dist.all_reduce(both, group=group)
    return [total * share for total in both.unbind(0)]


def refuse() -> None:
    """For backwards that the reference would have to do, which asks no other process.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "batch statistics of several processes (SyncBatchNorm) are differentiable once, for one gradient at a time: no "
        "create_graph=True, no batched gradients (is_grads_batched, vectorize, vmap); train such a model with "
        "nn.BatchNorm2d, or put its norms in evaluation mode"
    )
