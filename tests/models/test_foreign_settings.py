"""Settings of a ``config.json`` that are no fields of ours: refused where they change the model, else kept."""

import json

import pytest
from interloom.models import GroupViTConfig, IdeficsConfig

# What is known of the file of a tiny released checkpoint, with settings that no release of the model reads.
RELEASED = {
    "additional_vocab_size": 2,
    "alpha_initializer": "ones",
    "alpha_type": "vector",
    "alphas_initializer_range": 0.0,
    "architectures": ["IdeficsForVisionText2Text"],
    "cross_layer_activation_function": "swiglu",
    "ffn_dim": 64,
    "hidden_size": 16,
    "intermediate_size": 11008,
    "max_new_tokens": 128,
    "max_position_embeddings": 128,
    "model_type": "idefics",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "torch_dtype": "float16",
    "use_resampler": True,
    "vision_config": {
        "embed_dim": 32,
        "image_size": 30,
        "intermediate_size": 37,
        "model_type": "idefics",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "patch_size": 2,
        "vision_model_name": "some/clip",
        "pruned_heads": {},
        "num_beams": 1,
    },
    "perceiver_config": {"model_type": "idefics", "resampler_depth": 2, "resampler_head_dim": 8},
    "word_embed_proj_dim": 16,
}


def test_harmless_settings_are_kept_and_written_back():
    config = IdeficsConfig.from_dict(RELEASED)
    assert (config.vision_config.image_size, config.perceiver_config.resampler_depth) == (30, 2)
    assert (config.max_position_embeddings, config.ffn_dim) == (128, 64)
    assert config.vision_config.vision_model_name == "some/clip"
    written = json.loads(config.to_json())
    unlike = {"model_type", "torch_dtype"}
    for name in RELEASED.keys() - unlike - {"vision_config", "perceiver_config"}:
        assert written[name] == RELEASED[name]
    assert written["dtype"] == "float16"
    for name, value in RELEASED["vision_config"].items():
        assert name == "model_type" or written["vision_config"][name] == value
    again = IdeficsConfig.from_dict(written)
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_nested_parts_take_any_name_and_the_outer_one_decides():
    for name in ("idefics", "idefics_vision", "clip_vision_model", ""):
        values = {"model_type": "idefics", "vision_config": {"model_type": name, "embed_dim": 64}}
        assert IdeficsConfig.from_dict(values).vision_config.embed_dim == 64
        towers = {"model_type": "groupvit", "text_config": {"model_type": name, "vocab_size": 50}}
        assert GroupViTConfig.from_dict(towers).text_config.vocab_size == 50
    with pytest.raises(ValueError, match="model_type 'llama'"):
        IdeficsConfig.from_dict({"model_type": "llama", "vision_config": {"model_type": "idefics"}})


def test_the_oldest_files_are_flat():
    config = IdeficsConfig.from_dict(
        {
            "model_type": "idefics",
            "use_resampler": True,
            "vision_embed_dim": 1280,
            "vision_image_size": 112,
            "vision_patch_size": 14,
            "vision_num_hidden_layers": 3,
            "resampler_depth": 2,
            "qk_layer_norms_perceiver": True,
        }
    )
    assert (config.vision_config.embed_dim, config.vision_config.image_size) == (1280, 112)
    assert (config.vision_config.num_hidden_layers, config.use_resampler) == (3, True)
    assert (config.perceiver_config.resampler_depth, config.perceiver_config.resampler_n_latents) == (2, 64)
    assert config.perceiver_config.qk_layer_norms_perceiver
    # Beside nested parts they are leftovers, as for every release.
    both = {"model_type": "idefics", "vision_embed_dim": 768, "vision_config": {"embed_dim": 64}}
    assert IdeficsConfig.from_dict(both).vision_config.embed_dim == 64


@pytest.mark.parametrize(
    ("setting", "value", "neutral"),
    [
        ("num_key_value_heads", 8, 32),
        ("attention_bias", True, False),
        ("mlp_bias", True, False),
        ("head_dim", 64, 128),
        ("sliding_window", 4096, None),
        ("attention_dropout", 0.1, 0.0),
        ("quantization_config", {"bits": 4}, None),
        ("final_logit_softcapping", 30.0, None),
        ("num_local_experts", 8, 0),
        ("residual_multiplier", 0.2, 1.0),
        ("partial_rotary_factor", 0.5, 1.0),
        ("cross_layer_activation_function", "gelu", "swiglu"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, None),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}, None),
        ("pruned_heads", {"0": [1]}, {}),
        ("hidden_act", "mish", "silu"),
    ],
)
def test_what_would_change_idefics_is_refused_by_name(setting, value, neutral):
    IdeficsConfig.from_dict({"model_type": "idefics", setting: neutral})
    with pytest.raises(ValueError, match=setting):
        IdeficsConfig.from_dict({"model_type": "idefics", setting: value})


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    ("setting", "value", "neutral"),
    [
        ("num_key_value_heads", 1, None),
        ("attention_bias", False, True),
        ("qkv_bias", False, True),
        ("rope_theta", 1e4, None),
        ("position_embedding_type", "relative_key", "absolute"),
        ("layerdrop", 0.1, 0.0),
        ("sliding_window", 8, None),
    ],
)
def test_what_would_change_a_tower_of_groupvit_is_refused_by_name(part, setting, value, neutral):
    GroupViTConfig.from_dict({"model_type": "groupvit", part: {setting: neutral}})
    with pytest.raises(ValueError, match=setting):
        GroupViTConfig.from_dict({"model_type": "groupvit", part: {setting: value}})


def test_parts_of_idefics_are_checked_too():
    for part, setting in (("vision_config", "num_key_value_heads"), ("perceiver_config", "attention_bias")):
        with pytest.raises(ValueError, match=setting):
            IdeficsConfig.from_dict({"model_type": "idefics", part: {setting: 3}})
    with pytest.raises(ValueError, match="hidden_size"):
        IdeficsConfig.from_dict({"vision_config": {"embed_dim": 64, "hidden_size": 128}})


def test_the_base_of_rotary_positions_counts_wherever_it_stands():
    transformers = pytest.importorskip("transformers")
    values = {"model_type": "idefics", "rope_theta": 5e5}
    assert IdeficsConfig.from_dict(values).rope_theta == 5e5
    assert transformers.IdeficsConfig.from_dict(values).rope_parameters["rope_theta"] == 5e5
    with pytest.raises(ValueError, match="keep one"):
        IdeficsConfig.from_dict({**values, "rope_parameters": {"rope_theta": 1e4}})


def test_kept_settings_never_hide_what_a_configuration_is():
    config = IdeficsConfig.from_dict({"to_dict": 1, "head_dim": 128, "__class__": "x", "_name_or_path": "y"})
    assert callable(config.to_dict)
    assert "_name_or_path" not in config.to_dict()
