"""The tanh-gated residual sum of Flamingo and IDEFICS, alone and fused with the RMSNorm that follows.

    out = residual + tanh(alpha) * update                          (Alayrac et al. 2022, figure 4)
    norm = out / sqrt(mean(out ** 2) + norm_eps) * weight          (Zhang and Sennrich 2019, equation 4)

alpha is one number or one a channel; rows whose mask is false take no update. The gradient of alpha,

    d_alpha = (1 - tanh(alpha) ** 2) * sum over rows of grad * update,

comes from the ungated update, so that alpha = 0, the usual initialisation, learns. The gradient of ``residual`` is
``grad`` itself and costs nothing.

Cost for R rows of C elements of e bytes, one pass each way (``launch.bytes_moved`` is exact):
3 e C R bytes forward and backward alone; 4 e C R forward and 6 e C R backward with the norm; a few FLOPs an
element, so memory decides. Sums over rows are made in a fixed order: repeated runs are bitwise equal.

Legend: B batch, T tokens, C channels, R = B * T rows.
"""

from __future__ import annotations

import math

import torch

from ..common.backend import backend_for, calls_directly, outside_autocast, refuse_forward_mode
from . import launch
from .torch_path import exact_dtype, torch_sum, torch_sum_backward, torch_sum_norm, torch_sum_norm_backward

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def gated_residual(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Return residual + tanh(alpha) * update.

    Args:
        residual: [B, T, C] (any leading shape) floating point.
        update: [B, T, C] in the dtype of ``residual``; under autocast the two are promoted to a common one.
        alpha: [1] or [C] in any floating dtype, the gate before tanh.
        row_mask: bool [B, T]; rows that are false are returned as ``residual`` and get no gradient elsewhere.
        backend: ``"auto"`` (Triton on a GPU, PyTorch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        [B, T, C] in the dtype of ``residual``. Arithmetic is float32, or float64 for float64.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or ``row_mask`` is not bool.
    """
    residual, update = _promote(residual, update)
    _check(residual, update, alpha, row_mask)
    refuse_forward_mode("gated_residual", residual, update, alpha)
    triton = backend_for(backend, "residual", residual) == "triton"
    if calls_directly(triton, residual):
        return torch_sum(residual, update, alpha, row_mask)
    return _sum(_rows(residual), _rows(update), alpha.contiguous(), _flat(row_mask), triton).view(
        residual.shape
    )


def gated_residual_rms_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``gated_residual`` and its RMSNorm, in one pass.

    Args:
        residual: [B, T, C] (any leading shape) floating point.
        update: [B, T, C] in the dtype of ``residual``; under autocast the two are promoted to a common one.
        alpha: [1] or [C] in any floating dtype, the gate before tanh.
        weight: [C] in any floating dtype, the scale of the norm.
        row_mask: bool [B, T]; rows that are false take no update; they are normed like the others.
        norm_eps: added to the mean square.
        backend: ``"auto"`` (Triton on a GPU, PyTorch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        (sum [B, T, C], norm [B, T, C]), both in the dtype of ``residual``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or ``row_mask`` is not bool.
    """
    residual, update = _promote(residual, update)
    _check(residual, update, alpha, row_mask, weight)
    refuse_forward_mode("gated_residual_rms_norm", residual, update, alpha, weight)
    triton = backend_for(backend, "residual", residual) == "triton"
    if calls_directly(triton, residual):
        out, norm, _ = torch_sum_norm(residual, update, alpha, weight, row_mask, norm_eps)
        return out, norm
    out, norm, _ = _sum_norm(
        _rows(residual),
        _rows(update),
        alpha.contiguous(),
        weight.contiguous(),
        _flat(row_mask),
        float(norm_eps),
        triton,
    )
    return out.view(residual.shape), norm.view(residual.shape)


def gated_residual_reference(
    residual: torch.Tensor, update: torch.Tensor, alpha: torch.Tensor, row_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain definition in float32 (float64 for float64); see ``gated_residual``."""
    _check(residual, update, alpha, row_mask)
    exact = exact_dtype(residual)
    gated = alpha.to(exact).tanh() * update.to(exact)
    if row_mask is not None:
        gated = torch.where(row_mask.unsqueeze(-1), gated, 0.0)
    return (residual.to(exact) + gated).to(residual.dtype)


def gated_residual_rms_norm_reference(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain definition in float32 (float64 for float64); see ``gated_residual_rms_norm``."""
    _check(residual, update, alpha, row_mask, weight)
    out = gated_residual_reference(residual, update, alpha, row_mask)
    exact = out.to(exact_dtype(residual))
    norm = exact * (exact.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * weight.to(exact.dtype)
    return out, norm.to(residual.dtype)


def _promote(residual: torch.Tensor, update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Under autocast a sum may be given two dtypes, as a linear layer's output is of the lower one."""
    if not (isinstance(residual, torch.Tensor) and isinstance(update, torch.Tensor)):
        return residual, update
    if residual.dtype != update.dtype and torch.is_autocast_enabled(residual.device.type):
        dtype = torch.promote_types(residual.dtype, update.dtype)
        return residual.to(dtype), update.to(dtype)
    return residual, update


def _check(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    row_mask: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> None:
    """Raise ValueError naming the argument that is wrong."""
    named = {"residual": residual, "update": update, "alpha": alpha}
    named |= {
        name: tensor for name, tensor in (("weight", weight), ("row_mask", row_mask)) if tensor is not None
    }
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; give a tensor.")
        if tensor.device != residual.device:
            raise ValueError(
                f"{name} is on {tensor.device} but residual is on {residual.device}; move it there."
            )
        if name != "row_mask" and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; give float16, bfloat16, float32 or float64.")
    if residual.dim() == 0:
        raise ValueError("residual has no dimensions; give [B, T, C].")
    if update.shape != residual.shape:
        raise ValueError(
            f"update has shape {tuple(update.shape)} but residual {tuple(residual.shape)}; make them the same."
        )
    if update.dtype != residual.dtype:
        raise ValueError(
            f"update is {update.dtype} but residual is {residual.dtype}; cast them to one dtype."
        )
    width = residual.shape[-1]
    if alpha.shape not in {(1,), (width,)}:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}; give [1] or [C], here [{width}].")
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give [C], here [{width}].")
    if row_mask is not None and (row_mask.dtype != torch.bool or row_mask.shape != residual.shape[:-1]):
        raise ValueError(
            f"row_mask is {row_mask.dtype} {tuple(row_mask.shape)}; give bool {tuple(residual.shape[:-1])}, one value "
            "a row of residual."
        )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [R, C] with unit column stride; a view unless the leading dimensions cannot be merged."""
    flat = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # -1 has no answer for no elements
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _flat(row_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if row_mask is None else row_mask.reshape(-1)


@torch.library.custom_op("interloom::gated_residual", mutates_args=())
@outside_autocast
def _sum(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    row_mask: torch.Tensor | None,
    triton: bool,
) -> torch.Tensor:
    if triton:
        return launch.gated_residual(residual, update, alpha, row_mask)
    return torch_sum(residual, update, alpha, row_mask)


@_sum.register_fake
def _(residual, update, alpha, row_mask, triton):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("interloom::gated_residual_backward", mutates_args=())
@outside_autocast
def _sum_backward(
    grad: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    row_mask: torch.Tensor | None,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if triton:
        return launch.gated_residual_backward(_rows(grad), update, alpha, row_mask)
    return torch_sum_backward(grad.to(exact_dtype(grad)), update, alpha, row_mask)


@_sum_backward.register_fake
def _(grad, update, alpha, row_mask, triton):
    return update.new_empty(update.shape), torch.empty_like(alpha)


def _save_sum(ctx, inputs, output) -> None:
    _, update, alpha, row_mask, triton = inputs
    ctx.save_for_backward(update, alpha, row_mask)
    ctx.triton = triton


def _differentiate_sum(ctx, grad):
    d_update, d_alpha = _sum_backward(grad, *ctx.saved_tensors, ctx.triton)
    return grad, d_update, d_alpha, None, None


_sum.register_autograd(_differentiate_sum, setup_context=_save_sum)


@torch.library.custom_op("interloom::gated_residual_rms_norm", mutates_args=())
@outside_autocast
def _sum_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    row_mask: torch.Tensor | None,
    norm_eps: float,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if triton:
        return launch.gated_residual_rms_norm(residual, update, alpha, weight, row_mask, norm_eps)
    return torch_sum_norm(residual, update, alpha, weight, row_mask, norm_eps)


@_sum_norm.register_fake
def _(residual, update, alpha, weight, row_mask, norm_eps, triton):
    out = residual.new_empty(residual.shape)
    return out, torch.empty_like(out), residual.new_empty(residual.shape[0], dtype=exact_dtype(residual))


@torch.library.custom_op("interloom::gated_residual_rms_norm_backward", mutates_args=())
@outside_autocast
def _sum_norm_backward(
    grad_out: torch.Tensor,
    grad_norm: torch.Tensor,
    out: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    row_mask: torch.Tensor | None,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if triton:
        return launch.gated_residual_rms_norm_backward(
            _rows(grad_out), _rows(grad_norm), out, update, alpha, weight, inverse_rms, row_mask
        )
    return torch_sum_norm_backward(grad_out, grad_norm, out, update, alpha, weight, inverse_rms, row_mask)


@_sum_norm_backward.register_fake
def _(grad_out, grad_norm, out, update, alpha, weight, inverse_rms, row_mask, triton):
    like = out.new_empty(out.shape)
    return like, torch.empty_like(like), torch.empty_like(alpha), torch.empty_like(weight)


def _save_sum_norm(ctx, inputs, output) -> None:
    _, update, alpha, weight, row_mask, _, triton = inputs
    out, _, inverse_rms = output
    ctx.save_for_backward(out, update, alpha, weight, inverse_rms, row_mask)
    ctx.triton = triton


def _differentiate_sum_norm(ctx, grad_out, grad_norm, _):
    d_residual, d_update, d_alpha, d_weight = _sum_norm_backward(
        grad_out, grad_norm, *ctx.saved_tensors, ctx.triton
    )
    return d_residual, d_update, d_alpha, d_weight, None, None, None


_sum_norm.register_autograd(_differentiate_sum_norm, setup_context=_save_sum_norm)
