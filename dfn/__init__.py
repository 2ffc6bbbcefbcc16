"""Dynamic Flow Networks and FlowNetwork: thin models on the ops of `dfn_kernels`."""

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
