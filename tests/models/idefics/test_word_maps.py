"""Masks of what words look at, against attention and grouping written out."""

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from interloom.models.idefics.word_maps import image_attention, word_maps

from .towers import GROUPS

TEXT = {
    "vocab_size": 97, "additional_vocab_size": 3, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "alpha_initializer": "ones", "qk_layer_norms": True,
}  # fmt: skip


def build(**changes):
    torch.manual_seed(0)
    vision = {**GROUPS, "model_type": "groupvit_vision_model"}
    return IdeficsForVisionText2Text(IdeficsConfig(**{**TEXT, "vision_config": vision, **changes})).eval()


def inputs():
    torch.manual_seed(1)
    seen = torch.zeros(1, 6, 2, dtype=torch.long)
    seen[0, 1:3, 0] = seen[0, 3:, 1] = seen[0, 5, 0] = 1
    return torch.randint(0, 97, (1, 6)), torch.randn(1, 2, 3, 32, 32), seen


def test_attention_is_what_the_blocks_compute():
    """With values weighted by it, each block's attention gives what the fused operation gave."""
    model, (ids, pixels, seen) = build(), inputs()
    outputs, states = [], []
    for block in model.model.gated_cross_attn_layers:
        block.cross_attn.o_proj.register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
        block.cross_attn.register_forward_pre_hook(lambda _, x: states.append(x[1].states))
    weights = image_attention(model, ids, pixels, seen)
    assert weights.shape == (2, 4, 6, 2, 4)
    torch.testing.assert_close(weights.sum((-1, -2)), seen.any(-1).float().expand(2, 4, 6))
    assert not bool(weights[:, :, ~seen[0].bool()].any())
    for number, block in enumerate(model.model.gated_cross_attn_layers):
        value = block.cross_attn.v_proj(states[number]).view(2, 4, 4, 8)  # images, keys, heads, width
        expected = torch.einsum("htnl,nlhd->thd", weights[number], value).flatten(1)
        torch.testing.assert_close(outputs[number][0], expected, atol=1e-5, rtol=1e-4)


def test_maps_weigh_the_pixels_of_groups():
    model, (ids, pixels, seen) = build(), inputs()
    maps = word_maps(model.train(), ids, pixels, seen)
    assert model.training
    assert maps.shape == (6, 2, 4, 4)
    weights = image_attention(model, ids, pixels, seen).mean((0, 1))
    first, second = model.model.vision_model(pixels[0], output_attentions=True).attentions
    expected = torch.einsum("tng,ngm,nmp->tnp", weights, second, first).view(6, 2, 4, 4)
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-4)
    assert word_maps(model, ids, pixels, seen, (20, 24)).shape == (6, 2, 20, 24)


def test_what_has_no_maps_gets_a_sentence():
    ids, pixels, seen = inputs()
    for changes in ({"use_resampler": True}, {"vision_config": {"embed_dim": 16, "image_size": 32}}):
        with pytest.raises(ValueError, match="maps of words need the groups of a GroupViT"):
            word_maps(build(**changes), ids, pixels, seen)
    with pytest.raises(ValueError, match="give one prompt"):
        image_attention(build(), ids.expand(2, -1), pixels, seen)
