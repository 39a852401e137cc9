"""The gated residual sum in PyTorch, for machines without a GPU; see ``op``."""

from __future__ import annotations

import torch


def exact_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that sums are made in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def torch_sum(residual, update, alpha, row_mask) -> torch.Tensor:
    """The sum [..., C]."""
    exact = exact_dtype(residual)
    gate = alpha.to(exact).tanh()
    out = torch.addcmul(residual.to(exact), update.to(exact), gate).to(residual.dtype)
    return out if row_mask is None else torch.where(row_mask.unsqueeze(-1), out, residual)


def torch_sum_backward(grad, update, alpha, row_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of update [R, C] and alpha, for a gradient [R, C] in the type of :func:`exact_dtype`."""
    gate = alpha.to(grad.dtype).tanh()
    d_update, product = grad * gate, grad * update.to(grad.dtype)
    if row_mask is not None:
        d_update.masked_fill_(~row_mask.unsqueeze(-1), 0.0)
        product.masked_fill_(~row_mask.unsqueeze(-1), 0.0)
    total = product.sum().view(1) if alpha.numel() == 1 else product.sum(0)
    return d_update.to(update.dtype), (total * (1 - gate.square())).to(alpha.dtype)


def torch_sum_norm(
    residual, update, alpha, weight, row_mask, norm_eps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum [..., C], its norm [..., C] and 1 / rms [...]."""
    out = torch_sum(residual, update, alpha, row_mask)
    exact = out.to(exact_dtype(out))
    inverse_rms = (torch.linalg.vecdot(exact, exact) / exact.shape[-1] + norm_eps).rsqrt()
    norm = exact * inverse_rms.unsqueeze(-1)
    return out, norm.mul_(weight.to(exact.dtype)).to(out.dtype), inverse_rms


def torch_sum_norm_backward(
    grad_out, grad_norm, out, update, alpha, weight, inverse_rms, row_mask
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of residual [R, C], update [R, C], alpha and weight [C]."""
    exact = exact_dtype(out)
    normed = out.to(exact) * inverse_rms.unsqueeze(-1)
    scaled = grad_norm.to(exact) * weight.to(exact)
    d_weight = torch.linalg.vecdot(grad_norm.to(exact), normed, dim=0)
    inner = torch.linalg.vecdot(scaled, normed).unsqueeze(-1) / out.shape[-1]
    grad = scaled.sub_(normed.mul_(inner)).mul_(inverse_rms.unsqueeze(-1)).add_(grad_out)
    d_update, d_alpha = torch_sum_backward(grad, update, alpha, row_mask)
    return grad.to(out.dtype), d_update, d_alpha, d_weight.to(weight.dtype)
