"""Continuous fields, the density of what they say, and samplers that draw entities from them."""

from .density import LearnedDensity
from .field import Field, GridField, ImageField, PointField, SpectrogramField, TextField, WaveField
from .sampler import AdaptiveSampler, Entities, Sampler, UniformSampler, psnr, reconstruct

__all__ = [
    "AdaptiveSampler",
    "Entities",
    "Field",
    "GridField",
    "ImageField",
    "LearnedDensity",
    "PointField",
    "Sampler",
    "SpectrogramField",
    "TextField",
    "UniformSampler",
    "WaveField",
    "psnr",
    "reconstruct",
]
