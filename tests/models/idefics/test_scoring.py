"""Scores behind one cached prompt against each continuation read with its prompt, in float64."""

import copy

import pytest
import torch
from interloom.models.idefics.generation.scoring import score_continuations

CONTINUATIONS = [[5], [7, 8], [7, 9, 11, 12], [7, 8, 3], [40, 41]]


def alone(model, inputs, row, continuation):
    """Log-probability of one continuation in one full forward pass, without padding and cache."""
    real = inputs["attention_mask"][row].bool()
    ids = torch.cat((inputs["input_ids"][row][real], torch.tensor(continuation)))[None]
    seen = inputs["image_attention_mask"][row][real]
    seen = torch.cat((seen, seen[-1:].expand(len(continuation), -1)))[None]
    pixels = inputs["pixel_values"][row][None].double()
    likely = model(input_ids=ids, pixel_values=pixels, image_attention_mask=seen).logits[0].log_softmax(-1)
    start = int(real.sum()) - 1
    return sum(likely[start + place, token] for place, token in enumerate(continuation))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("at_once", [1, 4, 512])
def test_scores_equal_full_sequences(pair_of, inputs_of, side, at_once):
    model = pair_of().ours
    inputs = inputs_of()
    if side == "right":
        inputs = {n: v if n == "pixel_values" else v.flip(1) for n, v in inputs.items()}
    found = score_continuations(model, CONTINUATIONS, **inputs, tokens_at_once=at_once)
    exact = copy.deepcopy(model).double()
    for row in range(2):
        expected = [alone(exact, inputs, row, ids) for ids in CONTINUATIONS]
        torch.testing.assert_close(found[row], torch.stack(expected), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_prompts_without_images(pair_of, inputs_of):
    model = pair_of().ours
    inputs = inputs_of()
    inputs["image_attention_mask"][0] = 0  # one prompt of text beside one with images
    found = score_continuations(model, CONTINUATIONS, **inputs)
    exact = copy.deepcopy(model).double()
    for row in range(2):
        expected = torch.stack([alone(exact, inputs, row, ids) for ids in CONTINUATIONS])
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-4)
    text = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(
        score_continuations(model, CONTINUATIONS, **text)[0], found[0], rtol=1e-5, atol=1e-4
    )


def test_an_empty_continuation_is_refused(pair_of, inputs_of):
    with pytest.raises(ValueError, match="continuation is empty"):
        score_continuations(pair_of().ours, [[1], []], **inputs_of())
