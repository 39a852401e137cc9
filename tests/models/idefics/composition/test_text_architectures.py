"""A composed model is its language model, for every kind of one: Transformers' own is the reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from interloom.models import IdeficsForVisionText2Text
from interloom.models.idefics.composition.text_sources import text_settings

TOKENS = 97


def close(ours, theirs, tolerance=1e-5):
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


def in_float64(made):
    """Both models in float64, theirs with norms that do not pass through float32."""
    theirs, ours = copy.deepcopy(made.theirs).double(), copy.deepcopy(made.ours).double()
    for module in theirs.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, norm=module: F.rms_norm(
                x, norm.weight.shape, norm.weight, norm.variance_epsilon
            )
    ours.requires_grad_(True)
    return theirs, ours


@torch.no_grad()
def test_logits_are_the_language_models(architecture, composed_of, texts):
    made, (ids, mask) = composed_of(architecture), texts
    theirs = made.theirs(input_ids=ids, attention_mask=mask).logits
    ours = made.ours(input_ids=ids, attention_mask=mask).logits
    assert ours.shape[-1] == TOKENS + 2
    close(ours[..., :TOKENS][mask.bool()], theirs[mask.bool()])


@torch.no_grad()
def test_cached_decoding_gives_the_same(architecture, composed_of, texts):
    """Token by token and in pieces, against the language model's own cached steps."""
    made, (ids, mask) = composed_of(architecture), texts
    past, cache = None, None
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 15), *((i, i + 1) for i in range(15, 20))):
        step = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
        theirs = made.theirs(**step, position_ids=positions, past_key_values=past, use_cache=True)
        ours = made.ours(**step, past_key_values=cache, use_cache=True)
        past, cache = theirs.past_key_values, ours.past_key_values
        real = mask[:, start:stop].bool()
        close(ours.logits[..., :TOKENS][real], theirs.logits[real])


@torch.no_grad()
def test_generation_follows_the_language_model(architecture, composed_of, texts):
    made, (ids, mask) = composed_of(architecture), texts
    new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ours = {**new, "suppress_tokens": [TOKENS, TOKENS + 1], "input_ids": ids, "attention_mask": mask}
    if architecture != "dynamic":  # theirs keeps frequencies between calls
        theirs = made.theirs.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **new)
        assert torch.equal(made.ours.generate(**ours), theirs)
        beams = made.theirs.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, num_beams=3, **new)
        assert torch.equal(made.ours.generate(**ours, num_beams=3), beams)
    plain = made.ours.generate(**ours)
    assert torch.equal(made.ours.generate(**ours, cache_implementation="static"), plain)
    if architecture != "dynamic":  # whose frequencies of old keys a cache keeps
        assert torch.equal(made.ours.generate(**ours, use_cache=False), plain)


@pytest.mark.parametrize("name", ["llama grouped", "qwen2 with windows", "qwen3"])
def test_gradients_are_the_language_models_in_float64(name, composed_of, texts):
    made, (ids, _) = composed_of(name), texts
    theirs, ours = in_float64(made)
    ours.train()
    weights = torch.randn(2, 20, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (theirs(input_ids=ids).logits * weights).sum().backward()
    (ours(input_ids=ids).logits[..., :TOKENS] * weights).sum().backward()
    found = dict(ours.named_parameters())
    for parameter, weight in theirs.named_parameters():
        torch.testing.assert_close(found[parameter].grad, weight.grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["llama grouped", "mistral", "qwen2 with windows", "qwen3", "dynamic"])
def test_packed_documents_are_read_apart(name, composed_of, texts):
    """Several in a row, and gradients of what each alone would give."""
    made, (ids, _) = composed_of(name), texts
    lengths = ((3, 12, 1), (9, 11)) if name != "dynamic" else ((3, 6), (9, 11))
    documents = torch.full_like(ids, -1)
    pieces = []
    for row, counts in enumerate(lengths):
        done = 0
        for number, count in enumerate(counts):
            documents[row, done : done + count] = number
            pieces.append((row, slice(done, done + count)))
            done += count
    theirs, ours = in_float64(made)
    packed = ours(input_ids=ids, document_ids=documents).logits[..., :TOKENS]
    dense = ours(input_ids=ids, document_ids=documents, output_attentions=True).logits[..., :TOKENS]
    total = 0.0
    for row, place in pieces:
        alone = theirs(input_ids=ids[row : row + 1, place]).logits[0]
        torch.testing.assert_close(packed[row, place], alone, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(dense[row, place], alone, atol=1e-5, rtol=0)  # its softmax is float32
        total = total + alone.square().sum()
    total.backward()
    (packed.square() * (documents >= 0)[..., None]).sum().backward()
    found = dict(ours.named_parameters())
    for parameter, weight in theirs.named_parameters():
        torch.testing.assert_close(found[parameter].grad, weight.grad, atol=1e-8, rtol=1e-7)


@torch.no_grad()
def test_saved_and_loaded_again(architecture, composed_of, texts, tmp_path):
    made, (ids, _) = composed_of(architecture), texts
    made.ours.save_pretrained(tmp_path / "once")
    again = IdeficsForVisionText2Text.from_pretrained(tmp_path / "once")
    assert again.config == made.ours.config
    assert torch.equal(again(input_ids=ids).logits, made.ours(input_ids=ids).logits)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == bool(made.theirs.config.tie_word_embeddings)
    rows = again.lm_head.additional_fc.weight is again.model.embed_tokens.additional_embedding.weight
    assert rows == tied


@torch.no_grad()
def test_gates_that_open_read_images_with_any_cache(composed_of, texts):
    """Five layers, a block before the first, third and fifth: cached, static and beam steps equal a fresh pass."""
    made, (ids, _) = composed_of("qwen2 with windows"), texts
    model = copy.deepcopy(made.ours)
    assert len(model.model.gated_cross_attn_layers) == 3
    for block in model.model.gated_cross_attn_layers:
        block.alpha_cross_attn.fill_(0.8)
        block.alpha_dense.fill_(0.5)
    pixels = torch.randn(2, 2, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    seen = torch.zeros(2, 20, 2, dtype=torch.long)
    seen[:, 4:, 0], seen[0, 9:, 1] = 1, 1
    images = {"pixel_values": pixels, "image_attention_mask": seen}
    text = model(input_ids=ids).logits
    whole = model(input_ids=ids, **images).logits
    assert not torch.allclose(text[:, 5:], whole[:, 5:], atol=1e-2)
    new = {"input_ids": ids, **images, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    fresh = model.generate(**new, use_cache=False)
    assert torch.equal(model.generate(**new), fresh)
    assert torch.equal(model.generate(**new, cache_implementation="static"), fresh)
    beams = model.generate(**new, num_beams=2, use_cache=False)
    assert torch.equal(model.generate(**new, num_beams=2), beams)


def test_settings_of_older_files_mean_the_same():
    """``rope_theta`` and ``rope_scaling`` with ``type``, and ``rope_parameters``."""
    plain = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    }
    stretched = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    old = text_settings({**plain, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **stretched}}, "x")
    both = text_settings(
        {**plain, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **stretched}},
        "x",
    )
    new = text_settings(
        {**plain, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **stretched}}, "x"
    )
    assert old["rope_parameters"] == new["rope_parameters"] == both["rope_parameters"]
    # A yarn that does not say what it was trained on takes the model's own length, as Transformers does.
    yarn = text_settings({**plain, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "x")
    assert yarn["rope_parameters"]["original_max_position_embeddings"] == 4096
