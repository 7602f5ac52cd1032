"""Intuitive Fine-Tuning of causal language models: losses, configuration, trainer integrations.

``import ift`` is immediate: each name loads what it needs when first used, which is torch, and for
`check`, `patch`, `unpatch` and `IFTTrainer` transformers. So the command line answers without
either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ift import dynamics, losses
    from ift.checking import CheckReport, check
    from ift.config import IFTConfig
    from ift.integrations.transformers import IFTTrainer, patch, unpatch
    from ift.support import Support
    from ift_kernels import __version__

__all__ = [
    "CheckReport",
    "IFTConfig",
    "IFTTrainer",
    "Support",
    "__version__",
    "check",
    "dynamics",
    "losses",
    "patch",
    "unpatch",
]

_LAZY = {
    "CheckReport": "ift.checking",
    "IFTConfig": "ift.config",
    "IFTTrainer": "ift.integrations.transformers",
    "Support": "ift.support",
    "__version__": "ift_kernels",
    "check": "ift.checking",
    "dynamics": "ift.dynamics",
    "losses": "ift.losses",
    "patch": "ift.integrations.transformers",
    "unpatch": "ift.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("ift", "ift_kernels"):
            raise  # a fault of ours, which no extra would mend
        raise ImportError(
            f"ift.{name} needs {error.name!r}, which is not installed: "
            'pip install "ift-kernels[train]"'
        ) from error
    # `losses` and `dynamics` are their modules. Found without this function from now on.
    value = globals()[name] = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
