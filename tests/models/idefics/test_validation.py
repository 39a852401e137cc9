"""Bad input is met with one sentence that says what to do."""

import pytest
import torch
from interloom.models.idefics import IdeficsCache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "exactly one of input_ids"),
        ({"inputs_embeds": torch.zeros(2, 12, 32)}, "exactly one of input_ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 12, 7)}, r"give \[B, T, 32\]"),
        ({"input_ids": torch.zeros(2, 12)}, "integer tensor"),
        ({"input_ids": torch.zeros(12, dtype=torch.long)}, r"give \[B, T\]"),
        ({"input_ids": torch.full((2, 12), 100)}, "resize_token_embeddings"),
        ({"input_ids": torch.full((2, 12), -1)}, "resize_token_embeddings"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "empty"),
        ({"attention_mask": torch.ones(2, 11)}, "attention_mask has shape"),
        ({"image_attention_mask": None}, "without image_attention_mask"),
        ({"image_attention_mask": torch.ones(2, 11, 3)}, "image_attention_mask has shape"),
        ({"image_attention_mask": torch.ones(2, 12, 4)}, "4 images a row but 3"),
        ({"image_attention_mask": torch.ones(2, 12)}, "image_attention_mask has shape"),
        ({"pixel_values": None}, "no images were given"),
        ({"pixel_values": torch.zeros(1, 3, 3, 28, 28)}, "1 rows but the text 2"),
        ({"pixel_values": torch.zeros(3, 3, 28, 28)}, "pixel_values has shape"),
        ({"pixel_values": torch.zeros(2, 0, 3, 28, 28)}, "no images"),
        ({"pixel_values": torch.zeros(2, 3, 3, 42, 28)}, "interpolate_pos_encoding"),
        ({"pixel_values": torch.zeros(2, 3, 1, 28, 28)}, "height, width"),
        ({"pixel_values": [torch.zeros(3, 28, 28), torch.zeros(3, 14, 14)]}, "mixed sizes"),
        ({"perceiver_embeddings": torch.zeros(2, 3, 5, 32)}, "given twice"),
        ({"labels": torch.zeros(2, 11, dtype=torch.long)}, "labels has shape"),
        ({"labels": torch.full((2, 12), 100)}, "labels holds values"),
        ({"past_key_values": ()}, "IdeficsCache"),
        ({"past_key_values": IdeficsCache(3)}, "3 layers but the model 4"),
    ],
)
def test_bad_input(change, message, pair_of, inputs_of):
    with pytest.raises(ValueError, match=message):
        pair_of().ours(**{**inputs_of(), **change})


def test_a_cache_of_another_batch(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="batch of 2 but this one has 1"):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="cache that holds 3"):
        model(
            torch.zeros(2, 1, dtype=torch.long),
            past_key_values=cache,
            pixel_values=torch.zeros(2, 5, 3, 28, 28),
        )


def test_latents_for_a_model_without_resampler(pair_of, inputs_of):
    inputs = inputs_of()
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="without a resampler"):
        pair_of(use_resampler=False).ours(**inputs, perceiver_embeddings=torch.zeros(2, 3, 5, 32))
