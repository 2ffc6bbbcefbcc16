"""Fused, exact kernels for PyTorch: what Dynamic Flow Networks and FlowNetwork are made of."""

from ._backends import backends, use_backend
from .field_sample import field_sample
from .flow_drift import Drift, FlowDriftFunction, flow_drift
from .flow_norm import FlowNormFunction, flow_norm
from .gaussian_gather import GaussianGatherFunction, gaussian_gather
from .low_rank_route import low_rank_route
from .pattern_route import PatternRouteFunction, pattern_route

__version__ = "0.1.0"

__all__ = [
    "Drift",
    "FlowDriftFunction",
    "FlowNormFunction",
    "GaussianGatherFunction",
    "PatternRouteFunction",
    "backends",
    "field_sample",
    "flow_drift",
    "flow_norm",
    "gaussian_gather",
    "low_rank_route",
    "pattern_route",
    "use_backend",
]
