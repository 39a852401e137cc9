"""Packed rows against the same documents run one by one."""

import pytest
import torch
from interloom.models.idefics import image_attention_mask
from torch import nn

IMAGE, EOS = 97, 2


def document(length, images, generator):
    """Ids with ``images`` image tokens, and pixels for them."""
    ids = torch.randint(3, 90, (length,), generator=generator)
    places = torch.randperm(length - 2, generator=generator)[:images].sort().values + 1
    ids[places] = IMAGE
    return ids, torch.randn(images, 3, 28, 28, generator=generator)


def pack(documents, length, rows):
    """Documents put into rows one after the other: model inputs."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    owners = torch.full((len(rows), length), -1)
    most = max(sum(len(documents[d][1]) for d in row) for row in rows)
    pixels = torch.zeros(len(rows), most, 3, 28, 28)
    for r, row in enumerate(rows):
        begin = first = 0
        for d in row:
            tokens, pictures = documents[d]
            ids[r, begin : begin + len(tokens)] = tokens
            owners[r, begin : begin + len(tokens)] = d
            pixels[r, first : first + len(pictures)] = pictures
            begin, first = begin + len(tokens), first + len(pictures)
    return {"input_ids": ids, "document_ids": owners, "pixel_values": pixels}


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(5)
    return [document(n, k, generator) for n, k in ((9, 2), (14, 1), (5, 0), (11, 3), (7, 1))]


@pytest.mark.parametrize("attention", ["latest", "all_previous"])
@pytest.mark.parametrize("crossing", [True, False])
def test_packed_equals_one_by_one(attention, crossing, documents, pair_of):
    model = pair_of().ours
    packed = pack(documents, 26, [[0, 1], [2, 3, 4]])
    # A mask made without knowing the documents lets tokens see the images of the one before.
    known = None if crossing else packed["document_ids"]
    packed["image_attention_mask"] = image_attention_mask(
        packed["input_ids"], IMAGE, None, packed["pixel_values"].shape[1], attention, known
    )
    labels = packed["input_ids"].masked_fill(packed["document_ids"] < 0, -100)
    model.zero_grad()
    together = model(**packed, labels=labels)
    together.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    total, count, logits = 0.0, 0, {}
    for index, (ids, pixels) in enumerate(documents):
        images = {}
        if len(pixels):
            images = {
                "pixel_values": pixels[None],
                "image_attention_mask": image_attention_mask(ids[None], IMAGE, None, len(pixels), attention),
            }
        alone = model(ids[None], **images, labels=ids[None])
        logits[index] = alone.logits[0]
        alone.loss.mul(alone.token_count / together.token_count).backward()
        total, count = total + alone.loss_sum, count + alone.token_count
    assert count == together.token_count
    torch.testing.assert_close(together.loss, total / count, atol=1e-5, rtol=1e-5)
    for index, expected in logits.items():
        actual = together.logits[packed["document_ids"] == index]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in gradients or not gradients[name].any()
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_positions_do_not_imply_documents(pair_of, inputs_of):
    """Padded prompts have odd positions; only document_ids cut attention."""
    model = pair_of().ours
    inputs = inputs_of(left_padding=False)
    odd = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]]).expand(2, -1)
    cut = torch.tensor([[0] * 4 + [1] * 6 + [2] * 2]).expand(2, -1)
    with torch.no_grad():
        uncut = model(**inputs, position_ids=odd).logits
        changed = inputs["input_ids"].clone()
        changed[:, 0] += 1
        assert not torch.allclose(
            uncut[:, -1], model(**{**inputs, "input_ids": changed}, position_ids=odd).logits[:, -1]
        )
        packed = model(**inputs, document_ids=cut).logits
        again = model(**{**inputs, "input_ids": changed}, document_ids=cut).logits
    assert torch.equal(packed[:, 4:], again[:, 4:])


def test_only_images_that_are_seen_are_encoded(documents, pair_of):
    model = pair_of().ours
    packed = pack(documents, 26, [[0, 1], [2, 3, 4]])
    packed["image_attention_mask"] = image_attention_mask(
        packed["input_ids"], IMAGE, None, packed["pixel_values"].shape[1], document_ids=packed["document_ids"]
    )
    sizes = []
    hook = model.model.perceiver_resampler.register_forward_hook(
        lambda _, args, __: sizes.append(len(args[0]))
    )
    states = model(**packed).image_hidden_states
    hook.remove()
    assert sizes == [7]
    assert states.shape == (2, 4, 5, 32)
    assert states.any(-1).any(-1).sum() == 7


def test_masked_blocks_are_not_computed(pair_of, monkeypatch):
    """Counted, not timed: the scores of a packed row are those of its documents."""
    seen = []
    attention = nn.functional.scaled_dot_product_attention

    def watch(query, key, *args, **kwargs):
        if kwargs.get("is_causal"):
            seen.append(query.shape[2] * key.shape[2])
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch)
    owners = torch.tensor([[0] * 10 + [1] * 20 + [2] * 2 + [-1] * 3])
    pair_of().ours(torch.randint(3, 90, (1, 35)), document_ids=owners)
    assert seen == [100, 400, 4] * 4


def test_dense_and_segmented_attention_agree(documents, pair_of):
    model = pair_of().ours
    packed = pack(documents, 26, [[0, 1], [2, 3, 4]])
    packed["image_attention_mask"] = image_attention_mask(packed["input_ids"], IMAGE, None, 4)
    real = packed["document_ids"] >= 0
    with torch.no_grad():
        segmented = model(**packed).logits
        dense = model(**packed, output_attentions=True)
    torch.testing.assert_close(dense.logits[real], segmented[real], atol=1e-5, rtol=1e-5)
    assert dense.attentions[0].shape == (2, 4, 26, 26)


def test_recomputed_activations_give_the_same_gradients(documents, pair_of):
    model = pair_of().ours
    packed = pack(documents, 26, [[0, 1], [2, 3, 4]])
    packed["image_attention_mask"] = image_attention_mask(packed["input_ids"], IMAGE, None, 4)
    results = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.train().zero_grad()
        model(**packed, labels=packed["input_ids"]).loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    model.eval()
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(*(r[name] for r in results), msg=name)


def test_bad_document_ids_are_refused(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of(left_padding=False)
    ids = torch.zeros(2, 12, dtype=torch.long)
    for wrong, message in (
        ({"document_ids": ids[:, :5]}, "document_ids has shape"),
        ({"document_ids": ids.float()}, "integer"),
        ({"document_ids": torch.tensor([[0] * 4 + [1] * 4 + [0] * 4] * 2)}, "two separate places"),
        ({"document_ids": ids - 1}, "disagrees"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **wrong)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be continued"):
        model(inputs["input_ids"], document_ids=ids, past_key_values=cache)
