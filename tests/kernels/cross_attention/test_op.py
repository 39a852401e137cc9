"""Gated cross-attention on the CPU: against the dense definition, its contracts, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.kernels import gated_cross_attention, gated_cross_attention_reference, prepare_image_mask
from interloom.kernels.cross_attention import torch_path as cross_attention_torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def _dense_float64(query, key, value, seen, image_length, scale=None):
    """Attention by its formula, token by token, in float64; written apart from the product's reference."""
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for b in range(query.shape[0]):
        for t in range(query.shape[2]):
            images = seen[b, t].nonzero().flatten()
            if len(images) == 0:
                rows.append(query.new_zeros(query.shape[1], query.shape[3]))
                continue
            keys = (images[:, None] * image_length + torch.arange(image_length)).flatten()
            weight = torch.einsum("hd,hsd->hs", query[b, :, t], key[b, :, keys]).mul(scale).softmax(-1)
            rows.append(torch.einsum("hs,hsd->hd", weight, value[b, :, keys]))
    return torch.stack(rows).view(query.shape[0], query.shape[2], *rows[0].shape).transpose(1, 2)


def _inputs(batch, heads, tokens, images, length, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, width)] + 2 * [(batch, heads, images * length, width)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def _grads(out, inputs, grad):
    return torch.autograd.grad(out, inputs, grad, retain_graph=True)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 7, 33]),
    images=st.sampled_from([0, 1, 2, 5, 66]),
    length=st.sampled_from([1, 3, 8]),
    kind=st.sampled_from(["index", "one", "several", "none", "all"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=min(40, settings().max_examples), deadline=None)
def test_matches_definition(batch, heads, tokens, images, length, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, max(images, 1), (batch, tokens), generator=generator).clamp(max=images - 1)
    several = torch.rand(batch, tokens, images, generator=generator) < 0.3
    seen = {
        "index": index[..., None] == torch.arange(images),
        "one": index[..., None] == torch.arange(images),
        "several": several,
        "none": torch.zeros_like(several),
        "all": torch.ones_like(several),
    }[kind]
    inputs = _inputs(batch, heads, tokens, images, length, 4, seed=seed)
    expected = _dense_float64(*inputs, seen, length)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    given_mask = index if kind == "index" else seen
    for function in (gated_cross_attention, gated_cross_attention_reference):
        out = function(*inputs, given_mask, image_length=length)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        if seen.any():
            for ours, theirs in zip(_grads(out, inputs, grad), _grads(expected, inputs, grad), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("several", [False, True])
def test_low_precision_is_as_good_as_pytorch(dtype, several):
    images, length, tokens = 4, 16, 50
    inputs = _inputs(2, 2, tokens, images, length, 32, dtype)
    index = torch.arange(tokens).expand(2, -1) * (images + 1) // tokens - 1
    seen = index[..., None] >= torch.arange(images) if several else index[..., None] == torch.arange(images)
    out = gated_cross_attention(*inputs, seen, image_length=length)
    exact = _dense_float64(*inputs, seen, length)
    allowed = seen.repeat_interleave(length, 2)[:, None] | ~seen.any(-1)[:, None, :, None]
    plain = F.scaled_dot_product_attention(*inputs, attn_mask=allowed) * seen.any(-1)[:, None, :, None]
    grad = torch.randn_like(out)
    results = [(tensor, *_grads(tensor, inputs, grad.to(tensor.dtype))) for tensor in (out, plain, exact)]
    for ours, theirs, truth in zip(*results, strict=True):
        rounding = (truth.to(dtype).add(0.3).sub(0.3).double() - truth).abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2 * rounding


def test_scale_is_used():
    inputs = _inputs(1, 2, 9, 2, 5, 8)
    seen = torch.ones(1, 9, 2, dtype=torch.bool)
    out = gated_cross_attention(*inputs, seen, image_length=5, scale=0.7)
    torch.testing.assert_close(out, _dense_float64(*inputs, seen, 5, scale=0.7))


@pytest.mark.parametrize("kind", ["index", "several"])
def test_prepared_mask_is_the_mask(kind):
    inputs = _inputs(2, 2, 20, 3, 4, 8)
    mask = torch.arange(40).view(2, 20) % 4 - 1
    if kind == "several":
        mask = mask[..., None] >= torch.arange(3)
    prepared = prepare_image_mask(mask, images=3)
    expected = gated_cross_attention(*inputs, mask, image_length=4)
    assert torch.equal(gated_cross_attention(*inputs, prepared, image_length=4), expected)
    reference = gated_cross_attention_reference(*inputs, prepared, image_length=4)
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize("kind", ["index", "several"])
def test_images_nobody_looks_at_are_never_read(kind):
    query, key, value = _inputs(1, 2, 12, 4, 5, 8)
    with torch.no_grad():
        key[:, :, 10:15] = value[:, :, 10:15] = float("nan")
    index = torch.tensor([[-1, 0, 0, 0, 1, 1, 3, 3, 3, 3, 1, -1]])
    seen = index[..., None] == torch.arange(4)
    if kind == "several":
        seen[:, 6:, 0] = True
    out = gated_cross_attention(query, key, value, index if kind == "index" else seen, image_length=5)
    grads = _grads(out, (query, key, value), torch.ones_like(out))
    assert all(tensor.isfinite().all() for tensor in (out, *grads))
    empty = ~seen.any(-1)[0]
    assert not out[:, :, empty].any()
    assert not grads[0][:, :, empty].any()
    assert not grads[1][:, :, 10:15].any()
    assert not grads[2][:, :, 10:15].any()


def test_strided_inputs_and_repeats_are_bitwise_equal():
    inputs = _inputs(2, 3, 30, 3, 7, 8, torch.float32)
    strided = [
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs
    ]
    mask = torch.rand(2, 30, 3) < 0.5
    results = []
    for tensors in (inputs, strided, inputs):
        out = gated_cross_attention(*tensors, mask, image_length=7)
        results.append((out, *_grads(out, tensors, torch.ones_like(out))))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("function", [gated_cross_attention, gated_cross_attention_reference])
@pytest.mark.parametrize("kind", ["index", "several"])
def test_gradcheck(function, kind):
    inputs = _inputs(1, 2, 5, 2, 3, 4)
    index = torch.tensor([[-1, 0, 0, 1, 1]])
    mask = index if kind == "index" else index[..., None] >= torch.arange(2)
    assert torch.autograd.gradcheck(lambda *t: function(*t, mask, image_length=3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    mask = prepare_image_mask(torch.arange(24).view(2, 12) % 3 - 1, images=2)
    inputs = _inputs(2, 2, 12, 2, 4, 8, dtype)
    arguments = (*inputs, *mask.tensors, 2, 4, 0.3, False)
    torch.library.opcheck(torch.ops.interloom.gated_cross_attention.default, arguments)


@pytest.mark.parametrize("kind", ["index", "several", "prepared"])
def test_compiles_to_one_node(kind):
    inputs = _inputs(2, 2, 12, 2, 4, 8, torch.float32)
    mask = torch.arange(24).view(2, 12) % 3 - 1
    if kind == "several":
        mask = mask[..., None] >= torch.arange(2)
    if kind == "prepared":
        mask = prepare_image_mask(mask, images=2)
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module

    def call(*tensors):
        return gated_cross_attention(*tensors, mask, image_length=4)

    expected = call(*inputs)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), expected)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("interloom" in target for target in targets) == 1
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(_grads(out, inputs, grad), _grads(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_and_activation_checkpointing():
    inputs = _inputs(2, 2, 12, 2, 4, 8, torch.float32)
    mask = torch.arange(24).view(2, 12) % 3 - 1
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_cross_attention(*inputs, mask, image_length=4)
    assert out.dtype == torch.bfloat16
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    expected = gated_cross_attention(*low, mask, image_length=4)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(_grads(out, inputs, grad), _grads(expected, low, grad), strict=True):
        assert torch.equal(ours, theirs.float())

    def call(*tensors):
        return gated_cross_attention(*tensors, mask, image_length=4)

    expected = call(*inputs)
    again = checkpoint(call, *inputs, use_reentrant=False)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(_grads(again, inputs, grad), _grads(expected, inputs, grad), strict=True):
        assert torch.equal(ours, theirs)


def _valid():
    query, key, value = _inputs(2, 2, 6, 3, 4, 8, torch.float32)
    mask = torch.zeros(2, 6, dtype=torch.int64)
    return {"query": query, "key": key, "value": value, "image_mask": mask, "image_length": 4}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda a: a["query"][0]),
        ("query", lambda a: a["query"].long()),
        ("key", lambda a: a["key"][:, :, :-1]),
        ("key", lambda a: a["key"][:, :1]),
        ("key", lambda a: a["key"].double()),
        ("key", lambda a: a["key"].to("meta")),
        ("value", lambda a: a["value"][..., :4]),
        ("value", lambda a: a["value"].bfloat16()),
        ("image_length", lambda a: 0),
        ("image_length", lambda a: 4.0),
        ("image_mask", lambda a: a["image_mask"].float()),
        ("image_mask", lambda a: a["image_mask"].bool()),
        ("image_mask", lambda a: a["image_mask"][..., None]),
        ("image_mask", lambda a: a["image_mask"][:1]),
        ("image_mask", lambda a: a["image_mask"][:, :5]),
        ("image_mask", lambda a: torch.zeros(2, 6, 4, dtype=torch.bool)),
        ("image_mask", lambda a: a["image_mask"] + 3),
        ("image_mask", lambda a: a["image_mask"] - 2),
        ("image_mask", lambda a: a["image_mask"].to("meta")),
        ("image_mask", lambda a: None),
        ("image_mask", lambda a: prepare_image_mask(a["image_mask"], images=2)),
        ("backend", lambda a: "cuda"),
    ],
)
def test_refuses(name, change):
    arguments = _valid()
    gated_cross_attention(**arguments)
    arguments[name] = change(arguments)
    with pytest.raises(ValueError, match=name):
        gated_cross_attention(**arguments)


def test_prepare_refuses():
    with pytest.raises(ValueError, match="images"):
        prepare_image_mask(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="image_mask"):
        prepare_image_mask(torch.zeros(2, 3, 4, dtype=torch.bool), images=5)
    with pytest.raises(ValueError, match="image_mask"):
        prepare_image_mask(torch.full((2, 3), 4), images=4)


def test_work_is_that_of_the_images_looked_at():
    """Floating-point operations of the products, counted: 1 / N of the dense form, forward and backward."""
    tokens, images, length, width = 256, 8, 16, 32
    inputs = _inputs(1, 2, tokens, images, length, width, torch.float32)
    counts = []
    for mask in (
        torch.arange(tokens)[None] * images // tokens,
        torch.randint(0, images, (1, tokens)),
        torch.ones(1, tokens, images, dtype=torch.bool),
    ):
        compact = prepare_image_mask(mask, images=images).mask
        arguments = (compact, images, length, 0.2)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out, lse = cross_attention_torch.forward(*inputs, *arguments)
            cross_attention_torch.backward(out, *inputs, out, lse, *arguments)
        counts.append(counter.get_total_flops())
    dense = 14 * 2 * tokens * images * length * width
    assert counts == [dense // images, dense // images, dense]
