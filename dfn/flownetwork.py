"""FlowNetwork, the second system: its layers, the model, and the published page's helper functions."""

from .flow_benchmark import benchmark_flow_network
from .flow_layers import AdaptiveFlowRouter, FlowLayer
from .flow_metrics import FlowMetrics
from .flow_model import PRESETS, FlowNetwork
from .flow_training import create_dummy_data, train_flow_network

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
