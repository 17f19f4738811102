"""What a batch norm is, as one value."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A batch norm's tensors and how it is applied, as :func:`torch.nn.functional.batch_norm` takes them.

    Attributes:
        weight: (C,) or None, like ``bias``.
        bias: see ``weight``.
        running_mean: (C,), updated in place in training, or None together with ``running_var``.
        running_var: see ``running_mean``.
        training: normalise with the statistics of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        group: the process group whose processes' values together are the batch, in training; None for this one's alone.
        batches: the number of batches so far, which a call in training counts up once its arguments have passed the
            checks, and before any work: what recomputes a call may stop it as soon as it has what it wants.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    group: Any = None
    batches: Tensor | None = None
