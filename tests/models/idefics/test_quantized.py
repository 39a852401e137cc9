"""Stored matrices against bitsandbytes' own layers and against the weight they stand for."""

import pytest
import torch
from interloom.models.idefics.quantized import Storage, quantize_layers
from torch import nn

bitsandbytes = pytest.importorskip("bitsandbytes")

STORAGES = [Storage(), Storage(double_quant=False), Storage(block_size=128), Storage("int8")]


def layer(storage, shape=(48, 136), *, meta=False):
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    plain = None if meta else model[0].weight.detach().clone()
    quantize_layers(model, ["0"], storage)
    return model[0], plain


@pytest.mark.parametrize("storage", STORAGES)
def test_products_and_gradients_are_those_of_the_dequantised_weight(storage):
    stored, plain = layer(storage)
    weight = stored.dequantized()
    assert 0 < (weight - plain).abs().max() < 0.25 * plain.abs().max()
    x = torch.randn(2, 3, 136, requires_grad=True)
    y = stored(x)
    seed = torch.randn_like(y)
    y.backward(seed)
    reference = torch.nn.functional.linear(x.detach().double(), weight.double(), stored.bias.double())
    torch.testing.assert_close(y.double(), reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), seed.double() @ weight.double(), atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in stored.parameters())


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_stored_numbers_are_those_of_the_library_s_own_layer(double_quant):
    stored, plain = layer(Storage(double_quant=double_quant))
    theirs = bitsandbytes.nn.Linear4bit(
        136, 48, compute_dtype=torch.float32, compress_statistics=double_quant, quant_type="nf4"
    )
    theirs.load_state_dict({"weight": plain, "bias": stored.bias})
    theirs = theirs.to("cpu")
    assert torch.equal(theirs.weight.view(-1), stored.weight.view(-1))
    x = torch.randn(5, 136)
    torch.testing.assert_close(stored(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_eight_bits_are_those_of_the_library_s_own_layer():
    stored, plain = layer(Storage("int8"))
    theirs = bitsandbytes.nn.Linear8bitLt(136, 48, has_fp16_weights=False)
    theirs.load_state_dict({"weight": plain, "bias": stored.bias})
    theirs = theirs.to("cpu")
    assert torch.equal(theirs.weight.CB, stored.weight)
    assert torch.equal(theirs.weight.SCB.view(-1), stored.scale)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(48, 136), (33, 129)])
def test_shapes_without_memory_are_the_real_ones(storage, shape):
    found, planned = (
        {name: (p.shape, p.dtype) for name, p in layer(storage, shape, meta=meta)[0].named_parameters()}
        for meta in (False, True)
    )
    assert found == planned


@pytest.mark.parametrize(("compute", "inside"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_type_of_products_follows_autocast_unless_told(compute, inside):
    stored, _ = layer(Storage(compute_dtype=compute))
    x = torch.randn(4, 136)
    with torch.autocast("cpu", torch.bfloat16):
        y = stored(x)
    reference = torch.nn.functional.linear(x.to(inside), stored.dequantized(inside), stored.bias.to(inside))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.to(torch.bfloat16))


def test_too_narrow_a_matrix_is_one_sentence():
    with pytest.raises(ValueError, match=r"rows of 32 are narrower than model\.quantization\.block_size=64"):
        layer(Storage(), (48, 32))
