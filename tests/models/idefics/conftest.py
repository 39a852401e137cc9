"""Small models, ours and Transformers' with the same weights, and inputs for them."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from interloom.models import IdeficsConfig, IdeficsForVisionText2Text

VISION = {
    "embed_dim": 32,
    "image_size": 28,
    "intermediate_size": 48,
    "patch_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PERCEIVER = {
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 12,
    "qk_layer_norms_perceiver": True,
}
TEXT = {
    "vocab_size": 97,
    "additional_vocab_size": 3,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "alpha_initializer": "random",
    "alphas_initializer_range": 1.0,
    "alpha_type": "vector",
    "cross_layer_interval": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "freeze_text_layers": False,
    "freeze_vision_layers": False,
}


def settings(**changes: Any) -> dict[str, Any]:
    """Constructor arguments of a small configuration, for either library."""
    vision = {**VISION, **changes.pop("vision_config", {})}
    perceiver = {**PERCEIVER, **changes.pop("perceiver_config", {})}
    return {**TEXT, "vision_config": vision, "perceiver_config": perceiver, **changes}


@dataclass
class Pair:
    ours: IdeficsForVisionText2Text
    theirs: transformers.IdeficsForVisionText2Text


def build_pair(**changes: Any) -> Pair:
    """Both models with the same random weights, in evaluation mode."""
    values = settings(**changes)
    # Their `torch.normal(size=(1))` raises for one number; the value is overwritten below anyway.
    theirs_values = dict(values)
    if theirs_values["alpha_type"] == "float":
        theirs_values["alpha_initializer"] = "zeros"
    torch.manual_seed(0)
    theirs = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**theirs_values)).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "alpha" in name:
                weight.normal_()
            elif weight.dim() >= 2:
                weight.normal_(std=0.2)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    config = IdeficsConfig.from_dict(json.loads(theirs.config.to_json_string()))
    ours = IdeficsForVisionText2Text(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return Pair(ours, theirs)


def make_inputs(
    vocab: int = 100,
    batch: int = 2,
    tokens: int = 12,
    images: int = 3,
    size: int = 28,
    left_padding: bool = True,
) -> dict[str, torch.Tensor]:
    """Row 0 is padded and looks at images from token 5 on; row 1 has tokens before, and images nobody
    sees.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (batch, tokens), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if left_padding:
        mask[0, :3] = 0
        ids[0, :3] = 0
    seen = torch.zeros(batch, tokens, images, dtype=torch.long)
    seen[0, 5:8, 0] = 1
    seen[0, 8:, 1] = 1
    seen[1:, 2:, 2] = 1
    pixels = torch.randn(batch, images, 3, size, size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_attention_mask": seen,
    }


@pytest.fixture(scope="session")
def pair_of():
    """Factory of pairs, built once for each set of changes."""
    made: dict[str, Pair] = {}

    def get(**changes: Any) -> Pair:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = build_pair(**changes)
        return made[key]

    return get


@pytest.fixture
def inputs_of():
    return make_inputs


@pytest.fixture
def settings_of():
    return settings
