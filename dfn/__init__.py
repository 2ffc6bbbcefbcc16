"""Dynamic Flow Networks and FlowNetwork: thin models on the ops of `dfn_kernels`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import (
        DFNBlock,
        DFNLanguageModel,
        DFNLayer,
        DynamicFlowAttention,
        EntityPositions,
        FlowMixer,
        FlowNorm,
        MemoryState,
        PersistentFieldMemory,
    )

__all__ = [
    "DFNBlock",
    "DFNLanguageModel",
    "DFNLayer",
    "DynamicFlowAttention",
    "EntityPositions",
    "FlowMixer",
    "FlowNorm",
    "MemoryState",
    "PersistentFieldMemory",
]
ROOMS = ("fields", "flownetwork", "models", "pictures", "runs", "studies", "training")


def __getattr__(name: str) -> Any:
    """Imported when it is first asked for: the command settles things before torch is there."""
    if name in __all__:
        return getattr(importlib.import_module(".models", __name__), name)
    if name in ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *ROOMS])
