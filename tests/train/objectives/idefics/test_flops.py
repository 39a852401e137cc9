"""The FLOPs of a step against those that PyTorch counts operation by operation."""

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig
from interloom.models.idefics.configuration import IdeficsPerceiverConfig
from interloom.train.objectives.idefics.flops import idefics_flops, peak_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

LENGTHS = (24, 40)
IMAGES = 4


def build(**values):
    vision = IdeficsVisionConfig(
        embed_dim=32, image_size=32, patch_size=8, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    perceiver = IdeficsPerceiverConfig(
        resampler_n_latents=5, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=8
    )
    config = IdeficsConfig(
        vocab_size=64, additional_vocab_size=0, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, alpha_initializer="ones", freeze_text_layers=False,
        freeze_vision_layers=False, vision_config=vision, perceiver_config=perceiver,
        **{"cross_layer_interval": 2, **values},
    )  # fmt: skip
    torch.manual_seed(0)
    return IdeficsForVisionText2Text(config).train()


def counted(model, config, backward=False):
    """FLOPs by operation of documents in rows of their own, every token looking at one image of two."""
    total = 0
    for length in LENGTHS:
        ids = torch.randint(0, 64, (1, length))
        seen = torch.zeros(1, length, IMAGES // 2, dtype=torch.bool)
        seen[:, : length // 2, 0] = seen[:, length // 2 :, 1] = True
        pixels = torch.randn(1, IMAGES // 2, 3, 32, 32)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            # Dropout of nearly nothing takes the path without fused operations, into which the counter cannot see.
            logits = model(ids, pixel_values=pixels, image_attention_mask=seen).logits
            if backward:
                logits.sum().backward()
        total += counter.get_total_flops()
        # That path, like the counter, scores what is masked too: all of the square and both images.
        width = config.num_attention_heads * config.head_dim
        extra = config.num_hidden_layers * 2 * 2 * width * (length**2 - length * (length + 1) // 2)
        keys = config.perceiver_config.resampler_n_latents if config.use_resampler else 17
        extra += config.gated_blocks * 2 * 2 * width * keys * length
        total -= (3 if backward else 1) * extra
    return total


RELATIVE = {"num_key_value_heads": 2, "head_dim": 24, "cross_layer_interval": 3}


@pytest.mark.parametrize(
    "changes",
    [{"use_resampler": False}, {"use_resampler": True}, RELATIVE],
    ids=["plain", "resampler", "grouped heads"],
)
def test_forward_and_backward_are_those_of_the_operations(changes):
    model = build(**changes, dropout=1e-9)
    config = model.config
    tokens = sum(LENGTHS)
    pairs = sum(length * (length + 1) // 2 for length in LENGTHS)
    ours = idefics_flops(config, tokens=tokens, images=IMAGES, predicted=tokens, pairs=pairs, looks=tokens)
    assert counted(model, config) == pytest.approx(ours.forward, rel=1e-6)
    everything = ours.training(text_trains=True, vision_trains=True, head_trains=True)
    assert everything == 3 * ours.forward
    # PyTorch leaves out the pixels' gradient, which nobody needs.
    assert counted(model, config, backward=True) == pytest.approx(everything, rel=0.03)


def test_windows_score_fewer_pairs():
    config = build(sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 2).config
    whole, near = (
        idefics_flops(config, tokens=64, images=0, predicted=0, pairs=2080, looks=0, near=n)
        for n in (None, 484)
    )
    assert whole.text - near.text == 2.0 * 2 * (2080 - 484) * 2 * 64


def test_frozen_parts_cost_less():
    config = build().config
    flops = idefics_flops(config, tokens=64, images=4, predicted=64, pairs=1000, looks=64)
    frozen = flops.training(text_trains=False, vision_trains=False, head_trains=False)
    assert frozen == pytest.approx(2 * (flops.text + flops.head) + flops.vision + 3 * flops.gated)


def test_a_processor_has_no_published_peak():
    assert peak_flops(torch.device("cpu")) is None
