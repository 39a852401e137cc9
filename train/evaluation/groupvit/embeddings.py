"""What zero-shot evaluations share: loading a GroupViT, and class names to embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.groupvit.templates import CLASSIFICATION_TEMPLATES, IMAGENET_TEMPLATES, SEGMENTATION_TEMPLATE
from ...data.pairs.vocabulary import unknown_names
from ..ranks import tell

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTModel, GroupViTProcessor

TEMPLATES: dict[str, tuple[str, ...]] = {
    "full": IMAGENET_TEMPLATES,
    "subset": CLASSIFICATION_TEMPLATES,
    "simple": (SEGMENTATION_TEMPLATE,),
    "identity": ("{}",),
}


def templates_named(name: str) -> tuple[str, ...]:
    """A template set by name, or a template of one's own that holds ``{}``."""
    if "{}" in name:
        return (name,)
    if name not in TEMPLATES:
        raise ValueError(
            f"templates={name!r} is not known; use one of {', '.join(TEMPLATES)}, or a text that holds {{}}."
        )
    return TEMPLATES[name]


@torch.no_grad()
def text_embeddings(
    model: GroupViTModel, processor: GroupViTProcessor, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Projected captions [M, P], not normalised."""
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = processor(
            text=list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt"
        )
        pooled = model.encode_text(tokens["input_ids"].to(model.device))
        parts.append(model.text_projection(pooled))
    return torch.cat(parts)


@torch.no_grad()
def class_embeddings(
    model: GroupViTModel, processor: GroupViTProcessor, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Unit embeddings of classes [U, P]: the mean over the prompts of each, normalised after the mean."""
    if unknown := unknown_names(processor.tokenizer, names):
        tell(
            f"WARNING: the model's tokenizer knows no word of {len(unknown)} of the {len(names)} classes "
            f"({', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}), which are the same to it."
        )
    prompts = [template.format(name) for name in names for template in templates]
    embedded = text_embeddings(model, processor, prompts)
    return F.normalize(embedded.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)
