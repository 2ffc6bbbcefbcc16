"""Dynamic Flow Networks and FlowNetwork: thin models on the ops of `dfn_kernels`."""

from .layers import DFNBlock, DFNLayer, DynamicFlowAttention, EntityPositions, FlowMixer, FlowNorm
from .memory import MemoryState, PersistentFieldMemory
from .models import DFNLanguageModel

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
