"""Folders go both ways between Interloom and Transformers."""

import json

import pytest
import torch
import transformers
from interloom.models import IdeficsForVisionText2Text, IdeficsModel


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"alpha_type": "float", "use_resampler": False}]
)
def test_both_ways(changes, tmp_path, pair_of, inputs_of):
    pair = pair_of(**changes)
    inputs = inputs_of()
    pair.theirs.save_pretrained(tmp_path / "theirs")
    ours = IdeficsForVisionText2Text.from_pretrained(tmp_path / "theirs")
    pair.ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    with torch.no_grad():
        expected = pair.theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(theirs(**inputs).logits, expected)
    if changes.get("tie_word_embeddings"):
        assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_shards_old_files_and_leftovers(tmp_path, pair_of, inputs_of):
    pair = pair_of()
    inputs = inputs_of()
    with torch.no_grad():
        expected = pair.ours(**inputs).logits
    pair.theirs.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    pair.ours.save_pretrained(tmp_path / "ours", max_shard_size="60KB")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    old = tmp_path / "bin"
    old.mkdir()
    state = dict(pair.theirs.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state, old / "pytorch_model.bin")
    (old / "config.json").write_text(pair.theirs.config.to_json_string())
    for folder in ("sharded", "ours", "bin"):
        model = IdeficsForVisionText2Text.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected), folder
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_dtype_and_decoder_alone(tmp_path, pair_of, inputs_of):
    pair = pair_of()
    pair.ours.save_pretrained(tmp_path)
    half = IdeficsForVisionText2Text.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in half.parameters())
    inputs = inputs_of()
    with torch.no_grad():
        whole = pair.ours(**inputs).logits
        assert half(**inputs).logits.dtype == torch.bfloat16
        assert (half(**inputs).logits - whole).norm() < 0.1 * whole.norm()
        decoder = IdeficsModel.from_pretrained(tmp_path)
        expected = pair.ours.model(**inputs).last_hidden_state
        assert torch.equal(decoder(**inputs).last_hidden_state, expected)


def test_weights_are_never_in_memory_twice(tmp_path, pair_of, monkeypatch):
    """The model is made on meta, and each tensor is taken over before the next one is read."""
    from interloom.models import checkpoint

    pair_of().ours.save_pretrained(tmp_path)
    alive = []
    read = checkpoint.read_safetensors

    def watch(path):
        import weakref

        for name, tensor in read(path):
            # Another type makes a copy; the one in the file's type must be gone by now.
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(checkpoint, "read_safetensors", watch)
    IdeficsForVisionText2Text.from_pretrained(tmp_path, dtype="bfloat16")
    assert alive


def test_resizing_adds_tokens(pair_of, settings_of, inputs_of):
    import copy

    model = copy.deepcopy(pair_of().ours)
    inputs = inputs_of()
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(105)
        after = model(**inputs).logits
        inputs["input_ids"][0, -1] = 104
        assert model(**inputs).logits.isfinite().all()
    assert after.shape[-1] == 105
    torch.testing.assert_close(after[..., :100], before)
    assert model.config.additional_vocab_size == 8
    torch.testing.assert_close(model.lm_head.additional_fc.weight[-1], model.lm_head.weight.mean(0))
    model.resize_token_embeddings(97)
    assert model.lm_head.full_weight().shape[0] == 97
    with pytest.raises(ValueError, match="97 base tokens"):
        model.resize_token_embeddings(90)
    tied = copy.deepcopy(pair_of(tie_word_embeddings=True).ours)
    embedding = tied.resize_token_embeddings(110)
    assert embedding.additional_embedding.weight is tied.lm_head.additional_fc.weight


def test_wrong_folders_are_refused(tmp_path, pair_of):
    model = pair_of().ours
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "additional_vocab_size": 0}))
    with pytest.raises(ValueError, match=r"unknown weights.*additional"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="llama"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"IdeficsConfig"):
        IdeficsForVisionText2Text(config)
