"""Fused kernels for Deep Layer Aggregation networks in PyTorch.

:func:`swap_` makes the modules of an existing model run fused, :func:`unswap_` undoes it, :func:`register_adapter`
lets it know modules of one's own; :func:`freeze_` prepares for inference, :func:`unfreeze_` undoes that;
:func:`load_pretrained` loads weights from a file or from the web, :func:`convert_state_dict` changes a checkpoint's
layout; ``nn``, ``functional`` and ``models`` are for networks of one's own, ``reference`` is the same in plain PyTorch,
and :func:`use_backend` chooses who computes. ``__version__`` is the version of this package as a string, "0.2.0";
CHANGELOG.md says what each brought.
"""

from dla_fast import _starting  # noqa: F401, before torch

# isort: split
from dla_fast import functional, models, nn, reference
from dla_fast._version import __version__
from dla_fast.backend import use_backend
from dla_fast.models import convert_state_dict, load_pretrained
from dla_fast.swap import freeze_, register_adapter, swap_, unfreeze_, unswap_

__all__ = [
    "__version__",
    "convert_state_dict",
    "freeze_",
    "functional",
    "load_pretrained",
    "models",
    "nn",
    "reference",
    "register_adapter",
    "swap_",
    "unfreeze_",
    "unswap_",
    "use_backend",
]
