"""Every option of ``generate`` against Transformers', token by token; caches that are handed on; embeddings."""

import pytest
import torch
import transformers
from interloom.models.idefics import IdeficsCache
from interloom.models.idefics.generation.generation_config import GenerationConfig

ENDS = list(range(3, 30))  # many end tokens, so that rows and beams end at different lengths
NEW = list(range(30, 90))

OPTIONS = {
    "min_p": {"do_sample": True, "min_p": 0.3},
    "typical_p": {"do_sample": True, "typical_p": 0.4, "top_k": 0},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.02, "top_k": 0},
    "eta": {"do_sample": True, "eta_cutoff": 0.05, "top_k": 0},
    "several draws": {"do_sample": True, "num_return_sequences": 3},
    "drawn beams": {"do_sample": True, "num_beams": 3, "top_k": 5, "top_p": 0.8, "min_p": 0.01},
    "suppressed": {"suppress_tokens": [5, 7, *NEW[:20]]},
    "suppressed at first": {"begin_suppress_tokens": NEW},
    "bias": {"sequence_bias": {(7,): -10.0, (50,): 5.0, (50, 51): 30.0}},
    "bias as a list": {"sequence_bias": [[[50], 5.0]], "num_beams": 2},
    "end that is a bad word": {"bad_words_ids": [[5], [50], [7, 8]]},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [40 + row, 50, 60 + len(ids) % 3]},
    "prefix of beams": {"prefix_allowed_tokens_fn": lambda row, ids: [40 + row, 50, 60, 3], "num_beams": 3},
    "forced end": {"forced_eos_token_id": 44},
    "ends more likely": {"exponential_decay_length_penalty": (2, 1.8)},
    "prompt preferred": {"encoder_repetition_penalty": 1.6},
    "prompt's ngrams": {"encoder_no_repeat_ngram_size": 2},
    "normalised": {"renormalize_logits": True, "num_beams": 2},
    "no invalid numbers": {"remove_invalid_values": True},
    "repetition in beams": {"repetition_penalty": 1.9, "num_beams": 2},
    "least length": {"min_length": 18},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_transformers(name, pair_of, inputs_of):
    pair, inputs = pair_of(), inputs_of()
    options = {"max_new_tokens": 10, "eos_token_id": ENDS, **OPTIONS[name]}
    torch.manual_seed(3)
    ours = pair.ours.generate(**inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(ours, pair.theirs.generate(**inputs, **options))


def test_configurations_of_either_library(pair_of, inputs_of):
    pair, inputs = pair_of(), inputs_of()
    theirs = transformers.GenerationConfig(max_new_tokens=7, num_beams=2, eos_token_id=ENDS, pad_token_id=0)
    expected = pair.theirs.generate(**inputs, generation_config=theirs)
    ours = GenerationConfig(max_new_tokens=7, num_beams=2, eos_token_id=ENDS, pad_token_id=0)
    for config in (theirs, theirs.to_dict(), ours):
        assert torch.equal(pair.ours.generate(**inputs, generation_config=config), expected)
    own, pair.ours.generation_config = pair.ours.generation_config, ours
    try:
        assert torch.equal(pair.ours.generate(**inputs), expected)
        # A call's own options go before a file's.
        greedy = pair.theirs.generate(**inputs, max_new_tokens=3, eos_token_id=ENDS, do_sample=False)
        assert torch.equal(pair.ours.generate(**inputs, max_new_tokens=3, num_beams=1), greedy)
    finally:
        pair.ours.generation_config = own


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}])
def test_what_is_returned_equals_transformers(options, pair_of, inputs_of):
    pair, inputs = pair_of(), inputs_of()
    asked = {
        "max_new_tokens": 6, "eos_token_id": [33], "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True, "output_hidden_states": "num_beams" not in options, **options,
    }  # fmt: skip
    ours, theirs = pair.ours.generate(**inputs, **asked), pair.theirs.generate(**inputs, **asked)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)
    if "num_beams" in options:
        assert torch.equal(ours.beam_indices, theirs.beam_indices)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores)
        steps = pair.ours.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
        lengths = (ours.beam_indices >= 0).sum(1)
        torch.testing.assert_close(steps.sum(1) / lengths, ours.sequences_scores)
    else:
        # Of the prompt's padding nothing is promised.
        for mine, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
            torch.testing.assert_close(mine[-1][:, -1], other[-1][:, -1], atol=1e-4, rtol=1e-4)
        weights = pair.ours.generate(
            **inputs, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True, **options
        ).attentions
        assert len(weights) == 2
        torch.testing.assert_close(weights[1][0][:, :, -1].sum(-1), torch.ones(2, 4))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_embeddings_in_place_of_ids(options, pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    expected = model.generate(**inputs, max_new_tokens=6, **options)
    embeds = model.model.embed_tokens(inputs["input_ids"])
    both = model.generate(**inputs, inputs_embeds=embeds, max_new_tokens=6, **options)
    assert torch.equal(both, expected)
    ids = inputs.pop("input_ids")
    alone = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=6, **options)
    assert torch.equal(alone, expected[:, ids.shape[1] :])


def test_a_returned_cache_is_gone_on_from(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    expected = model.generate(**inputs, max_new_tokens=9)
    first = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    new = first.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, new, dtype=torch.long)), 1)
    seen = inputs["image_attention_mask"]
    seen = torch.cat((seen, seen[:, -1:].expand(-1, new, -1)), 1)
    more = model.generate(
        first.sequences,
        mask,
        past_key_values=first.past_key_values,
        pixel_values=inputs["pixel_values"],
        image_attention_mask=seen,
        max_new_tokens=5,
    )
    assert torch.equal(more, expected)
    with pytest.raises(ValueError, match="whole prompt"):
        model.generate(first.sequences[:, :5], past_key_values=first.past_key_values)


def test_tuples_and_caches_of_transformers_as_past(pair_of, inputs_of):
    pair, inputs = pair_of(), inputs_of()
    token = torch.tensor([[40], [41]])
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    seen = inputs["image_attention_mask"]
    images = {"pixel_values": inputs["pixel_values"]}
    ids = torch.cat((inputs["input_ids"], token), 1)
    whole = pair.theirs(ids, mask, image_attention_mask=torch.cat((seen, seen[:, -1:]), 1), **images)
    theirs = pair.theirs(**inputs, use_cache=True).past_key_values
    documented = pair.ours(**inputs, use_cache=True).past_key_values.to_legacy_cache()
    assert documented[0][0].shape == (2, 4, 12, 8)
    for past in (documented, theirs):
        step = pair.ours(token, mask, past_key_values=past, image_attention_mask=seen[:, -1:], **images)
        assert isinstance(step.past_key_values, IdeficsCache)
        torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="tuple of"):
        pair.ours(token, past_key_values=("key", "value"))


def test_criteria_time_and_what_stands_at_the_beginning(pair_of, inputs_of):
    pair, inputs = pair_of(), inputs_of()

    class AtFifteen(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 15)

    criteria = transformers.StoppingCriteriaList([AtFifteen()])
    assert pair.ours.generate(**inputs, stopping_criteria=criteria).shape == (2, 15)
    assert (
        pair.ours.generate(**inputs, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 14]).shape[1]
        == 14
    )
    assert pair.ours.generate(**inputs, max_new_tokens=400, max_time=0.05, eos_token_id=[]).shape[1] < 412
    assert pair.ours.generate(max_new_tokens=2).tolist()[0][0] == pair.ours.config.bos_token_id
    # Without a mask, padding is what equals the padding token.
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    blank = {"pixel_values": torch.zeros(2, 1, 3, 28, 28), "image_attention_mask": torch.zeros(2, 4, 1)}
    expected = pair.theirs.generate(ids, **blank, max_new_tokens=5, do_sample=False)
    assert torch.equal(pair.ours.generate(ids, max_new_tokens=5), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokns": 4}, "max_new_tokns"),
        ({"assistant_model": object()}, "assisted decoding"),
        ({"num_beams": 4, "num_beam_groups": 2}, "groups of beams"),
        ({"penalty_alpha": 0.6}, "contrastive search"),
        ({"min_p": 2.0, "do_sample": True}, "min_p is 2.0"),
        ({"sequence_bias": {}}, "sequence_bias"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, "allowed no token"),
        ({"generation_config": 3}, "generation_config is a int"),
        ({"use_cache": False, "past_key_values": ((torch.zeros(2, 4, 3, 8),) * 2,) * 4}, "use_cache=False"),
        (
            {"cache_implementation": "static", "return_dict_in_generate": True, "output_attentions": True},
            "static",
        ),
    ],
)
def test_options_that_are_refused(options, message, pair_of, inputs_of):
    with pytest.raises(ValueError, match=message):
        pair_of().ours.generate(**inputs_of(), **options)
