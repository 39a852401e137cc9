"""Arguments and folders that came to Transformers' IDEFICS over time: they mean here what they mean there."""

import copy

import pytest
import torch
import transformers
from interloom.models import IdeficsForVisionText2Text, IdeficsModel


def test_labels_that_are_already_shifted(pair_of, inputs_of):
    pair, inputs = pair_of(additional_vocab_size=0), inputs_of(vocab=97)
    targets = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(5))
    targets[0, :4] = -100
    labels = inputs["input_ids"]
    expected = pair.theirs(**inputs, labels=labels, shift_labels=targets).loss
    assert pair.ours(**inputs, shift_labels=targets).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    both = pair.ours(**inputs, labels=labels, shift_labels=targets, num_items_in_batch=7)
    expected = pair.theirs(**inputs, labels=labels, shift_labels=targets, num_items_in_batch=7).loss
    assert both.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert both.logits.shape == (2, 12, 97)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"output_attentions": True}])
def test_generate_follows_position_ids(pair_of, inputs_of, options):
    pair, inputs = pair_of(), inputs_of()
    mask = inputs["attention_mask"]
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = pair.ours.generate(**inputs, max_new_tokens=6, **options)
    shared = {"return_dict_in_generate": True} if "output_attentions" in options else {}

    def with_positions(model, ids):
        result = model.generate(**inputs, position_ids=ids, max_new_tokens=6, **options, **shared)
        return result.sequences if shared else result

    assert torch.equal(with_positions(pair.ours, counted), plain)
    # Tokens that stand three apart, and the first new one right behind the last of them.
    assert torch.equal(with_positions(pair.ours, 3 * counted), with_positions(pair.theirs, 3 * counted))
    with pytest.raises(ValueError, match="position_ids has shape"):
        pair.ours.generate(**inputs, position_ids=counted[:, 1:])


def test_the_decoder_and_the_whole_model_load_from_each_others_folders(pair_of, inputs_of, tmp_path):
    pair, inputs = pair_of(), inputs_of()
    pair.ours.save_pretrained(tmp_path / "whole")
    decoder, info = IdeficsModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight", "lm_head.additional_fc.weight"}
    assert not info["missing_keys"]
    states = decoder(**inputs).last_hidden_state
    torch.testing.assert_close(states, pair.theirs.model(**inputs).last_hidden_state, atol=1e-4, rtol=1e-4)
    decoder.save_pretrained(tmp_path / "decoder")
    with pytest.warns(UserWarning, match=r"without its head: lm_head.weight, .* newly drawn"):
        whole, info = IdeficsForVisionText2Text.from_pretrained(
            tmp_path / "decoder", output_loading_info=True
        )
    _, theirs = transformers.IdeficsForVisionText2Text.from_pretrained(
        tmp_path / "decoder", output_loading_info=True
    )
    assert info["missing_keys"] == theirs["missing_keys"]
    assert torch.equal(whole.model(**inputs).last_hidden_state, states)
    assert whole.lm_head.weight.std() > 0
    assert not any(p.is_meta for p in whole.parameters())
    with pytest.warns(UserWarning, match="without its head"):
        half = IdeficsForVisionText2Text.from_pretrained(tmp_path / "decoder", dtype="bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_a_head_that_is_tied_is_not_missing(pair_of, tmp_path, recwarn):
    pair_of(tie_word_embeddings=True).ours.model.save_pretrained(tmp_path)
    model, info = IdeficsForVisionText2Text.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [w for w in recwarn if "head" in str(w.message)]


def test_what_is_missing_is_an_error_unless_it_is_asked_about(pair_of, tmp_path):
    model = copy.deepcopy(pair_of().ours)
    state = model.state_dict()
    kept = {name: value for name, value in state.items() if name != "model.layers.1.mlp.up_proj.weight"}
    model.save_pretrained(tmp_path, state_dict={**kept, "bogus": torch.ones(2)})
    with pytest.raises(ValueError, match=r"missing weights \(1\).*unknown weights \(1\): bogus"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path)
    loaded, info = IdeficsForVisionText2Text.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.mlp.up_proj.weight"}
    assert info["unexpected_keys"] == {"bogus"}
    drawn = loaded.model.layers[1].mlp.up_proj.weight
    assert drawn.std().item() == pytest.approx(loaded.config.initializer_range, rel=0.1)


def test_the_decoder_makes_room_for_tokens(pair_of):
    decoder = copy.deepcopy(pair_of().ours.model)
    before = decoder.embed_tokens.additional_embedding.weight.clone()
    table = decoder.resize_token_embeddings(101, pad_to_multiple_of=8)
    assert table is decoder.get_input_embeddings()
    assert decoder.config.total_vocab_size == table.num_embeddings == 104
    assert torch.equal(table.additional_embedding.weight[:3], before)
    assert decoder(torch.tensor([[103]])).last_hidden_state.shape == (1, 1, 32)
    with pytest.raises(ValueError, match="less than the 97 base"):
        decoder.resize_token_embeddings(90)
