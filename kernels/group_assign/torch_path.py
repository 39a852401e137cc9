"""Group assignment in plain PyTorch, a slice of the batch at a time, so that no map of the whole batch exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.philox import gumbel_noise

_SLICE = 1 << 19  # elements of one [rows, G, N] map: a few of them stay in a core's cache or near it


def _slices(query: torch.Tensor, key: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _SLICE // max(1, query.shape[1] * key.shape[1]))
    for start in range(0, query.shape[0], rows):
        yield slice(start, min(start + rows, query.shape[0]))


def _logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """scale * query key^T, [rows, G, N]."""
    return torch.bmm(query, key.transpose(1, 2)).mul_(query.shape[2] ** -0.5)


def _soft(
    logits: torch.Tensor, part: slice, seed: torch.Tensor, row_offset: int, gumbel: bool, tau: float
) -> torch.Tensor:
    """softmax over groups of the (noisy) logits [rows, G, N] of the rows ``part``."""
    if gumbel:
        rows = torch.arange(row_offset + part.start, row_offset + part.stop, device=logits.device)
        logits = logits + gumbel_noise(seed, rows, logits.shape[1], logits.shape[2])
    return torch.softmax(logits if tau == 1 else logits / tau, dim=1)


def _one_hot(soft: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(soft).scatter_(1, choice.long().unsqueeze(1), 1.0)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    row_offset: int,
    hard: bool,
    gumbel: bool,
    tau: float,
    eps: float,
    return_assignment: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the operator returns, see ``op._group_assign``."""
    B, G, _ = query.shape
    N = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(query.shape)
    denominator = query.new_empty((B, G), dtype=dtype)
    choice = query.new_empty((B, N) if hard else (0,), dtype=torch.int32)
    assignment = query.new_empty((B, G, N) if return_assignment else (0,))
    for part in _slices(query, key):
        logits = _logits(query[part].to(dtype), key[part].to(dtype))
        weights = _soft(logits, part, seed, row_offset, gumbel, tau)
        if hard:
            choice[part] = weights.argmax(dim=1)
            weights = _one_hot(weights, choice[part])
        denominator[part] = weights.sum(dim=2).add_(eps)
        out[part] = torch.bmm(weights, value[part].to(dtype)).div_(denominator[part].unsqueeze(2))
        if return_assignment:
            assignment[part] = torch.softmax(logits if tau == 1 else logits / tau, dim=1)
    return out, denominator, choice, assignment


def backward(
    grad_out: torch.Tensor,
    grad_assignment: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    choice: torch.Tensor,
    seed: torch.Tensor,
    row_offset: int,
    hard: bool,
    gumbel: bool,
    tau: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value.

    d a[g, n] = (<d out_g, v_n> - <d out_g, out_g>) / denominator_g: the division by the row sum costs one scalar per
    group. Then the softmax over groups: d z = soft (d a - sum_g soft d a) / tau.
    """
    dtype = denominator.dtype
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    scale = query.shape[2] ** -0.5
    for part in _slices(query, key):
        q, k, v = query[part].to(dtype), key[part].to(dtype), value[part].to(dtype)
        grad = grad_out[part].to(dtype) / denominator[part].unsqueeze(2)  # [b, G, C]
        logits = _logits(q, k)
        soft = _soft(logits, part, seed, row_offset, gumbel, tau)
        weights = _one_hot(soft, choice[part]) if hard else soft
        grad_value[part] = torch.bmm(weights.transpose(1, 2), grad)
        delta = (grad * out[part].to(dtype)).sum(dim=2, keepdim=True)
        grad_logits = _softmax_backward(soft, torch.bmm(grad, v.transpose(1, 2)).sub_(delta), tau)
        if grad_assignment is not None:
            plain = torch.softmax(logits if tau == 1 else logits / tau, dim=1)
            grad_logits += _softmax_backward(plain, grad_assignment[part].to(dtype), tau)
        grad_logits *= scale
        grad_query[part] = torch.bmm(grad_logits, k)
        grad_key[part] = torch.bmm(grad_logits.transpose(1, 2), q)
    return grad_query, grad_key, grad_value


def _softmax_backward(soft: torch.Tensor, grad: torch.Tensor, tau: float) -> torch.Tensor:
    grad_logits = soft * (grad - (soft * grad).sum(dim=1, keepdim=True))
    return grad_logits if tau == 1 else grad_logits / tau
