"""The gated residual and its RMSNorm form: accuracy on both paths, gradients, contracts, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.kernels import (
    gated_residual,
    gated_residual_reference,
    gated_residual_rms_norm,
    gated_residual_rms_norm_reference,
)
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def _inputs(shape, per_channel, dtype=torch.float64, parameters=None, seed=0, alpha=0.5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    width = shape[-1]
    tensors = [
        normal(*shape).to(dtype),
        normal(*shape).to(dtype),
        (alpha * normal(width if per_channel else 1)).to(parameters or dtype),
        (1 + 0.2 * normal(width)).to(parameters or dtype),
    ]
    row_mask = torch.rand(shape[:-1], generator=generator) < 0.7
    return [tensor.requires_grad_() for tensor in tensors], row_mask


def _plain(residual, update, alpha, weight, row_mask):
    """What a user would write, in the dtype of the inputs."""
    gated = alpha.to(update.dtype).tanh() * update
    if row_mask is not None:
        gated = gated * row_mask[..., None]
    out = residual + gated
    return out, F.rms_norm(out, out.shape[-1:], weight.to(out.dtype), EPS)


def _both(inputs, row_mask, backend):
    """(sum, sum and norm of the fused form), as one tuple of outputs."""
    residual, update, alpha, weight = inputs
    alone = gated_residual(residual, update, alpha, row_mask, backend=backend)
    return alone, *gated_residual_rms_norm(
        residual, update, alpha, weight, row_mask, norm_eps=EPS, backend=backend
    )


def _all_grads(outs, inputs, grads):
    alone, summed, norm = outs
    first = torch.autograd.grad(alone, inputs[:3], grads[0])
    return *first, *torch.autograd.grad((summed, norm), inputs, grads[1:])


def _check_accuracy(inputs, row_mask, backend):
    """Error at most twice PyTorch's own in this precision plus twice the rounding of the result."""
    dtype = inputs[0].dtype
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(inputs[0].shape, generator=generator).to(dtype) for _ in range(3)]
    ours = _both(inputs, row_mask, backend)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, norm = _plain(*exact, row_mask)
    truths = (out, out, norm)
    usual, usual_norm = _plain(*inputs, row_mask)
    theirs = (usual, usual, usual_norm)
    ours = *ours, *_all_grads(ours, inputs, grads)
    truths = *truths, *_all_grads_kept(truths, exact, [grad.double() for grad in grads])
    theirs = *theirs, *_all_grads_kept(theirs, inputs, grads)
    for got, reference, true in zip(ours, theirs, truths, strict=True):
        assert got.dtype == reference.dtype
        rounding = (true.to(got.dtype).add(0.3).sub(0.3).double() - true).abs().max()
        assert (got - true).abs().max() <= 2 * (reference - true).abs().max() + 2 * rounding


def _all_grads_kept(outs, inputs, grads):
    alone, summed, norm = outs
    first = torch.autograd.grad(alone, inputs[:3], grads[0], retain_graph=True)
    return *first, *torch.autograd.grad((summed, norm), inputs, grads[1:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_accuracy(backend, dtype, per_channel, masked):
    inputs, row_mask = _inputs((2, 13, 200), per_channel, dtype)
    _check_accuracy(inputs, row_mask if masked else None, backend)


@given(
    shape=st.sampled_from([(1, 1, 1), (1, 1, 7), (3, 5, 64), (11, 40)]),
    per_channel=st.booleans(),
    mask=st.sampled_from(["none", "some", "all", "no row"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=min(8, settings().max_examples), deadline=None)
def test_paths_agree_on_ragged_shapes(shape, per_channel, mask, dtype, seed):
    inputs, row_mask = _inputs(shape, per_channel, dtype, torch.float32, seed)
    row_mask = {
        "none": None,
        "some": row_mask,
        "all": torch.ones_like(row_mask),
        "no row": torch.zeros_like(row_mask),
    }[mask]
    grads = [torch.ones_like(inputs[0])] * 3
    results = []
    for backend in ("torch", "triton"):
        outs = _both(inputs, row_mask, backend)
        results.append((*outs, *_all_grads(outs, inputs, grads)))
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if mask == "no row":
        assert torch.equal(results[1][0], inputs[0])
        assert not results[1][4].any()
        assert not results[1][5].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_alpha_of_zero_learns(backend, per_channel):
    inputs, row_mask = _inputs((2, 9, 16), per_channel, torch.float32, alpha=0.0)
    residual, update, alpha, _ = inputs
    out = gated_residual(residual, update, alpha, row_mask, backend=backend)
    assert torch.equal(out, residual)
    grad = torch.randn_like(out)
    (d_alpha,) = torch.autograd.grad(out, alpha, grad)
    ungated = (grad * update * row_mask[..., None]).sum((0, 1) if per_channel else None)
    torch.testing.assert_close(d_alpha, ungated.view(alpha.shape))
    assert d_alpha.abs().min() > 0


@pytest.mark.parametrize("alpha", [1e-6, -1e-4, 0.01, -0.2499, 0.25, 1.0, -3.0, 20.0])
def test_gate_is_tanh_to_the_last_bits(alpha):
    gate = torch.tensor([alpha])
    out = gated_residual(torch.zeros(1, 16), torch.ones(1, 16), gate, backend="triton")
    torch.testing.assert_close(out[0, :1].double(), gate.double().tanh(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masked_rows_are_never_read(backend, poisoned_empty):
    inputs, row_mask = _inputs((2, 9, 16), True, torch.bfloat16)
    with torch.no_grad():
        inputs[1][~row_mask] = float("nan")
    outs = _both(inputs, row_mask, backend)
    results = *outs, *_all_grads(outs, inputs, [torch.ones_like(inputs[0])] * 3)
    assert all(tensor.isfinite().all() for tensor in results)
    assert torch.equal(outs[0][~row_mask], inputs[0][~row_mask])
    assert not results[4][~row_mask].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeats_and_strides_are_bitwise_equal(backend):
    inputs, row_mask = _inputs((3, 6, 24), True, torch.bfloat16)
    strided = [
        tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in inputs[:2]
    ]
    grads = [torch.randn(3, 6, 24).bfloat16() for _ in range(3)]
    results = []
    for tensors in (inputs, inputs, [*strided, *inputs[2:]]):
        outs = _both(tensors, row_mask, backend)
        results.append((*outs, *_all_grads(outs, tensors, grads)))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_fused_form_is_the_sum_then_the_norm():
    inputs, row_mask = _inputs((2, 9, 48), False, torch.bfloat16)
    alone, summed, norm = _both(inputs, row_mask, "triton")
    assert torch.equal(alone, summed)
    expected = F.rms_norm(alone.float(), (48,), inputs[3].float(), EPS).bfloat16()
    torch.testing.assert_close(norm, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradcheck(backend, per_channel):
    inputs, row_mask = _inputs((1, 4, 5), per_channel)

    def call(residual, update, alpha, weight):
        if backend == "reference":
            alone = gated_residual_reference(residual, update, alpha, row_mask)
            return alone, *gated_residual_rms_norm_reference(residual, update, alpha, weight, row_mask)
        return _both((residual, update, alpha, weight), row_mask, backend)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("triton", [False, True])
def test_opcheck(triton):
    inputs, row_mask = _inputs((6, 16), True, torch.float32)
    torch.library.opcheck(torch.ops.interloom.gated_residual.default, (*inputs[:3], row_mask, triton))
    torch.library.opcheck(torch.ops.interloom.gated_residual_rms_norm.default, (*inputs, None, 1e-6, triton))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_to_one_node(backend):
    inputs, row_mask = _inputs((2, 3, 16), False, torch.float32)
    graphs = []

    def keep(module, example_inputs):
        graphs.append(module)
        return module

    def call(residual, update, alpha, weight):
        return gated_residual_rms_norm(residual, update, alpha, weight, row_mask, backend=backend)

    expected = call(*inputs)
    for ours, theirs in zip(
        torch.compile(call, fullgraph=True, backend=keep)(*inputs), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    assert sum("interloom" in str(node.target) for node in graphs[0].graph.nodes) == 1
    outs = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    grads = [torch.ones_like(out) for out in outs]
    for ours, theirs in zip(
        torch.autograd.grad(outs, inputs, grads), torch.autograd.grad(expected, inputs, grads), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_and_activation_checkpointing():
    inputs, row_mask = _inputs((2, 3, 16), False, torch.float32)
    residual, update, alpha, weight = inputs
    with torch.autocast("cpu", torch.bfloat16):
        out, norm = gated_residual_rms_norm(residual, update.bfloat16(), alpha, weight, row_mask)
    assert out.dtype == norm.dtype == torch.float32
    expected = gated_residual(residual, update.bfloat16().float(), alpha, row_mask)
    assert torch.equal(out, expected)

    def call(*tensors):
        return gated_residual_rms_norm(*tensors, row_mask)[1]

    plain, again = call(*inputs), checkpoint(call, *inputs, use_reentrant=False)
    for ours, theirs in zip(
        torch.autograd.grad(again.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_offsets_beyond_32_bits():
    far = 2**31 + 8
    inputs, _ = _inputs((2, 16), False, torch.float16)
    spread = torch.empty(far + 16, dtype=torch.float16).as_strided((2, 16), (far, 1))
    spread.copy_(inputs[1].detach())
    grads = [torch.ones(2, 16).half()] * 3
    results = []
    for update in (inputs[1], spread.requires_grad_()):
        tensors = [inputs[0], update, *inputs[2:]]
        outs = _both(tensors, None, "triton")
        results.append((*outs, *_all_grads(outs, tensors, grads)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("update", lambda a: a["update"][:, :2]),
        ("update", lambda a: a["update"].double()),
        ("update", lambda a: a["update"].to("meta")),
        ("residual", lambda a: a["residual"].long()),
        ("alpha", lambda a: a["alpha"].repeat(3)),
        ("alpha", lambda a: a["alpha"].squeeze()),
        ("alpha", lambda a: a["alpha"].long()),
        ("weight", lambda a: a["weight"][:2]),
        ("weight", lambda a: a["weight"].to("meta")),
        ("row_mask", lambda a: a["row_mask"].float()),
        ("row_mask", lambda a: a["row_mask"][:1]),
        ("row_mask", lambda a: a["row_mask"][..., None]),
        ("backend", lambda a: "gpu"),
    ],
)
def test_refuses(name, change):
    (residual, update, alpha, weight), row_mask = _inputs((2, 3, 16), False, torch.float32)
    arguments = {"residual": residual, "update": update, "alpha": alpha, "row_mask": row_mask}
    gated_residual_rms_norm(**arguments, weight=weight)
    changed = {**arguments, "weight": weight, name: change({**arguments, "weight": weight})}
    with pytest.raises(ValueError, match=name):
        gated_residual_rms_norm(**changed)
    if name != "weight":
        del changed["weight"]
        with pytest.raises(ValueError, match=name):
            gated_residual(**changed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_on_a_gpu(dtype, per_channel):
    inputs, row_mask = _inputs((2, 300, 1000), per_channel, dtype)
    inputs = [tensor.detach().cuda().requires_grad_() for tensor in inputs]
    outs = _both(inputs, row_mask.cuda(), "auto")
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, norm = _plain(*exact, row_mask.cuda())
    usual, usual_norm = _plain(*inputs, row_mask.cuda())
    for got, reference, true in zip(outs, (usual, usual, usual_norm), (out, out, norm), strict=True):
        rounding = (true.to(dtype).add(0.3).sub(0.3).double() - true).abs().max()
        assert (got - true).abs().max() <= 2 * (reference - true).abs().max() + 2 * rounding
