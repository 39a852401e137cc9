"""Every parameter of the configuration does what it says."""

import math

import pytest
import torch
import transformers
from interloom.models import IdeficsConfig, IdeficsForVisionText2Text, IdeficsModel
from interloom.models.idefics import IdeficsVisionConfig, idefics_9b_config, idefics_80b_config
from torch import nn


def build(**values):
    torch.manual_seed(0)
    return IdeficsForVisionText2Text(IdeficsConfig(**values))


@pytest.mark.parametrize("kind", ["float", "vector"])
@pytest.mark.parametrize("name", ["zeros", "ones", "normal", "gaussian", "random"])
def test_every_alpha_initialiser_works_for_both_types(name, kind, settings_of):
    model = build(
        **settings_of(alpha_initializer=name, alpha_type=kind, alphas_initializer_range=0.5, hidden_size=512)
    )
    alpha = model.model.gated_cross_attn_layers[0].alpha_dense
    assert alpha.shape == ((1,) if kind == "float" else (1, 1, 512))
    if name in ("zeros", "ones"):
        assert (alpha == float(name == "ones")).all()
    elif kind == "vector":
        assert 0.4 < alpha.std() < 0.6
    else:
        assert alpha.abs() > 0


def test_sine_positions_tell_rows_and_columns(settings_of):
    settings = settings_of()
    settings["vision_config"] |= {"embed_dim": 16, "num_attention_heads": 2, "position_init": "sincos"}
    config = IdeficsConfig(**settings)
    vision = IdeficsForVisionText2Text(config).model.vision_model
    grid = vision.embeddings.grid
    table = vision.embeddings.position_embedding.weight[1:].view(grid, grid, 2, 2, 4)
    for row in range(grid):
        for column in range(grid):
            for axis, place in enumerate((column, row)):
                for wave in range(4):
                    angle = place / 100 ** (wave / 4)
                    assert table[row, column, axis, 0, wave].item() == pytest.approx(
                        math.sin(angle), abs=1e-5
                    )
                    assert table[row, column, axis, 1, wave].item() == pytest.approx(
                        math.cos(angle), abs=1e-5
                    )
    assert config.vision_config.to_dict()["position_init"] == "sincos"
    assert "position_init" not in IdeficsConfig().vision_config.to_dict()
    with pytest.raises(ValueError, match="multiple of 4"):
        IdeficsVisionConfig(embed_dim=6, num_attention_heads=2, position_init="sincos")


def test_released_shapes_have_the_parameters_of_transformers():
    for config in (idefics_9b_config(), idefics_80b_config()):
        with torch.device("meta"):
            ours = IdeficsForVisionText2Text(config)
            theirs = transformers.IdeficsForVisionText2Text(
                transformers.IdeficsConfig.from_dict(config.to_dict())
            )
        count = sum(p.numel() for p in theirs.parameters())
        assert ours.num_parameters() == count
        assert count > (70e9 if config.hidden_size == 8192 else 8e9)
        shapes = {name: p.shape for name, p in theirs.state_dict().items()}
        assert {name: p.shape for name, p in ours.state_dict().items()} == shapes


def test_files_go_both_ways(tmp_path, settings_of):
    values = settings_of(freeze_text_module_exceptions=["LayerNorm"], initializer_range=0.1)
    config = IdeficsConfig(**values)
    (tmp_path / "config.json").write_text(config.to_json())
    assert IdeficsConfig.from_json_file(tmp_path) == config
    theirs = transformers.IdeficsConfig.from_pretrained(tmp_path)
    for name, value in values.items():
        if isinstance(value, dict):
            assert {k: getattr(getattr(theirs, name), k) for k in value} == value
        else:
            assert (
                list(getattr(theirs, name)) == value
                if isinstance(value, list)
                else getattr(theirs, name) == value
            )
    back = IdeficsConfig.from_dict({**theirs.to_dict(), "unknown": 1})
    back.rope_parameters = None
    assert back == config


def test_initial_weights_follow_the_ranges(settings_of):
    model = build(
        **settings_of(
            hidden_size=256,
            intermediate_size=256,
            initializer_range=0.3,
            vision_config={"embed_dim": 128, "initializer_range": 0.1, "initializer_factor": 2.0},
        )
    )
    text, vision = model.model.layers[0].mlp.gate_proj.weight, model.model.vision_model.encoder.layers[0]
    assert text.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert vision.mlp.fc1.weight.std().item() == pytest.approx(0.2, rel=0.05)
    cross = model.model.gated_cross_attn_layers[0]
    assert cross.mlp.gate_proj.weight.std().item() == pytest.approx((0.4 / 256) ** 0.5, rel=0.05)
    assert cross.mlp.down_proj.weight.std().item() == pytest.approx((0.4 / 256 / 8) ** 0.5, rel=0.05)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezing_leaves_what_it_names(settings_of):
    everything = trainable(build(**settings_of()))
    added = ("gated_cross_attn_layers", "perceiver_resampler", "additional")
    frozen = trainable(
        build(**settings_of(freeze_text_layers=True, freeze_vision_layers=True, freeze_lm_head=True))
    )
    assert frozen == {name for name in everything if any(part in name for part in added)}
    text = trainable(build(**settings_of(freeze_text_layers=True)))
    assert "model.vision_model.post_layernorm.weight" in text
    assert "model.norm.weight" not in text
    assert "lm_head.weight" in text
    vision = trainable(build(**settings_of(freeze_vision_layers=True)))
    assert not any("vision_model" in name for name in vision)
    assert "model.layers.0.mlp.up_proj.weight" in vision
    spared = build(
        **settings_of(
            freeze_text_layers=True,
            freeze_vision_layers=True,
            freeze_text_module_exceptions=["LayerNorm"],
            freeze_vision_module_exceptions=["LayerNorm", "Embedding"],
        )
    )
    names = trainable(spared)
    assert "model.layers.0.input_layernorm.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert "model.vision_model.embeddings.position_embedding.weight" in names
    assert not any("self_attn" in name for name in names)


def test_dropout_acts_in_training_alone(settings_of, inputs_of):
    inputs = inputs_of()
    for changes in ({"dropout": 0.5}, {"vision_config": {"attention_dropout": 0.5}}):
        model = build(**settings_of(**changes))
        torch.manual_seed(0)
        still = model.eval()(**inputs).logits
        assert torch.equal(still, model(**inputs).logits)
        model.train()
        assert not torch.allclose(model(**inputs).logits, model(**inputs).logits)


def test_dropout_follows_its_noise_whatever_the_split(settings_of, inputs_of):
    from interloom.models.noise import Noise

    inputs = inputs_of(left_padding=False)
    packed = {**inputs, "document_ids": torch.zeros_like(inputs["input_ids"])}
    packed.pop("attention_mask", None)
    for changes in ({"dropout": 0.3}, {"vision_config": {"attention_dropout": 0.3}}):
        model = build(**settings_of(**changes)).train()
        for given in (inputs, packed):  # with and without the images that nobody sees
            whole = model(**given, noise=Noise(7, 0)).logits
            parts = [
                model(**{k: v[i : i + 1] for k, v in given.items()}, noise=Noise(7, i)).logits
                for i in range(2)
            ]
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(whole, model(**given, noise=Noise(8, 0)).logits)


def test_switches_of_the_forward_pass(settings_of, inputs_of):
    inputs = inputs_of()
    model = build(**settings_of(use_cache=False)).eval()
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None
    model = build(**settings_of()).eval()
    assert model(**inputs).past_key_values.get_seq_length() == 12
    assert model.train()(**inputs).past_key_values is None
    model = build(**settings_of(output_hidden_states=True, output_attentions=True, return_dict=False)).eval()
    output = model(**inputs, use_cache=False)
    assert isinstance(output, tuple)
    assert [len(part) for part in output[1:3]] == [5, 4]


def test_token_ids_are_read_by_generate(settings_of, inputs_of):
    model = build(**settings_of(eos_token_id=list(range(3, 100)), pad_token_id=1)).eval()
    inputs = inputs_of()
    assert model.generate(**inputs, max_new_tokens=5, bad_words_ids=[[0], [1], [2]]).shape[1] == 13
    config = IdeficsConfig(eos_token_id=None, bos_token_id=5)
    assert (config.eos_token_ids, config.bos_token_id) == ([], 5)


def test_structure_follows_the_configuration(settings_of):
    with torch.device("meta"):
        model = IdeficsModel(IdeficsConfig(**settings_of(num_hidden_layers=6, cross_layer_interval=3)))
        plain = IdeficsModel(IdeficsConfig(**settings_of(use_resampler=False, qk_layer_norms=False)))
    assert (len(model.layers), len(model.gated_cross_attn_layers)) == (6, 2)
    assert len(model.perceiver_resampler.blocks) == 2
    assert model.perceiver_resampler.latents.shape == (5, 32)
    assert not hasattr(plain, "perceiver_resampler")
    assert not any(isinstance(m, nn.Linear) and "latents" in n for n, m in plain.named_modules())
    assert not any("q_layer_norm" in n for n, _ in plain.named_parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"alpha_type": "matrix"}, "alpha_type"),
        ({"alpha_initializer": "uniform"}, "alpha_initializer"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"freeze_text_module_exceptions": ["Conv"]}, "Conv"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"vision_config": {"embed_dim": 30}}, "embed_dim 30"),
        ({"vision_config": {"image_size": 7}}, "image_size 7"),
        ({"perceiver_config": {"resampler_depth": 0}}, "resampler_depth"),
    ],
)
def test_impossible_configurations_are_refused(values, message, settings_of):
    with pytest.raises(ValueError, match=message):
        IdeficsConfig(**settings_of(**values))


def test_a_configuration_of_another_model_is_refused():
    with pytest.raises(ValueError, match="groupvit"):
        IdeficsConfig.from_dict({"model_type": "groupvit"})


def test_fields_that_follow_from_others(settings_of):
    """Heads of keys and their width: read they are numbers, unless given they follow what they come from."""
    config = IdeficsConfig(**settings_of())
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert not {"num_key_value_heads", "head_dim"} & config.to_dict().keys()
    assert IdeficsConfig(**settings_of(head_dim=8, num_key_value_heads=4)) == config
    assert config.with_overrides({"hidden_size": 64}).head_dim == 16
    grouped = config.with_overrides({"num_key_value_heads": 2, "head_dim": 6})
    values = grouped.to_dict()
    assert (values["num_key_value_heads"], values["head_dim"]) == (2, 6)
    assert values["model_type"] == "interloom_idefics"
    assert IdeficsConfig.from_dict(values) == grouped
    assert config.to_dict()["model_type"] == "idefics"
    # Other programs' IDEFICS passes over what it does not know: a file that calls itself one is not believed.
    with pytest.raises(ValueError, match="num_key_value_heads=2"):
        IdeficsConfig.from_dict({**values, "model_type": "idefics"})
