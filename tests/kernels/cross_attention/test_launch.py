"""The Triton kernels of gated cross-attention, interpreted: accuracy, exact traffic, repeatability, addressing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interloom.kernels import gated_cross_attention, gated_cross_attention_reference, prepare_image_mask
from interloom.kernels.bench.traffic import count_traffic
from interloom.kernels.cross_attention.launch import bytes_moved

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(batch, heads, tokens, images, length, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, width)] + 2 * [(batch, heads, images * length, width)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _latest(batch, tokens, images, first=0):
    """Each token sees the image before it, the first ``first`` none; rows of the batch differ."""
    places = torch.arange(tokens)[None] - first + torch.arange(batch)[:, None]
    return (places * images // max(tokens - first, 1)).clamp(-1, images - 1).where(places >= 0, -1)


def _seen(index, images, several):
    columns = torch.arange(images)
    return (index[..., None] >= columns) & (index[..., None] >= 0) if several else index[..., None] == columns


def _run(inputs, mask, length, grad, backend="triton"):
    out = gated_cross_attention(*inputs, mask, image_length=length, backend=backend)
    return out, *torch.autograd.grad(out, inputs, grad)


def _expected_errors(query, key, value, grad, allowed, dtype):
    """Errors of (out, d_query, d_key, d_value) that roundings alone bring, of inputs in float64.

    Every operation is rounded to float32, whatever goes to a product or to memory to ``dtype``; sums are made in any
    order, and the gradient of the scores is that of the softmax with the row's sum taken from ``out``. Roundings are
    independent, so variances add: a sum of n terms errs by sqrt(n) roundings of a partial sum, whose size is between
    the whole sum's and that of a random walk.
    """
    unit, store = 2.0**-24, torch.finfo(dtype).eps / 2
    scale, root = query.shape[-1] ** -0.5, query.shape[-1]

    def product(a, b, error):
        return error @ b**2 + a.shape[-1] * unit**2 * ((a @ b) ** 2 + a**2 @ b**2)

    score = query @ key.mT * scale
    weight = score.masked_fill(~allowed, float("-inf")).softmax(-1)
    out, d_weight = weight @ value, grad @ value.mT
    delta = (grad * out).sum(-1, keepdim=True)
    d_score = weight * (d_weight - delta)
    of_score = product(query, key.mT, torch.zeros_like(query)) * scale**2 + 3 * (unit * score) ** 2
    of_weight = weight**2 * (of_score + (weight**2 * of_score).sum(-1, keepdim=True) + 4 * unit**2)
    used = of_weight + (store * weight) ** 2
    of_out = product(weight, value, used)
    of_delta = (grad**2 * (of_out + (store * out) ** 2)).sum(-1, keepdim=True)
    of_delta += root * unit**2 * (delta**2 + ((grad * out) ** 2).sum(-1, keepdim=True))
    of_d_weight = product(grad, value.mT, torch.zeros_like(grad))
    of_d_score = of_weight * (d_weight - delta) ** 2 + weight**2 * (of_d_weight + of_delta)
    of_d_score += (store**2 + 2 * unit**2) * d_score**2
    squares = (
        of_out,
        product(d_score, key, of_d_score) * scale**2,
        product(d_score.mT, query, of_d_score.mT) * scale**2,
        product(weight.mT, grad, used.mT),
    )
    return [square.max().sqrt() for square in squares]


def _check_accuracy(inputs, mask, seen, length, lucky=False):
    """Error at most twice PyTorch's own in this precision plus twice the rounding of the result.

    Of a few numbers PyTorch's own error may by luck be a third of the usual: ``lucky`` lets it count as no less than
    what roundings are expected to bring.
    """
    dtype = inputs[0].dtype
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = _run(inputs, mask, length, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = gated_cross_attention_reference(*exact, seen, image_length=length)
    truths = truth, *torch.autograd.grad(truth, exact, grad.double())
    has_image = seen.any(-1)[:, None, :, None]
    allowed = seen.repeat_interleave(length, 2)[:, None] | ~has_image
    score = (inputs[0] @ inputs[1].mT * inputs[0].shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    plain = (score.softmax(-1) @ inputs[2]) * has_image
    theirs = plain, *torch.autograd.grad(plain, inputs, grad)
    errors = [(usual - true).abs().max() for usual, true in zip(theirs, truths, strict=True)]
    if lucky:
        expected = _expected_errors(*(x.detach() for x in exact), grad.double() * has_image, allowed, dtype)
        errors = [max(pair) for pair in zip(errors, expected, strict=True)]
    for got, error, true in zip(ours, errors, truths, strict=True):
        rounding = (true.to(dtype).add(0.3).sub(0.3).double() - true).abs().max()
        assert (got - true).abs().max() <= 2 * error + 2 * rounding
    assert not (ours[0] * ~has_image).any()
    assert not (ours[1] * ~has_image).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("width", "length"), [(64, 64), (80, 7), (96, 100), (128, 64)])
def test_accuracy(dtype, several, width, length):
    index = _latest(1, 140, 2, first=9)
    inputs = _inputs(1, 1, 140, 2, length, width, dtype)
    seen = _seen(index, 2, several)
    _check_accuracy(inputs, seen if several else index, seen, length)


@pytest.mark.parametrize("several", [False, True])
def test_accuracy_of_long_images(several):
    index = _latest(1, 40, 2, first=3)
    inputs = _inputs(1, 1, 40, 2, 257, 64, torch.bfloat16)
    seen = _seen(index, 2, several)
    _check_accuracy(inputs, seen if several else index, seen, 257)


@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 2, 65, 130]),
    images=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([1, 2, 6]),
    kind=st.sampled_from(["index", "several", "none", "all", "one token"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
# More images than a word has bits, most of which nobody sees: a program each, so not drawn again and again.
@example(batch=2, tokens=65, images=66, length=1, kind="several", dtype=torch.float32, seed=0)
@example(batch=1, tokens=65, images=66, length=2, kind="index", dtype=torch.bfloat16, seed=1)
@settings(max_examples=min(12, settings().max_examples), deadline=None)
def test_accuracy_of_ragged_shapes(batch, tokens, images, length, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(-1, min(images, 3), (batch, tokens), generator=generator)
    seen = mask[..., None] == torch.arange(images)
    if kind == "several":
        mask = seen = seen | (torch.arange(images) == images - 1) & (torch.arange(tokens) > 1)[None, :, None]
    elif kind in {"none", "all"}:
        mask = seen = torch.full_like(seen[..., : min(images, 3)], kind == "all")
    elif kind == "one token":
        mask = seen = seen & (torch.arange(tokens) == tokens - 1)[None, :, None]
    inputs = _inputs(batch, 1, tokens, seen.shape[-1], length, 16, dtype, seed)
    _check_accuracy(inputs, mask, seen, length, lucky=True)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores(several, sign):
    """Scores near ±400: exponentials relative to anything but the row's own peak would overflow."""
    index = _latest(1, 20, 2, first=3)
    inputs = _inputs(1, 1, 20, 2, 5, 16, torch.float32)
    with torch.no_grad():
        inputs[0].abs_().mul_(40)
        inputs[1].abs_().mul_(sign)
    seen = _seen(index, 2, several)
    grad = torch.ones_like(inputs[0])
    ours = _run(inputs, seen if several else index, 5, grad)
    theirs = _run(inputs, seen, 5, grad, "torch")
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("several", [False, True])
def test_backends_agree_without_images(several):
    inputs = _inputs(2, 1, 5, 0, 4, 16, torch.float32)
    mask = torch.zeros(2, 5, 0, dtype=torch.bool) if several else torch.full((2, 5), -1)
    results = _run(inputs, mask, 4, torch.ones(2, 1, 5, 16))
    assert not any(tensor.any() for tensor in results)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("several", [False, True])
def test_images_nobody_looks_at_are_never_loaded(several):
    tokens, images, length = 200, 4, 10
    index = _latest(1, tokens, images, first=70)
    index[index == 2] = 3
    seen = _seen(index, images, several)
    seen[..., 2] = False
    query, key, value = _inputs(1, 2, tokens, images, length, 16, torch.bfloat16)
    with torch.no_grad():
        key[:, :, 20:30] = value[:, :, 20:30] = float("nan")
    results = _run((query, key, value), seen if several else index, length, torch.ones_like(query))
    assert all(tensor.isfinite().all() for tensor in results)
    for tensor in results[:2]:
        assert not tensor[:, :, :70].any()
    for tensor in results[2:]:
        assert not tensor[:, :, 20:30].any()


@pytest.mark.parametrize("several", [False, True])
def test_repeats_and_strides_are_bitwise_equal(several):
    index = _latest(2, 150, 3, first=5)
    mask = _seen(index, 3, several) if several else index
    inputs = _inputs(2, 2, 150, 3, 20, 16, torch.bfloat16)
    strided = [
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs
    ]
    grad = torch.randn(2, 2, 150, 16).bfloat16()
    wide = torch.randn(2, 2, 150, 32).bfloat16()
    wide[..., ::2] = grad
    runs = [
        _run(inputs, mask, 20, grad),
        _run(inputs, mask, 20, grad),
        _run(strided, mask, 20, wide[..., ::2]),
    ]
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_order_of_tokens_does_not_matter():
    """With one image a token, tiles gather their tokens, so any order costs and gives the same."""
    index = _latest(1, 256, 4)
    inputs = _inputs(1, 1, 256, 4, 16, 16, torch.float32)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shuffled = [inputs[0].detach()[:, :, order].requires_grad_(), *inputs[1:]]
    grad = torch.randn(1, 1, 256, 16)
    with count_traffic() as straight:
        results = _run(inputs, index, 16, grad)
    with count_traffic() as mixed:
        others = _run(shuffled, index[:, order], 16, grad[:, :, order])
    assert mixed.moved == straight.moved
    assert mixed.flops == straight.flops
    torch.testing.assert_close(others[0], results[0][:, :, order])
    torch.testing.assert_close(others[1], results[1][:, :, order])
    torch.testing.assert_close(others[2:], results[2:])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "width", "dtype"),
    [
        (2, 1, 64, 16, torch.bfloat16),
        (2, 2, 70, 20, torch.bfloat16),
        (2, 2, 9, 16, torch.float16),
        (1, 1, 5, 20, torch.bfloat16),
        (1, 2, 30, 16, torch.float32),  # one image a token of few keys, by the kernels of many
    ],
)
def test_bytes_are_as_said(several, batch, heads, length, width, dtype):
    tokens, images = 300, 3
    index = _latest(batch, tokens, images, first=20)
    mask = _seen(index, images, several) if several else index
    lists = prepare_image_mask(mask, images=images, backend="triton")
    inputs = _inputs(batch, heads, tokens, images, length, width, dtype)
    said = bytes_moved(inputs[0], lists, length)
    with count_traffic() as traffic:
        _run(inputs, lists, length, torch.ones(batch, heads, tokens, width).to(dtype))
    assert traffic.atomic == 0
    assert {name: kernel.moved for name, kernel in traffic.kernels.items()} == said.forward | said.backward
    # The lists are little beside what they lead to.
    assert said.floor.forward < said.moved_forward < 1.5 * said.floor.forward
    assert said.floor.backward < said.moved_backward < 1.5 * said.floor.backward


@pytest.mark.parametrize("seed", [0, 1])
def test_one_image_a_token_costs_one_nth(seed):
    """However its boundaries lie, an image costs its tokens and at most 15 rows more."""
    tokens, images = 400, 4
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(tokens, generator=generator)[:images].sort().values
    index = torch.searchsorted(starts, torch.arange(tokens), right=True)[None] - 1
    inputs = _inputs(1, 1, tokens, images, 64, 16, torch.float16)
    with count_traffic() as traffic:
        _run(inputs, index, 64, torch.ones_like(inputs[0]))
    each = (index == torch.arange(images)[:, None]).sum(1)
    per_row = 7 * 2 * 64 * 16  # two products forward, five backward
    assert traffic.flops == per_row * int((-(-each // 16) * 16).sum())
    assert traffic.flops <= 1.15 / images * per_row * tokens * images


@pytest.mark.parametrize("which", ["query", "key"])
def test_offsets_beyond_32_bits(which):
    """Rows 2**31 elements apart: memory that is never touched is never backed."""
    far = 2**31 + 8
    inputs = [tensor.detach() for tensor in _inputs(1, 1, 2, 2, 1, 16, torch.float16)]
    at = ["query", "key"].index(which)
    spread = torch.empty(far + 16, dtype=torch.float16).as_strided((1, 1, 2, 16), (0, 0, far, 1))
    spread.copy_(inputs[at])
    index = torch.tensor([[0, 1]])
    grad = torch.ones(1, 1, 2, 16).half()
    expected = _run([tensor.clone().requires_grad_() for tensor in inputs], index, 1, grad)
    inputs[at] = spread
    got = _run([tensor.requires_grad_() for tensor in inputs], index, 1, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_opcheck_and_compile():
    lists = prepare_image_mask(_latest(1, 6, 2), images=2, backend="triton")
    inputs = _inputs(1, 1, 6, 2, 4, 16, torch.float32)
    torch.library.opcheck(
        torch.ops.interloom.gated_cross_attention.default, (*inputs, *lists.tensors, 2, 4, 0.3, True)
    )

    def call(*tensors):
        return gated_cross_attention(*tensors, _latest(1, 6, 2), image_length=4, backend="triton")

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    expected = call(*inputs)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_float64_is_refused():
    inputs = _inputs(1, 1, 2, 1, 1, 16, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        gated_cross_attention(*inputs, torch.zeros(1, 2).int(), image_length=1, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("width", "length"), [(128, 64), (80, 257), (64, 64)])
def test_on_a_gpu(several, width, length):
    index = _latest(2, 1000, 5, first=30).cuda()
    seen = _seen(index.cpu(), 5, several).cuda()
    inputs = [
        tensor.detach().cuda().requires_grad_()
        for tensor in _inputs(2, 4, 1000, 5, length, width, torch.bfloat16)
    ]
    grad = torch.randn_like(inputs[0])
    mask = seen if several else index
    runs = [_run(inputs, mask, length, grad, "auto") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = gated_cross_attention_reference(*exact, seen, image_length=length)
    truths = truth, *torch.autograd.grad(truth, exact, grad.double())
    has_image = seen.any(-1)[:, None, :, None]
    allowed = seen.repeat_interleave(length, 2)[:, None] | ~has_image
    plain = F.scaled_dot_product_attention(*inputs, attn_mask=allowed) * has_image
    theirs = plain, *torch.autograd.grad(plain, inputs, grad)
    for got, usual, true in zip(runs[0], theirs, truths, strict=True):
        rounding = (true.bfloat16().add(0.3).sub(0.3).double() - true).abs().max()
        assert (got - true).abs().max() <= 2 * (usual - true).abs().max() + 2 * rounding
