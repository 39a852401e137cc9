"""What every operation keeps, whatever it computes: autocast, the graph of an empty input, forward-mode derivatives."""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from interloom import kernels

Operation = Callable[..., torch.Tensor]


def _unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def _contrastive(image, text, scale, **options):
    return kernels.contrastive_loss(image, text, scale, **options)


def _multi_label(image, text, scale, **options):
    return kernels.multi_label_contrastive_loss(image, text.unflatten(0, (-1, 2)), scale, **options)


def _grouping(query, key, value, **options):
    out, soft = kernels.group_assign(query, key, value, return_assignment=True, **options)
    assert soft is not None
    return torch.cat([out.flatten(), soft.flatten()])


def _attention(query, key, value, **options):
    seen = torch.arange(query.shape[2]).expand(query.shape[0], -1) % 2
    return kernels.gated_cross_attention(query, key, value, seen, image_length=3, **options)


def _residual(residual, update, alpha, **options):
    return kernels.gated_residual(residual, update, alpha, **options)


def _residual_norm(residual, update, alpha, weight, **options):
    return torch.cat(kernels.gated_residual_rms_norm(residual, update, alpha, weight, **options))


CASES: dict[str, tuple[Operation, Callable[[], list[torch.Tensor]]]] = {
    "contrastive": (_contrastive, lambda: [_unit(6, 8), _unit(6, 8), torch.tensor(14.0)]),
    "multi_label": (_multi_label, lambda: [_unit(4, 8), _unit(8, 8), torch.tensor(14.0)]),
    "group_assign": (_grouping, lambda: [torch.randn(2, n, 8) for n in (3, 9, 9)]),
    "cross_attention": (_attention, lambda: [torch.randn(1, 2, n, 8) for n in (5, 6, 6)]),
    "residual": (_residual, lambda: [torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8)]),
    "residual_norm": (
        _residual_norm,
        lambda: [torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(1), torch.rand(8)],
    ),
}
everywhere = pytest.mark.parametrize("backend", ["torch", "triton"])
every_operation = pytest.mark.parametrize("name", CASES)


def _run(operation: Operation, inputs: list[torch.Tensor], backend: str) -> tuple[torch.Tensor, ...]:
    """The result and its gradients, backward under the caller's autocast too."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = operation(*leaves, backend=backend)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad((out * weights).sum() if out.dim() else out, leaves)


@everywhere
@every_operation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_inputs_and_nothing_else(name, dtype, backend):
    torch.manual_seed(1)
    operation, make = CASES[name]
    # Values that both types hold exactly, so casting the inputs rounds nothing and what differs is the arithmetic.
    inputs = [x.to(torch.bfloat16).to(dtype) for x in make()]
    if name in ("contrastive", "multi_label"):
        inputs[2] = inputs[2].float()
    outside = _run(operation, inputs, backend)
    with torch.autocast("cpu", dtype=dtype):
        inside = _run(operation, inputs, backend)
    for expected, found in zip(outside, inside, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_a_small_contrastive_loss_survives_autocast():
    """Float64 on the rounded features is the truth; in bfloat16 arithmetic the loss would come out negative."""
    torch.manual_seed(0)
    features = _unit(8, 64)
    other = torch.nn.functional.normalize(features + 0.05 * torch.randn(8, 64), dim=-1)
    image, text = (x.to(torch.bfloat16).float().requires_grad_() for x in (features, other))
    scale = torch.tensor(14.3)
    exact = kernels.contrastive_loss_reference(image.double(), text.double(), scale.double())
    expected = torch.autograd.grad(exact, (image, text))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kernels.contrastive_loss(image, text, scale)
        found = torch.autograd.grad(loss, (image, text))
    assert float(loss.detach()) == pytest.approx(exact.item(), rel=1e-3)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.01  # the gradient of a bfloat16 feature is bfloat16


@everywhere
@pytest.mark.parametrize("name", ["residual", "residual_norm", "cross_attention", "group_assign"])
def test_an_empty_input_stays_in_the_graph(name, backend):
    operation, make = CASES[name]
    inputs = [x[:0] if x.dim() >= 3 else x for x in make()]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = operation(*leaves, backend=backend)
    assert out.requires_grad
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@everywhere
@every_operation
@pytest.mark.parametrize("learning", [True, False], ids=["requires_grad", "constant"])
def test_forward_mode_is_an_error_and_not_zero(name, learning, backend):
    operation, make = CASES[name]
    inputs = [x.requires_grad_(learning) for x in make()]
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        operation(*[forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs], backend=backend)
    with pytest.raises(ValueError, match="forward-mode"):
        torch.func.jvp(
            lambda *xs: operation(*xs, backend=backend),
            tuple(x.detach() for x in inputs),
            tuple(torch.ones_like(x) for x in inputs),
        )
    with forward_ad.dual_level():  # without a tangent there is nothing to lose
        operation(*inputs, backend=backend)
