"""Nouns against single groups: a multi-instance form of GroupViT's multi-label loss.

The paper compares the *mean* of an image's groups with a prompt, so nothing asks a group to be about one thing.
Here every prompt is compared with every group of every image; the best groups speak for the image (log-sum-exp,
the smooth maximum of multiple-instance learning, as Pinheiro & Collobert 2015 pool pixels), and each (image,
noun) pair is a yes-or-no question (the sigmoid loss of Zhai et al., SigLIP, 2023). A prompt whose noun stands in
an image's caption is a positive of that image, whichever image it was drawn for: equal nouns are not negatives
of one another.

B images of this rank, G groups, M prompts of all ranks, P width of the shared space.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel.ranks import MeanUnderWay

# Most (image, noun) pairs are negatives: a start below zero keeps their number from swamping the first steps.
INITIAL_BIAS = -5.0


def group_label_loss(
    groups: Tensor, prompts: Tensor, positive: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Sigmoid loss summed over all (image, prompt) pairs, over the number of positive pairs.

    The logit of a pair is log mean_g exp(scale * <group_g, prompt>) + bias. Counting positives keeps the loss at
    one height whatever the batch and however often a noun is drawn. Over several ranks it is this rank's part,
    whose mean over ranks is the loss of the global batch.

    Args:
        groups: [B, G, P], L2-normalised.
        prompts: [M, P], L2-normalised.
        positive: bool [B, M], whether the prompt's noun is one of the image's.
        scale, bias: scalars; the multiplier itself, not its logarithm.
    """
    positives = MeanUnderWay(positive.sum().float())  # a half's would lose count at 2,048
    similarity = torch.einsum("bgp,mp->bgm", groups, prompts) * scale
    logits = similarity.logsumexp(1) - math.log(groups.shape[1]) + bias
    total = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="sum")
    return total / positives.wait().clamp(min=1.0)


def positive_pairs(prompt_nouns: Tensor, image_nouns: Tensor) -> Tensor:
    """bool [B, M] from identities of the prompts' nouns [M] and of the images' nouns [B, S] (0 fills up)."""
    return (image_nouns[:, :, None] == prompt_nouns[None, None]).any(1)


def noun_identities(nouns: Sequence[str]) -> Tensor:
    """int64 [n], positive: equal for equal nouns, on whatever rank."""
    digests = [hashlib.blake2b(noun.encode(), digest_size=8).digest() for noun in nouns]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 | 1 for digest in digests], dtype=torch.int64)


def image_noun_identities(nouns: Sequence[Sequence[str]]) -> Tensor:
    """int64 [B, S] with S the longest list; 0, which no noun has, fills up the others."""
    longest = max((len(own) for own in nouns), default=0)
    rows = torch.zeros(len(nouns), max(longest, 1), dtype=torch.int64)
    for row, own in zip(rows, nouns, strict=True):
        if own:
            row[: len(own)] = noun_identities(own)
    return rows
