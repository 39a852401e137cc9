"""Group assignment: every token chooses one of G groups, every group averages the tokens that chose it.

With logits z[g, n] = scale <query_g, key_n> (scale = C**-0.5, GroupViT's single head), noise e and temperature tau,

    soft[g, n] = softmax over g of (z[g, n] + e[g, n]) / tau
    a[g, n]    = one-hot of the largest soft[:, n] (``hard``), with the gradient of soft (straight-through), or soft
    out[g]     = sum_n a[g, n] value_n / (sum_n a[g, n] + eps)

Xu et al., "GroupViT: Semantic segmentation emerges from text supervision", CVPR 2022, equations 3 to 7.

Cost. FLOPs: 4 B G N C forward, 10 B G N C backward. Bytes at the least: query, key, value read once and out written
once; backward reads query, key, value, out and its gradient once and writes three gradients. What the launches move is
``launch.bytes_moved``. Between the two passes
nothing of size B G N is kept: the noise is a function of (seed, row, group, token) (``common.philox``) and is remade.
"""

from __future__ import annotations

import torch

from ..common.backend import autocast_inputs, backend_for, outside_autocast, refuse_forward_mode
from ..common.philox import gumbel_noise
from . import launch, torch_path

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def group_assign_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    hard: bool = True,
    gumbel: bool = False,
    tau: float = 1.0,
    eps: float = 1.0,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    return_assignment: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The plain definition of :func:`group_assign` in float32 (float64 for float64 inputs), all maps in memory."""
    B, G, C = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ key.to(dtype).transpose(1, 2) * C**-0.5  # [B, G, N]
    noisy = logits
    if gumbel:
        rows = torch.arange(row_offset, row_offset + B, device=query.device)
        noisy = logits + gumbel_noise(_seed_tensor(seed, query.device), rows, G, key.shape[1]).to(dtype)
    soft = (noisy / tau).softmax(dim=1)
    weights = soft
    if hard:
        one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        weights = one_hot + soft - soft.detach()
    out = weights @ value.to(dtype) / (weights.sum(dim=2, keepdim=True) + eps)
    assignment = (logits / tau).softmax(dim=1).to(query.dtype) if return_assignment else None
    return out.to(query.dtype), assignment


def group_assign(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    hard: bool = True,
    gumbel: bool = False,
    tau: float = 1.0,
    eps: float = 1.0,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    return_assignment: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Assign tokens to groups and average the values of each group.

    Args:
        query: Group tokens, projected: [B, G, C].
        key, value: Image tokens, projected: [B, N, C], of the dtype and on the device of ``query``.
        hard: One group per token forward, the soft gradient backward; otherwise soft weights in both.
        gumbel: Add standard Gumbel noise to the logits (training).
        tau: Temperature that divides the (noisy) logits; > 0.
        eps: Added to the sum of a group's weights before dividing by it; >= 0. GroupViT uses 1.
        seed: Seed of the noise, an int or an int64 tensor of one element. ``None`` draws one from torch's default
            generator. Without ``gumbel`` it has no effect.
        row_offset: Global index of the first row: row b draws the noise of row ``row_offset + b``, so splitting a
            batch changes nothing.
        return_assignment: Also return the soft assignment without noise.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``out`` [B, G, C] and, if asked for, softmax over groups of ``logits / tau`` [B, G, N] (else ``None``).
        Both carry gradients; the gradient is not itself differentiable. Under autocast the inputs are cast to the
        autocast dtype.

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or range; the message names it.
    """
    query, key, value = autocast_inputs(query, key, value)
    _check(query, key, value, tau, eps)
    refuse_forward_mode("group_assign", query, key, value)
    if not gumbel:
        seed = 0
    out, _, _, assignment = _group_assign(
        query, key, value, _seed_tensor(seed, query.device), int(row_offset), hard, gumbel, float(tau), float(eps),
        return_assignment, backend_for(backend, "query", query),
    )  # fmt: skip
    return out, assignment if return_assignment else None


def _seed_tensor(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor of no dimensions on ``device``."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed is a {seed.dtype} tensor of shape {tuple(seed.shape)}; give an int or one int64 element."
            )
        return seed.reshape(()).to(device)
    wrapped = int(seed) & 0xFFFFFFFFFFFFFFFF
    return torch.full((), wrapped - (1 << 64) if wrapped >> 63 else wrapped, dtype=torch.int64, device=device)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tau: float, eps: float) -> None:
    if query.dim() != 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, G, C].")
    if query.dtype not in _DTYPES:
        raise ValueError(f"query has dtype {query.dtype}; expected float32, float16, bfloat16 or float64.")
    B, G, C = query.shape
    if G == 0 or C == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; groups and channels must be at least one.")
    if key.dim() != 3 or key.shape[0] != B or key.shape[2] != C:
        raise ValueError(f"key has shape {tuple(key.shape)}; expected [{B}, N, {C}] to go with query.")
    if value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected that of key, {tuple(key.shape)}.")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, query {query.dtype}; give them the same dtype."
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device}, query on {query.device}; move them to one device."
            )
    if not tau > 0:
        raise ValueError(f"tau is {tau}; expected a temperature above zero.")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected zero or more.")


@torch.library.custom_op("interloom::group_assign", mutates_args=())
@outside_autocast
def _group_assign(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [B, G, C], row sums plus eps [B, G], int32 choice [B, N], soft assignment without noise [B, G, N]).

    The last two are empty unless ``hard`` and ``return_assignment``.
    """
    path = launch if backend == "triton" else torch_path
    return path.forward(query, key, value, seed, row_offset, hard, gumbel, tau, eps, return_assignment)


@_group_assign.register_fake
def _(query, key, value, seed, row_offset, hard, gumbel, tau, eps, return_assignment, backend):
    B, G, _ = query.shape
    accumulate = torch.promote_types(query.dtype, torch.float32)
    N = key.shape[1]
    return (
        query.new_empty(query.shape),
        query.new_empty((B, G), dtype=accumulate),
        query.new_empty((B, N) if hard else (0,), dtype=torch.int32),
        query.new_empty((B, G, N) if return_assignment else (0,)),
    )


@torch.library.custom_op("interloom::group_assign_backward", mutates_args=())
@outside_autocast
def _group_assign_backward(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    path = launch if backend == "triton" else torch_path
    return path.backward(
        grad_out, grad_assignment, query, key, value, out, denominator, choice, seed, row_offset, hard, gumbel, tau
    )  # fmt: skip


@_group_assign_backward.register_fake
def _(
    grad_out, grad_assignment, query, key, value, out, denominator, choice, seed, row_offset, hard, gumbel, tau, backend
):  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, seed, row_offset, hard, gumbel, tau, _, return_assignment, backend = inputs
    out, denominator, choice, assignment = output
    ctx.save_for_backward(query, key, value, out, denominator, choice, seed)
    ctx.settings = (row_offset, hard, gumbel, tau, backend)
    ctx.return_assignment = return_assignment
    ctx.mark_non_differentiable(denominator, choice, *([] if return_assignment else [assignment]))
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_out, _denominator, _choice, grad_assignment):
    query, key, value, out, denominator, choice, seed = ctx.saved_tensors
    if not ctx.return_assignment:
        grad_assignment = None
    if grad_out is None:
        if grad_assignment is None:
            return (None,) * 11
        grad_out = torch.zeros_like(out)
    grads = _group_assign_backward(
        grad_out, grad_assignment, query, key, value, out, denominator, choice, seed, *ctx.settings
    )
    return *grads, *(None,) * 8


_group_assign.register_autograd(_autograd_backward, setup_context=_setup_context)
