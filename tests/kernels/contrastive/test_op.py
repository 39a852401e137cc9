"""Contrastive losses against definitions written out in float64: PyTorch path and Triton kernels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.kernels import (
    contrastive_loss,
    contrastive_loss_reference,
    multi_label_contrastive_loss,
    multi_label_contrastive_loss_reference,
)

MODES = ["plain", "identities", "targets", "multi", "multi-identities"]


def make(M, K, D, dtype=torch.float32, scale=20.0, device="cpu"):
    """(image [M, D], text [M, D] or [M, K, D] if K, scale), normalised."""
    generator = torch.Generator().manual_seed(M + D)
    image = F.normalize(torch.randn(M, D, generator=generator), dim=-1)
    shape = (M, K, D) if K else (M, D)
    text = F.normalize(torch.randn(shape, generator=generator), dim=-1)
    return [x.to(device, dtype).requires_grad_() for x in (image, text)] + [
        torch.tensor(scale, device=device, requires_grad=True)
    ]


def problem(mode, M):
    """(keyword arguments, K): targets or labels for the mode; K is 0 for one text an image."""
    generator = torch.Generator().manual_seed(M)
    if mode == "identities":
        return {"targets": torch.randint(0, max(1, M // 2), (M,), generator=generator)}, 0
    if mode == "targets":
        return {"targets": torch.rand(M, M, generator=generator).softmax(dim=1)}, 0
    if mode == "multi-identities":
        return {"labels": torch.randint(0, M + 1, (M, 3), generator=generator)}, 3
    return {}, 3 if mode == "multi" else 0


def dense(image, text, scale, *, targets=None, labels=None):
    """Both cross entropies from the whole matrix, entry by entry as the docstrings define them."""
    M = image.shape[0]
    K = text.shape[1] if text.dim() == 3 else 1
    logits = (scale.to(image.dtype) * (image @ text.reshape(M * K, -1).T)).to(
        torch.promote_types(image.dtype, torch.float32)
    )
    owner = torch.arange(M * K, device=image.device) // K
    if targets is not None and targets.is_floating_point():
        rows = columns = targets.to(logits.dtype)
    else:
        identity = torch.arange(M * K) if targets is None and labels is None else None
        identity = identity if identity is not None else (targets if labels is None else labels).flatten()
        identity = identity.to(image.device)
        # text j counts for image i once for every own text of i that is the same, shared among its copies
        own = (owner[None, :] == torch.arange(M, device=image.device)[:, None]).to(logits.dtype)
        same = (identity[:, None] == identity[None, :]).to(logits.dtype)
        columns = (own @ same) / same.sum(dim=0)
        rows = columns / K
    image_to_text = -(rows * logits.log_softmax(dim=1)).sum(dim=1).mean()
    text_to_image = -(columns * logits.log_softmax(dim=0)).sum(dim=0).mean()
    return (image_to_text + text_to_image) / 2


def operation(mode):
    return multi_label_contrastive_loss if mode.startswith("multi") else contrastive_loss


def assert_within(actual, low, exact, what, largest=0.0):
    """Error at most twice that of PyTorch in the same dtype, plus rounding (largest magnitudes).

    The ``largest`` numbers that were subtracted from one another have been rounded to float32, once on each side.
    """
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (low.double() - exact).abs().max() + 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed += 2 * 2.0**-24 * largest
    assert error <= allowed + 1e-7, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def check(mode, M, D, dtype, backend, device="cpu"):
    options, K = problem(mode, M)
    options = {name: x.to(device) for name, x in options.items()}
    inputs = make(M, K, D, dtype, device=device)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    loss = operation(mode)(*inputs, **options, backend=backend)
    low, exact = dense(*inputs, **options), dense(*wide, **options)
    assert loss.dtype == torch.float32
    # Logits of half-precision features may be exact in PyTorch; here they are scaled in base 2, so they round. Those
    # of float32 features are summed in two parts and need no such allowance.
    assert_within(loss, low, exact, "loss", 0.0 if dtype == torch.float32 else float(inputs[2].detach()))
    triples = (torch.autograd.grad(x, leaves) for x, leaves in ((loss, inputs), (low, inputs), (exact, wide)))
    for name, triple in zip(("image", "text", "logit_scale"), zip(*triples, strict=True), strict=True):
        assert_within(*triple, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_matches_float64(backend, mode, dtype):
    check(mode, 34, 24, dtype, backend)


@settings(max_examples=min(12, settings().max_examples), deadline=None)
@given(
    M=st.integers(1, 40),
    D=st.integers(1, 40),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    backend=st.sampled_from(["torch", "triton"]),
)
def test_ragged_shapes(M, D, mode, dtype, backend):
    check(mode, M, D, dtype, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_pair_alone_has_no_loss(backend):
    for seed in range(20):
        image, text = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(seed)).unbind()
        assert contrastive_loss(image, text, torch.tensor(14.3), backend=backend) == 0


@pytest.mark.parametrize("mode", ["multi", "multi-identities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_several_positives_of_one_image_alone(mode, dtype):
    check(mode, 1, 1, dtype, "triton")  # three logits of 20, whose sum must not round


def test_many_channels_and_several_tiles():
    check("plain", 40, 300, torch.bfloat16, "triton")  # more than a block of channels
    check("multi", 600, 8, torch.float32, "torch")


def test_several_launches_and_spans(monkeypatch):
    from interloom.kernels.contrastive import launch as contrastive_triton

    monkeypatch.setattr(contrastive_triton, "_BAND", 1)
    check("multi", 40, 8, torch.float32, "triton")


@pytest.mark.parametrize("mode", MODES)
def test_references_match_the_written_out_definition(mode):
    options, K = problem(mode, 7)
    inputs = [x.detach().double().requires_grad_() for x in make(7, K, 5)]
    reference = multi_label_contrastive_loss_reference if K else contrastive_loss_reference
    torch.testing.assert_close(reference(*inputs, **options), dense(*inputs, **options))
    assert torch.autograd.gradcheck(lambda *x: reference(*x, **options), inputs)
    assert torch.autograd.gradcheck(lambda *x: operation(mode)(*x, **options), inputs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hard_logits_stay_exact(backend):
    # Scale 100 and opposite features: a row whose logits lie 200 below another's must not underflow.
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(6, 3, generator=generator), dim=-1)
    text = torch.cat([image[:3], -image[3:]])
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor(100.0))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    loss, low, exact = contrastive_loss(*inputs, backend=backend), dense(*inputs), dense(*wide)
    triples = [torch.autograd.grad(x, leaves) for x, leaves in ((loss, inputs), (low, inputs), (exact, wide))]
    for actual, plain, wanted in [(loss, low, exact), *zip(*triples, strict=True)]:
        error, size = (actual.double() - wanted).abs().max(), wanted.abs().max()
        assert error <= 2 * (plain.double() - wanted).abs().max() + 5e-7 * size


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_features(backend):
    image = torch.randn(8, 9).T  # channels strided
    text = torch.randn(9, 20)[:, 3:11]  # rows strided
    inputs = [x.requires_grad_() for x in (image, text)] + [torch.tensor([2.0], requires_grad=True)]
    loss = contrastive_loss(*inputs, backend=backend)
    expected = dense(image, text, inputs[2])
    torch.testing.assert_close(loss, expected.reshape(()))
    for actual, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_beyond_int32(backend):
    image = torch.randn(1, 6).as_strided((1, 6), (2**33, 1))
    assert contrastive_loss(image, torch.randn(1, 6), torch.tensor(3.0), backend=backend).abs() < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_is_bitwise_repeatable(backend):
    inputs = make(40, 2, 8, torch.bfloat16)

    def run():
        return torch.autograd.grad(multi_label_contrastive_loss(*inputs, backend=backend), inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_triton_writes_everything_it_returns(poisoned_empty):
    inputs = make(40, 0, 8)
    loss = contrastive_loss(*inputs, backend="triton")
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, inputs)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["targets", "multi-identities"])
def test_operator_contract(mode, backend):
    from interloom.kernels.contrastive.op import _contrastive

    options, K = problem(mode, 5)
    image, text, scale = make(5, K, 4)
    arguments = (image, text.reshape(-1, 4).detach().requires_grad_(), scale)
    torch.library.opcheck(
        _contrastive, (*arguments, options.get("targets"), options.get("labels"), "", backend)
    )


def test_compiles_to_one_node_and_under_autocast_and_checkpointing():
    inputs = make(9, 0, 6)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(contrastive_loss, fullgraph=True, backend=backend)(*inputs)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("interloom" in target for target in targets) == 1
    plain = contrastive_loss(*inputs)
    torch.testing.assert_close(compiled, plain)
    expected = torch.autograd.grad(plain, inputs)
    ahead = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")(*inputs)
    again = torch.utils.checkpoint.checkpoint(contrastive_loss, *inputs, use_reentrant=False)
    for loss in (ahead, again):
        for actual, wanted in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = contrastive_loss(inputs[0], inputs[1].bfloat16(), inputs[2])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=2e-2, atol=2e-2)


def test_memory_grows_with_the_batch_and_not_with_its_square():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    inputs = make(2048, 0, 8)
    with Watch():
        contrastive_loss(*inputs).backward()
    assert largest <= 512 * 512 * 4  # one tile, not 2048 * 2048 * 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image": torch.zeros(4)}, "image"),
        ({"image": torch.zeros(4, 3, dtype=torch.int64)}, "image"),
        ({"text": torch.zeros(5, 3)}, "text"),
        ({"text": torch.zeros(4, 3, dtype=torch.float64)}, "text"),
        ({"text": torch.zeros(4, 3, device="meta")}, "text"),
        ({"logit_scale": torch.zeros(2)}, "logit_scale"),
        ({"logit_scale": 3.0}, "logit_scale"),
        ({"targets": torch.zeros(4, 5)}, "targets"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {"image": torch.zeros(4, 3), "text": torch.zeros(4, 3), "logit_scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=named):
        contrastive_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text": torch.zeros(4, 3)}, "text"),
        ({"text": torch.zeros(4, 0, 3)}, "text"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(4, 2)}, "labels"),
    ],
)
def test_bad_arguments_of_the_multi_label_form_are_named(change, named):
    arguments = {"image": torch.zeros(4, 3), "text": torch.zeros(4, 2, 3), "logit_scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=named):
        multi_label_contrastive_loss(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu(mode, dtype):
    check(mode, 1000, 256, dtype, "triton", device="cuda")
    check(mode, 256, 384, dtype, "triton", device="cuda")
