"""Group assignment against an independent definition in float64: PyTorch path and Triton kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.kernels import group_assign, group_assign_reference
from interloom.kernels.common.philox import gumbel_noise

SEED, ROW = -5, 2**40 + 3


def make(B, G, N, C, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, G, C), (B, N, C), (B, N, C))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def eager(query, key, value, *, noise=None, hard=True, tau=1.0, eps=1.0, choice=None):
    """The operation as models write it, in the dtype of the inputs: (out, soft map without noise, choice)."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    soft = ((logits if noise is None else logits + noise.to(logits.dtype)) / tau).softmax(dim=1)
    if choice is None:
        choice = soft.argmax(dim=1)
    weights = soft
    if hard:
        groups = torch.arange(query.shape[1], device=query.device)
        weights = (groups[:, None] == choice[:, None]).to(soft.dtype) - soft.detach() + soft
    out = weights / (weights.sum(dim=2, keepdim=True) + eps) @ value
    return out, (logits / tau).softmax(dim=1), choice


def assert_within(actual, low, exact, what):
    """Error at most twice that of PyTorch in the same dtype, plus rounding (largest magnitudes)."""
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (low.double() - exact).abs().max() + 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def check(inputs, backend, *, hard, gumbel, tau=1.0, eps=1.0, assignment=False):
    query, key, _value = inputs
    (B, G, _), N, device = query.shape, key.shape[1], query.device
    noise = None
    if gumbel:
        rows = torch.arange(ROW, ROW + B, device=device)
        noise = gumbel_noise(torch.tensor(SEED, device=device), rows, G, N)
    options = {"hard": hard, "gumbel": gumbel, "tau": tau, "eps": eps, "seed": SEED, "row_offset": ROW}
    out, soft = group_assign(*inputs, **options, return_assignment=assignment, backend=backend)
    assert (soft is not None) == assignment
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in (out, query @ key.mT)]

    def gradients(results, leaves):
        total = (results[0] * weights[0].to(results[0].dtype)).sum()
        if assignment:
            total = total + (results[1] * weights[1].to(results[1].dtype)).sum()
        return torch.autograd.grad(total, leaves)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = eager(*wide, noise=noise, hard=hard, tau=tau, eps=eps)
    low = eager(*inputs, noise=noise, hard=hard, tau=tau, eps=eps, choice=exact[2])
    assert_within(out, low[0], exact[0], "out")
    if assignment:
        assert_within(soft, low[1], exact[1], "assignment")
    triples = zip(gradients((out, soft), inputs), gradients(low, inputs), gradients(exact, wide), strict=True)
    for name, triple in zip(("query", "key", "value"), triples, strict=True):
        assert_within(*triple, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("gumbel", [True, False], ids=["gumbel", "plain"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_matches_float64(backend, gumbel, hard, dtype):
    check(make(1, 5, 20, 20, dtype), backend, hard=hard, gumbel=gumbel, assignment=True)


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_triton_more_groups_and_tokens_than_a_tile(hard):
    check(make(1, 18, 34, 8), "triton", hard=hard, gumbel=True, tau=0.5, eps=0.1, assignment=True)
    check(make(1, 3, 70, 5), "triton", hard=hard, gumbel=True, tau=2.0)


@settings(max_examples=min(8, settings().max_examples), deadline=None)
@given(
    B=st.integers(1, 2),
    G=st.integers(1, 18),
    N=st.integers(1, 40),
    C=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    hard=st.booleans(),
    gumbel=st.booleans(),
    backend=st.sampled_from(["torch", "triton"]),
)
def test_ragged_shapes(B, G, N, C, dtype, hard, gumbel, backend):
    check(make(B, G, N, C, dtype, seed=G * N), backend, hard=hard, gumbel=gumbel)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_non_contiguous_inputs_and_gradients(backend):
    query = torch.randn(6, 2, 3).permute(1, 2, 0).requires_grad_()  # [2, 3, 6], channels strided
    key, value = torch.randn(2, 9, 2, 6).unbind(2)  # tokens strided
    key.requires_grad_()
    value.requires_grad_()
    check([query, key, value], backend, hard=True, gumbel=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_beyond_int32(backend):
    # Two rows of one storage, more than 2**31 elements apart; expand keeps the storage itself small.
    storage = torch.randn(1, 9, 6)
    key = storage.expand(2, 9, 6).as_strided((1, 9, 6), (2**33, 6, 1))
    query, value = torch.randn(1, 3, 6), torch.randn(1, 9, 6)
    out, _ = group_assign(query, key, value, backend=backend)
    torch.testing.assert_close(out, group_assign_reference(query, key, value)[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_is_bitwise_repeatable(backend):
    inputs = make(1, 5, 70, 20, torch.bfloat16)

    def run():
        out, soft = group_assign(*inputs, gumbel=True, seed=3, return_assignment=True, backend=backend)
        return torch.autograd.grad(out.float().sum() + soft.float().square().sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_splitting_the_batch_changes_nothing(backend):
    inputs = make(3, 4, 21, 16)
    options = {"gumbel": True, "seed": 11, "backend": backend}
    whole, _ = group_assign(*inputs, **options)
    parts = [group_assign(*(x[b : b + 1] for x in inputs), row_offset=b, **options)[0] for b in range(3)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_uses_the_noise_of_forward(backend):
    # value = identity makes out / its sum the hard map; its gradient by value must be that same map.
    B, G, N = 1, 6, 16
    query, key, _ = make(B, G, N, N)
    value = torch.eye(N)[None].requires_grad_()
    out, _ = group_assign(query, key, value, gumbel=True, seed=4, eps=1e-6, backend=backend)
    chosen = (out > 0).float()
    for g in range(G):
        (gradient,) = torch.autograd.grad(out[0, g].sum(), value, retain_graph=True)
        expected = chosen[0, g] / chosen[0, g].sum().clamp(min=1)
        torch.testing.assert_close(gradient[0].mean(dim=1), expected)


def test_triton_writes_everything_it_returns(poisoned_empty):
    inputs = make(1, 5, 20, 20)
    out, soft = group_assign(*inputs, gumbel=True, seed=3, return_assignment=True, backend="triton")
    grads = torch.autograd.grad(out.sum() + soft.square().sum(), inputs)
    assert all(x.isfinite().all() for x in (out, soft, *grads))


def test_reference_gradients():
    inputs = [x.detach().double().requires_grad_() for x in make(2, 3, 4, 5)]
    options = {"hard": False, "gumbel": True, "tau": 0.7, "seed": 1, "return_assignment": True}
    assert torch.autograd.gradcheck(lambda *x: group_assign_reference(*x, **options), inputs)
    assert torch.autograd.gradcheck(lambda *x: group_assign(*x, **options), inputs, fast_mode=True)


def test_seed_forms():
    inputs = make(1, 3, 8, 4)
    run = lambda seed: group_assign(*inputs, gumbel=True, hard=False, seed=seed)[0]  # noqa: E731
    assert torch.equal(run(7), run(torch.tensor([7])))
    assert not torch.equal(run(7), run(8))
    torch.manual_seed(0)
    first = run(None)
    assert not torch.equal(first, run(None))
    torch.manual_seed(0)
    assert torch.equal(first, run(None))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operator_contract(backend):
    from interloom.kernels.group_assign.op import _group_assign

    inputs = make(1, 3, 9, 6)
    arguments = (*inputs, torch.tensor(3), 0, True, True, 1.0, 1.0, True, backend)
    torch.library.opcheck(_group_assign, arguments)


def test_compiles_to_one_node_and_under_autocast_and_checkpointing():
    inputs = make(2, 3, 9, 6)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def loss(*x):
        return group_assign(*x, gumbel=True, seed=5)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)(*inputs)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("interloom" in target for target in targets) == 1
    torch.testing.assert_close(compiled, loss(*inputs))
    ahead = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for actual, wanted in zip(torch.autograd.grad(ahead, inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    again = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(again, inputs), expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = group_assign(inputs[0], inputs[1].bfloat16(), inputs[2])
    assert out.dtype == torch.bfloat16


def test_training_keeps_no_map():
    inputs = make(2, 64, 196, 8)
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept = max(kept, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        group_assign(*inputs, gumbel=True, seed=1)
    assert kept < 2 * 64 * 196


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query": torch.zeros(3, 4)}, "query"),
        ({"query": torch.zeros(1, 3, 4, dtype=torch.int64)}, "query"),
        ({"key": torch.zeros(2, 5, 4)}, "key"),
        ({"key": torch.zeros(1, 5, 4, dtype=torch.float64)}, "key"),
        ({"value": torch.zeros(1, 6, 4)}, "value"),
        ({"value": torch.zeros(1, 5, 4, device="meta")}, "value"),
        ({"tau": 0.0}, "tau"),
        ({"eps": -1.0}, "eps"),
        ({"seed": torch.zeros(2, dtype=torch.int64), "gumbel": True}, "seed"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {"query": torch.zeros(1, 3, 4), "key": torch.zeros(1, 5, 4), "value": torch.zeros(1, 5, 4)}
    with pytest.raises(ValueError, match=named):
        group_assign(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("G", "N", "C"), [(64, 196, 384), (8, 64, 384), (100, 300, 96)])
def test_on_a_gpu(G, N, C, dtype):
    check(make(3, G, N, C, dtype, device="cuda"), "triton", hard=True, gumbel=True)
    check(make(3, G, N, C, dtype, device="cuda"), "triton", hard=False, gumbel=True, assignment=True)
