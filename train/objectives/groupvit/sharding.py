"""Which parts of a GroupViT are sharded as one unit."""

from __future__ import annotations

from torch.distributed.fsdp import register_fsdp_forward_method

from ....models.groupvit import GroupViTModel
from ...parallel.sharding import Sharder


def shard_groupvit(model: GroupViTModel, sharder: Sharder) -> None:
    """Shard a GroupViT: layers of both towers, grouping blocks, tables, projectors."""
    for layer in model.text_model.encoder.layers:
        sharder.block(layer)
        register_fsdp_forward_method(layer, "packed")
    sharder.tower(model.vision_model)
    for part in (model.text_model.embeddings, model.visual_projection, model.text_projection):
        sharder.exact(part)
