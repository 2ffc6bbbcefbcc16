"""FlowNetwork, the second system: its layers, the model, and the published page's helper functions."""

from .benchmark import benchmark_flow_network
from .layers import AdaptiveFlowRouter, FlowLayer
from .metrics import FlowMetrics
from .model import PRESETS, FlowNetwork
from .training import create_dummy_data, train_flow_network

__all__ = [
    "AdaptiveFlowRouter",
    "FlowLayer",
    "FlowMetrics",
    "FlowNetwork",
    "PRESETS",
    "benchmark_flow_network",
    "create_dummy_data",
    "train_flow_network",
]
