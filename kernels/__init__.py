"""Fused operations: tensors in, tensors out; each chooses Triton on a GPU and PyTorch elsewhere."""

from .cross_attention import gated_cross_attention, gated_cross_attention_reference
from .image_lists import ImageLists, prepare_image_mask

__all__ = [
    "ImageLists",
    "gated_cross_attention",
    "gated_cross_attention_reference",
    "prepare_image_mask",
]
