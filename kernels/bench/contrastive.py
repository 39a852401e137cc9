"""``contrastive_loss`` over a sweep of batches, and the multi-label form at that of GroupViT."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from .. import (
    contrastive_loss,
    contrastive_loss_reference,
    multi_label_contrastive_loss,
    multi_label_contrastive_loss_reference,
)
from ..contrastive.launch import bytes_moved
from ..contrastive.torch_path import Positives
from .operation import Inputs, Maker, Operation, Pass, Run, Sizes

# GroupViT projects to 256 channels, trains with 4,096 pairs and K = 3 nouns an image.
_MODELS: dict[str, Sizes] = {
    f"batch {batch:,}": {"M": batch, "K": 1, "D": 256} for batch in (4096, 8192, 16384, 32768, 65536)
}
_MULTI_LABEL: dict[str, Sizes] = {"GroupViT-S": {"M": 4096, "K": 3, "D": 256}}


def _make(sizes: Sizes, maker: Maker) -> Inputs:
    M, K, D = (sizes[name] for name in "MKD")
    # Rows of norm about one, as after the normalisation that the caller does.
    image = maker.normal(M, D, scale=D**-0.5)
    text = maker.normal(*((M, D) if K == 1 else (M, K, D)), scale=D**-0.5)
    scale = torch.tensor(14.3, device=maker.device, requires_grad=True)
    return {"image": image, "text": text, "logit_scale": scale}


def _arguments(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return inputs["image"], inputs["text"], inputs["logit_scale"]


def _eager(inputs: Inputs) -> Run:
    def run() -> torch.Tensor:
        image, text, scale = _arguments(inputs)
        logits = scale * (image @ text.mT)
        labels = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2

    return run


def _eager_multi_label(inputs: Inputs) -> Run:
    def run() -> torch.Tensor:
        image, text, scale = _arguments(inputs)
        M, K, _ = text.shape
        logits = scale * (image @ text.flatten(0, 1).mT)
        texts = torch.arange(M * K, device=image.device).view(M, K)
        # Each row has K positives of equal weight: the mean over k of the cross entropies with one.
        rows = logits.logsumexp(1).mean() - logits.gather(1, texts).mean()
        return (rows + F.cross_entropy(logits.mT, texts.flatten() // K)) / 2

    return run


def _flops(sizes: Sizes, pass_: Pass) -> int:
    product = 2 * sizes["M"] * sizes["M"] * sizes["K"] * sizes["D"]
    # Similarities forward; the similarities again and two gradients backward.
    return product * (1 if pass_ == "forward" else 3)


def _floor(sizes: Sizes, pass_: Pass) -> int:
    inputs = _make(sizes, Maker(torch.bfloat16, "meta"))
    image, text = inputs["image"], inputs["text"].reshape(-1, sizes["D"])
    return getattr(bytes_moved(image, text, Positives("own", sizes["K"])).floor, pass_)


OPERATIONS = [
    Operation(
        name="contrastive_loss",
        models=_MODELS,
        make=_make,
        gradients=("image", "text", "logit_scale"),
        call=lambda inputs, backend: partial(contrastive_loss, *_arguments(inputs), backend=backend),
        eager=_eager,
        reference=lambda inputs: partial(contrastive_loss_reference, *_arguments(inputs)),
        floor=_floor,
        flops=_flops,
        floor_is="closed form: one side is read once, the other once per block of it",
    ),
    Operation(
        name="multi_label_contrastive_loss",
        models=_MULTI_LABEL,
        make=_make,
        gradients=("image", "text", "logit_scale"),
        call=lambda inputs, backend: (
            lambda: multi_label_contrastive_loss(*_arguments(inputs), backend=backend)
        ),
        eager=_eager_multi_label,
        reference=lambda inputs: partial(multi_label_contrastive_loss_reference, *_arguments(inputs)),
        floor=_floor,
        flops=_flops,
        floor_is="closed form: one side is read once, the other once per block of it",
    ),
]
