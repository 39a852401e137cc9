"""Each option of Transformers' ``GenerationConfig`` (5.23 and 4.37.2): honoured, or refused in a sentence.

Honoured means: the tokens are those of Transformers, for a value that asks for something.
"""

import pytest
import torch
import transformers

ENDS = list(range(3, 30))
# Not settings but marks of a file.
MARKS = {"_from_model_config", "transformers_version"}
OLD = {"forced_decoder_ids", "generation_kwargs"}  # of 4.37.2 alone
DRAWN = {"do_sample": True}
BEAMS = {"num_beams": 3}
ANSWER = {"return_dict_in_generate": True}

HONOURED = {
    "bad_words_ids": {"bad_words_ids": [[50], [7, 8]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(30, 90))},
    "bos_token_id": {"bos_token_id": 9},
    "do_sample": DRAWN,
    "early_stopping": {**BEAMS, "early_stopping": True},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.6},
    "eos_token_id": {"eos_token_id": list(range(20, 60))},
    "epsilon_cutoff": {**DRAWN, "epsilon_cutoff": 0.02, "top_k": 0},
    "eta_cutoff": {**DRAWN, "eta_cutoff": 0.05, "top_k": 0},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.8)},
    "forced_bos_token_id": {"forced_bos_token_id": 44},
    "forced_eos_token_id": {"forced_eos_token_id": 44},
    "length_penalty": {**BEAMS, "length_penalty": -2.0},
    "max_length": {"max_length": 17, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_time": {"max_time": 1e-9},
    "min_length": {"min_length": 18},
    "min_new_tokens": {"min_new_tokens": 6},
    "min_p": {**DRAWN, "min_p": 0.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_beams": BEAMS,
    "num_return_sequences": {**DRAWN, "num_return_sequences": 3},
    "output_attentions": {**ANSWER, "output_attentions": True},
    "output_hidden_states": {**ANSWER, "output_hidden_states": True},
    "output_logits": {**ANSWER, "output_logits": True},
    "output_scores": {**ANSWER, "output_scores": True},
    "pad_token_id": {"pad_token_id": 91},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {**BEAMS, "renormalize_logits": True},
    "repetition_penalty": {"repetition_penalty": 1.9},
    "return_dict_in_generate": ANSWER,
    "sequence_bias": {"sequence_bias": {(7,): -10.0, (50,): 5.0, (50, 51): 30.0}},
    "stop_strings": {"stop_strings": ["never said"]},
    "suppress_tokens": {"suppress_tokens": [5, 7, *range(30, 50)]},
    "temperature": {**DRAWN, "temperature": 3.0},
    "top_k": {**DRAWN, "top_k": 2},
    "top_p": {**DRAWN, "top_p": 0.5},
    "typical_p": {**DRAWN, "typical_p": 0.4, "top_k": 0},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    # They steer what is not there to be steered: the tokens stay.
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "decoder_start_token_id": {"decoder_start_token_id": 4},
    "disable_compile": {"disable_compile": True},
    "generation_kwargs": {"generation_kwargs": {}},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "num_assistant_tokens": {"num_assistant_tokens": 5},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant"},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "target_lookbehind": {"target_lookbehind": 3},
    "cache_config": {"cache_config": {}},
    "compile_config": {"compile_config": None},
    "max_cache_len": {"max_cache_len": 40},
}
REFUSED = {
    "assistant_early_exit": 2,
    "constraints": ["one"],
    "continuous_batching_config": {"a": 1},
    "diversity_penalty": 0.5,
    "dola_layers": "low",
    "force_words_ids": [[4]],
    "forced_decoder_ids": [[1, 4]],
    "guidance_scale": 1.5,
    "is_assistant": True,
    "low_memory": True,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "speculation_type": "mtp",
    "token_healing": True,
    "top_h": 0.4,
    "use_mtp": True,
    "watermarking_config": {"bias": 2.0},
}
# Arguments of the call that are no settings.
REFUSED_ARGUMENTS = {
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "custom_generate": "owner/name",
    "negative_prompt_attention_mask": torch.ones(1, 2),
    "negative_prompt_ids": torch.ones(1, 2, dtype=torch.long),
    "synced_gpus": True,
}
# What the other library would not run here, or answers with an error, is tried on ours alone against a plain call.
PLAIN = {"cache_implementation", "generation_kwargs", "cache_config", "prefill_chunk_size", "stop_strings"}


def test_the_list_is_whole():
    names = set(vars(transformers.GenerationConfig())) | OLD
    assert names - MARKS == HONOURED.keys() | REFUSED.keys()
    assert not HONOURED.keys() & REFUSED.keys()


class Reader:
    """A tokenizer for ``stop_strings``: one letter a token."""

    def decode(self, ids, **_):
        return "".join(chr(97 + int(i) % 26) for i in ids)

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_gives_the_same_tokens(name, pair_of, inputs_of):
    pair, inputs = pair_of(), inputs_of()
    options = {"max_new_tokens": 8, "eos_token_id": ENDS, **HONOURED[name]}
    torch.manual_seed(3)
    ours = pair.ours.generate(
        **inputs, **options, **({"tokenizer": Reader()} if name == "stop_strings" else {})
    )
    torch.manual_seed(3)
    other = {k: v for k, v in options.items() if k not in PLAIN}
    theirs = pair.theirs.generate(**inputs, **other)
    if options.get("return_dict_in_generate"):
        asked = name.removeprefix("output_")
        assert asked == "return_dict_in_generate" or len(ours[asked]) == len(theirs[asked])
        ours, theirs = ours.sequences, theirs.sequences
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_ARGUMENTS])
def test_what_is_refused_is_so_in_a_sentence_that_names_it(name, pair_of, inputs_of):
    value = {**REFUSED, **REFUSED_ARGUMENTS}[name]
    with pytest.raises(ValueError, match=rf"{name}=.*which generate does not follow") as caught:
        pair_of().ours.generate(**inputs_of(), max_new_tokens=2, **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("both_ends", [[5], [5, 50]])
def test_bad_words_that_are_end_tokens_stay_allowed(both_ends, pair_of, inputs_of):
    """A word that is an end token alone is no bad word, as there: the text could not end."""
    pair, inputs = pair_of(), inputs_of()
    first = pair.theirs.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=ENDS)[:, -1]
    ends = [*both_ends, int(first[0])]
    options = {"eos_token_id": ends, "bad_words_ids": [[end] for end in ends] + [[int(first[1])]]}
    if int(first[1]) == int(first[0]):
        options["bad_words_ids"] = [[end] for end in ends]
    ours = pair.ours.generate(**inputs, max_new_tokens=6, **options)
    assert torch.equal(ours, pair.theirs.generate(**inputs, max_new_tokens=6, **options))
    assert int(ours[0, 12]) == int(first[0])
