"""What the decoder's layers run in bfloat16, as a GPU would see it: calls of attention, and waits of the host."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from interloom.kernels.bench.synchronisations import Synchronisations
from interloom.models import IdeficsConfig, IdeficsForVisionText2Text
from interloom.models.idefics.attention import Segments
from interloom.models.idefics.layers import apply_rotary, product_dtype, rotary_tables
from torch.utils._python_dispatch import _disable_current_modes

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 9 + [1] * 7])
PADDED = torch.where(DOCUMENTS == 2, -1, DOCUMENTS)


@pytest.fixture
def varlen_calls(monkeypatch):
    """Variable-length attention on the CPU, by its definition, and how often it and that of one document are called."""
    calls = Counter()
    attend = F.scaled_dot_product_attention

    def varlen(query, key, value, edges, edges_again, longest, longest_again, *, window_size):
        calls["varlen"] += 1
        assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        assert edges.dtype == torch.int32
        assert edges is edges_again
        with _disable_current_modes():
            assert longest == longest_again == int(edges.diff().max())
        assert window_size == (-1, 0)
        documents = torch.bucketize(torch.arange(len(query)), edges[1:], right=True)
        mask = (documents[:, None] == documents).tril()
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return attend(query, key, value, attn_mask=mask)[0].transpose(0, 1)

    def alone(*arguments, **options):
        calls["sdpa"] += 1
        return attend(*arguments, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr("interloom.models.idefics.attention.F.scaled_dot_product_attention", alone)
    monkeypatch.setattr("interloom.models.idefics.attention.has_variable_length", lambda device: True)
    return calls


@pytest.mark.parametrize("ids", [DOCUMENTS, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_layers_call_variable_length_attention_once_each_and_never_wait(
    ids, recompute, settings_of, varlen_calls, monkeypatch
):
    model = IdeficsForVisionText2Text(IdeficsConfig(**settings_of())).train()
    if recompute:
        model.gradient_checkpointing_enable()
    decoder, waits = model.model, Synchronisations(imagined=True)
    decode = decoder.decode

    def watched(*arguments):
        with torch.autocast("cpu", torch.bfloat16), waits:
            return decode(*arguments)

    monkeypatch.setattr(decoder, "decode", watched)
    tokens = torch.arange(32).view(2, 16) % 90
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(input_ids=tokens, document_ids=ids).last_hidden_state
    with waits:
        out.float().sum().backward()
    assert varlen_calls == {"varlen": len(decoder.layers) * (2 if recompute else 1)}
    assert waits.count == 0, waits.seen


def test_variable_length_attention_gives_what_one_call_a_document_gives(
    settings_of, varlen_calls, monkeypatch
):
    model = IdeficsForVisionText2Text(IdeficsConfig(**settings_of())).eval()
    tokens = torch.arange(32).view(2, 16) % 90
    for ids in (DOCUMENTS, PADDED):
        results = []
        for variable in (True, False):
            monkeypatch.setattr(
                "interloom.models.idefics.attention.has_variable_length", lambda device, v=variable: v
            )
            with torch.autocast("cpu", torch.bfloat16):
                results.append(model(input_ids=tokens, document_ids=ids).logits[ids >= 0])
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
    assert varlen_calls["varlen"] == 2 * len(model.model.layers)


def test_rotated_queries_have_the_dtype_of_autocast():
    x = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)[None]
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.double()) == torch.float64
        tables = rotary_tables(positions, 8, 1e4, product_dtype(x))
    rotated = apply_rotary(x.bfloat16(), *tables)
    assert rotated.dtype == torch.bfloat16
    exact = apply_rotary(x.double(), *rotary_tables(positions, 8, 1e4, torch.float64))
    assert (rotated.double() - exact).abs().max() < 4 * 2**-8 * x.abs().max()


def test_autocast_reaches_the_attention_of_packed_documents(settings_of, monkeypatch):
    seen = set()
    attend = F.scaled_dot_product_attention

    def watched(query, key, value, *args, **options):
        seen.update((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, *args, **options)

    monkeypatch.setattr("interloom.models.idefics.attention.F.scaled_dot_product_attention", watched)
    model = IdeficsForVisionText2Text(IdeficsConfig(**settings_of())).eval()
    ids = torch.arange(32).view(2, 16) % 90
    with torch.autocast("cpu", torch.bfloat16):
        low = model(input_ids=ids, document_ids=DOCUMENTS).logits
    assert seen == {torch.bfloat16}
    exact = model(input_ids=ids, document_ids=DOCUMENTS).logits
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_edges_and_places_are_of_the_real_tokens(monkeypatch):
    padded, full = (Segments.from_document_ids(ids) for ids in (PADDED, DOCUMENTS))
    assert padded.on(torch.device("cpu")).edges is None
    monkeypatch.setattr("interloom.models.idefics.attention.has_variable_length", lambda device: True)
    placed = padded.on(torch.device("cpu"))
    assert placed.edges is not None
    assert placed.places is not None
    assert placed.edges.tolist() == [0, 5, 12, 21, 28]
    assert placed.places.tolist() == (PADDED.flatten() >= 0).nonzero().flatten().tolist()
    assert placed.longest == 9
    assert full.on(torch.device("cpu")).places is None
