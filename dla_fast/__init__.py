"""Fused kernels for Deep Layer Aggregation networks in PyTorch.

:func:`swap_` makes the modules of an existing model run fused, :func:`unswap_` undoes it, :func:`register_adapter`
lets it know modules of one's own; :func:`freeze_` prepares for inference, :func:`unfreeze_` undoes that; ``nn``,
``functional`` and ``models`` are for networks of one's own, ``reference`` is the same in plain PyTorch, and
:func:`use_backend` chooses who computes. ``__version__`` is the version of this package as a string, "0.2.0";
CHANGELOG.md says what each brought.
"""

from dla_fast import functional, models, nn, reference
from dla_fast._version import __version__
from dla_fast.backend import use_backend
from dla_fast.swap import freeze_, register_adapter, swap_, unfreeze_, unswap_

__all__ = [
    "__version__",
    "freeze_",
    "functional",
    "models",
    "nn",
    "reference",
    "register_adapter",
    "swap_",
    "unfreeze_",
    "unswap_",
    "use_backend",
]
