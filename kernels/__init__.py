"""Fused operations: tensors in, tensors out; each chooses Triton on a GPU and PyTorch elsewhere."""

# With the repository's root on the path, libraries that look for the hub's package `kernels` (Transformers does)
# import this folder under that name. Registering the operations a second time would replace those in use.
if __name__ != "kernels":
    from .contrastive.op import (
        contrastive_loss,
        contrastive_loss_reference,
        multi_label_contrastive_loss,
        multi_label_contrastive_loss_reference,
    )
    from .cross_attention.image_lists import ImageLists, prepare_image_mask
    from .cross_attention.op import gated_cross_attention, gated_cross_attention_reference
    from .gated_residual.op import (
        gated_residual,
        gated_residual_reference,
        gated_residual_rms_norm,
        gated_residual_rms_norm_reference,
    )
    from .group_assign.op import group_assign, group_assign_reference

__all__ = [
    "ImageLists",
    "contrastive_loss",
    "contrastive_loss_reference",
    "gated_cross_attention",
    "gated_cross_attention_reference",
    "gated_residual",
    "gated_residual_reference",
    "gated_residual_rms_norm",
    "gated_residual_rms_norm_reference",
    "group_assign",
    "group_assign_reference",
    "multi_label_contrastive_loss",
    "multi_label_contrastive_loss_reference",
    "prepare_image_mask",
]
