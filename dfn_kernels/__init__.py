"""Fused, exact kernels for PyTorch: what Dynamic Flow Networks and FlowNetwork are made of."""

from ._backends import backends, use_backend
from .block_density import BlockDensity
from .field_sample import field_sample
from .flow_attention import flow_attention
from .flow_drift import Drift, FlowDriftFunction, flow_drift
from .flow_norm import FlowNormFunction, flow_norm
from .gather_plan import GatherPlan, gather_plan
from .gaussian_gather import GaussianGatherFunction, gaussian_gather
from .knn import KnnFunction, KNNIndex, Neighbors, knn
from .low_rank_route import low_rank_route
from .pattern_route import PatternRouteFunction, pattern_route
from .quantized_route import QuantizedPatterns, quantize_patterns
from .short_convolution import ShortConvolutionFunction, short_convolution
from .streaming import StreamingKNN

__version__ = "0.1.0"

__all__ = [
    "BlockDensity",
    "Drift",
    "FlowDriftFunction",
    "FlowNormFunction",
    "GatherPlan",
    "GaussianGatherFunction",
    "KNNIndex",
    "KnnFunction",
    "Neighbors",
    "PatternRouteFunction",
    "QuantizedPatterns",
    "ShortConvolutionFunction",
    "StreamingKNN",
    "backends",
    "field_sample",
    "flow_attention",
    "flow_drift",
    "flow_norm",
    "gather_plan",
    "gaussian_gather",
    "knn",
    "low_rank_route",
    "pattern_route",
    "quantize_patterns",
    "short_convolution",
    "use_backend",
]
