"""The models of Dynamic Flow Networks: parameters and calls of the ops of `dfn_kernels`."""

from .decoding import Decoder
from .feedforward import ShortConvolution
from .field_models import DFNClassifier, DFNFieldModel
from .language import ABLATIONS, DFNLanguageModel, ablated, sample
from .layers import FIRST_BLOCK, DFNBlock, DFNLayer, DynamicFlowAttention, EntityPositions, FlowMixer, FlowNorm
from .memory import MemoryState, PersistentFieldMemory

__all__ = [
    "ABLATIONS",
    "DFNBlock",
    "DFNClassifier",
    "DFNFieldModel",
    "DFNLanguageModel",
    "DFNLayer",
    "Decoder",
    "DynamicFlowAttention",
    "EntityPositions",
    "FIRST_BLOCK",
    "FlowMixer",
    "FlowNorm",
    "MemoryState",
    "PersistentFieldMemory",
    "ShortConvolution",
    "ablated",
    "sample",
]
