"""GroupViT's call styles, sizes, initialisation, randomness, options and refusals."""

import pytest
import torch
import torch.nn.functional as F
from interloom.models import (
    GroupViTConfig,
    GroupViTModel,
    GroupViTTextConfig,
    GroupViTTextModel,
    GroupViTVisionConfig,
    GroupViTVisionModel,
)
from interloom.models.noise import Noise, mix_seed


def tiny(seed=0, vision=None, **kwargs):
    torch.manual_seed(seed)
    text = GroupViTTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=38,
        eos_token_id=39,
    )
    image = GroupViTVisionConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "depths": [1, 1, 1],
            "num_group_tokens": [6, 3, 0],
            "num_output_groups": [6, 3],
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            **(vision or {}),
        }
    )
    config = GroupViTConfig(text, image, projection_dim=8, projection_intermediate_dim=12, **kwargs)
    return GroupViTModel(config).eval()


@pytest.fixture(name="batch")
def make_batch():
    torch.manual_seed(2)
    ids = torch.randint(3, 37, (4, 7))
    ids[:, -1] = 39
    return {"input_ids": ids, "pixel_values": torch.randn(4, 3, 16, 16)}


def test_keywords_one_dictionary_and_one_list_are_the_same(batch):
    model = tiny()
    mask = torch.ones_like(batch["input_ids"])
    expected = model(**batch, attention_mask=mask, return_loss=True)
    for out in (
        model({**batch, "attention_mask": mask, "return_loss": True}),
        model({**batch, "attention_mask": mask}, return_loss=True),
        model([batch["input_ids"], batch["pixel_values"], mask], return_loss=True),
        model((batch["input_ids"], batch["pixel_values"]), attention_mask=mask, return_loss=True),
        model(batch["input_ids"], batch["pixel_values"], mask, None, True),
    ):
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.logits_per_image, expected.logits_per_image)
    text = GroupViTTextModel(model.config.text_config).eval()
    ids = batch["input_ids"]
    assert torch.equal(
        text([ids, mask])[0], text({"input_ids": ids, "attention_mask": mask}).last_hidden_state
    )
    vision = GroupViTVisionModel(model.config.vision_config).eval()
    pixels = batch["pixel_values"]
    assert torch.equal(vision([pixels])[0], vision({"pixel_values": pixels})["last_hidden_state"])


def test_tuple_holds_what_is_not_none_in_order(batch):
    model = tiny()
    out = model(**batch, return_loss=True, output_segmentation=True)
    tuple_ = model(**batch, return_loss=True, output_segmentation=True, return_dict=False)
    assert list(out) == [
        "loss",
        "logits_per_image",
        "logits_per_text",
        "segmentation_logits",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
    ]
    assert len(tuple_) == 8
    for index in range(6):
        assert torch.equal(tuple_[index], out[index])
    assert isinstance(tuple_[6], tuple)
    assert len(model(**batch, return_dict=False)) == 6
    assert "loss" not in model(**batch)
    assert torch.equal(out.to_tuple()[0], out["loss"])


def test_embeddings_have_unit_length_and_logits_are_scaled_cosines(batch):
    model = tiny()
    out = model(**batch)
    torch.testing.assert_close(out.image_embeds.norm(dim=-1), torch.ones(4))
    expected = out.image_embeds @ out.text_embeds.T * model.logit_scale.exp()
    torch.testing.assert_close(out.logits_per_image, expected)


def test_config_flags_are_defaults_of_the_call(batch):
    model = tiny(output_segmentation=True, output_hidden_states=True)
    out = model(**batch)
    assert out.segmentation_logits is not None
    assert len(out.vision_model_output.hidden_states) == 4
    assert model(**batch, output_segmentation=False).segmentation_logits is None


@pytest.mark.parametrize("size", [(448, 448), (32, 16), (16, 44)])
def test_any_size_divisible_by_the_patch(size):
    model = tiny()
    ids = torch.tensor([[5, 39]])
    out = model(ids, torch.randn(1, 3, *size), output_segmentation=True)
    assert out.segmentation_logits.shape == (1, 1, *size)
    positions = model.vision_model.embeddings
    grid = (size[0] // 4, size[1] // 4)
    table = positions.position_embeddings.view(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(positions.positions(grid), expected.flatten(2).transpose(1, 2))


def test_segmentation_follows_its_definition(batch):
    model = tiny()
    out = model(**batch, output_segmentation=True)
    first, second = out.vision_model_output.attentions
    membership = (second @ first).view(4, 3, 4, 4)
    membership = F.interpolate(membership, size=(16, 16), mode="bilinear", align_corners=False)
    groups = model.visual_projection(out.vision_model_output.last_hidden_state.flatten(0, 1)).view(4, 3, 8)
    scores = F.normalize(groups, dim=-1) @ out.text_embeds.T * model.logit_scale.exp() ** 2
    expected = torch.einsum("bgm,bghw->bmhw", scores, membership)
    torch.testing.assert_close(out.segmentation_logits, expected, atol=1e-4, rtol=1e-4)


def test_initialisation_is_that_of_the_original():
    model = GroupViTModel(
        GroupViTConfig(
            GroupViTTextConfig(vocab_size=500, num_hidden_layers=2),
            GroupViTVisionConfig(depths=[1, 1, 1], image_size=64),
        )
    )
    vision, text = model.vision_model, model.text_model
    stages = vision.encoder.stages
    assert stages[0].group_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert not stages[0].group_token[0, 0].equal(stages[0].group_token[0, 1])
    assert stages[1].group_token.abs().max() == 0  # its tokens come through the projector
    assert vision.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert stages[0].layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert stages[0].layers[0].self_attn.q_proj.bias.abs().max() == 0
    layer = text.encoder.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.self_attn.out_proj.weight.std().item() == pytest.approx((256 * 4) ** -0.5, rel=0.05)
    assert layer.mlp.fc1.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert text.embeddings.position_embedding.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-4)


def test_logit_scale_is_clamped_in_training(batch):
    model = tiny(logit_scale_init_value=6.0)
    assert model.scale().item() == pytest.approx(403.43, rel=1e-4)
    model.train()
    assert model.scale().item() == 100.0


def test_training_noise_is_a_function_of_the_sample(batch):
    model = tiny(
        vision={"drop_path_rate": 0.5, "depths": [2, 1, 1], "dropout": 0.2, "attention_dropout": 0.2}
    )
    model.train()
    pixels = batch["pixel_values"]
    whole = model.encode_image(pixels, noise=Noise(mix_seed(3, 4), 10))
    parts = [model.encode_image(pixels[i : i + 2], noise=Noise(mix_seed(3, 4), 10 + i)) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)
    other_step = model.encode_image(pixels, noise=Noise(mix_seed(3, 5), 10))
    assert not torch.allclose(other_step, whole)
    as_tensor = model.encode_image(pixels, noise=Noise(torch.tensor(mix_seed(3, 4)), 10))
    assert torch.equal(as_tensor, whole)
    torch.manual_seed(5)
    first = model.encode_image(pixels)
    torch.manual_seed(5)
    assert torch.equal(model.encode_image(pixels), first)
    model.eval()
    assert torch.equal(model.encode_image(pixels, noise=Noise(1)), model.encode_image(pixels))


def test_drop_path_keeps_the_mean_and_rises_with_depth():
    model = tiny(vision={"drop_path_rate": 0.3, "depths": [2, 1, 1]})
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath" and "vision" in m.site]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    drop = model.vision_model.encoder.stages[2].layers[0].drop_path_mlp
    out = drop(torch.ones(20000, 1), Noise(0))
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_options_of_the_grouping(batch):
    vision = {
        "depths": [1, 1],
        "num_group_tokens": [4, 0],
        "num_output_groups": [4],
        "group_residual": False,
        "group_mixing": "none",
        "group_token_std": 1.0,
        "assign_init_gain": 3.0,
        "assign_tau": 0.5,
    }
    model = tiny(vision=vision)
    plain = tiny(vision={"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4]})
    stage = model.vision_model.encoder.stages[0]
    assert stage.group_token.std().item() == pytest.approx(1.0, rel=0.3)
    ratio = (
        stage.downsample.assign.q_proj.weight.std()
        / plain.vision_model.encoder.stages[0].downsample.assign.q_proj.weight.std()
    )
    assert ratio.item() == pytest.approx(3.0, rel=0.2)
    # Without mixing a group's state depends on its own members alone.
    layer = model.vision_model.encoder.stages[1].layers[0]
    groups = torch.randn(1, 4, 16)
    changed = groups.clone()
    changed[0, 0] += 1
    torch.testing.assert_close(layer(groups)[0][0, 1:], layer(changed)[0][0, 1:])
    # Without the residual a group that gathers nothing has no trace of its token.
    block = stage.downsample
    with torch.no_grad():
        block.assign.v_proj.weight.zero_(), block.assign.v_proj.bias.zero_()
    out, _ = block(torch.randn(2, 9, 16), torch.randn(2, 4, 16))
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))
    saved = model.config.to_dict()["vision_config"]
    assert {key: saved[key] for key in vision if key not in ("num_output_groups",)} == {
        key: value for key, value in vision.items() if key != "num_output_groups"
    }
    assert "group_residual" not in plain.config.to_dict()["vision_config"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_values": torch.zeros(4, 4, 16, 16)}, "4 channels"),
        ({"pixel_values": torch.zeros(4, 3, 16)}, r"batch, channels, height, width"),
        ({"pixel_values": torch.zeros(4, 3, 18, 16)}, "not divisible by the patch size 4x4"),
        ({"pixel_values": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)}, "floating-point"),
        ({"pixel_values": torch.full((4, 3, 16, 16), float("nan"))}, "image 0 in the batch holds NaN"),
        ({"pixel_values": None}, "no pixel_values"),
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": torch.zeros(4, 3)}, "integer token ids"),
        ({"input_ids": torch.tensor([5, 39])}, r"\[batch, tokens\]"),
        ({"input_ids": torch.tensor([[5, 40, 39]] * 4)}, "outside the vocabulary 0..39"),
        ({"input_ids": torch.tensor([[5, -1, 39]] * 4)}, "holds -1"),
        ({"input_ids": torch.full((4, 13), 39)}, "13 tokens"),
        ({"attention_mask": torch.ones(4, 6)}, r"\[4, 6\]"),
        ({"position_ids": torch.zeros(4, 6, dtype=torch.long)}, "position_ids"),
        ({"position_ids": torch.full((4, 7), 12)}, "outside 0..11"),
        ({"input_ids": torch.tensor([[5, 39]]), "return_loss": True}, "4 images and 1 captions"),
    ],
)
def test_bad_inputs_are_refused_in_words(batch, change, words):
    with pytest.raises(ValueError, match=words):
        tiny()(**{**batch, **change})


def test_bad_call_styles_are_refused_in_words(batch):
    model = tiny()
    with pytest.raises(ValueError, match="unknown inputs inputs_embeds"):
        model({**batch, "inputs_embeds": batch["input_ids"]})
    with pytest.raises(ValueError, match="at most 4"):
        model([batch["input_ids"]] * 5)
    with pytest.raises(ValueError, match="twice"):
        model(batch, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="holding a list"):
        model([[1, 2], batch["pixel_values"]])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"depths": [1, 1]}, "one entry per stage"),
        ({"num_attention_heads": 5}, "not divisible by num_attention_heads 5"),
        ({"image_size": 30}, "not a multiple of patch_size"),
        ({"group_mixing": "some"}, "group_mixing"),
        ({"hidden_act": "tanhh"}, "hidden_act='tanhh'"),
    ],
)
def test_bad_configurations_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        GroupViTVisionModel(GroupViTVisionConfig(**kwargs))


def test_bfloat16(batch):
    model = tiny().to(torch.bfloat16)
    out = model(**batch, output_segmentation=True)
    assert out.logits_per_image.dtype == torch.bfloat16
    assert torch.isfinite(out.segmentation_logits).all()


def test_compiles_whole_and_once_for_all_seeds(batch):
    model = tiny(vision={"drop_path_rate": 0.2}).train()

    def encode(pixels, ids, seed):
        noise = Noise(seed, 3)
        return model.encode_image(pixels, noise=noise), model.encode_text(ids, noise=noise)

    compiled = torch.compile(encode, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in (1, 2):
        seed = torch.tensor(mix_seed(0, step))
        arguments = (batch["pixel_values"], batch["input_ids"], seed)
        for found, expected in zip(compiled(*arguments), encode(*arguments), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        found.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
