"""Image towers against Transformers': what they compute, how they are read, kept and trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from interloom.models.groupvit import GroupViTConfig, GroupViTModel
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessor
from interloom.models.idefics.composition.vision_sources import read_vision_tower
from interloom.models.idefics.towers.configuration import IdeficsSiglipConfig
from interloom.models.idefics.towers.groupvit import attention_map
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .towers import EACH, GROUPS, TOWERS, make_tower, tower_of
from .towers import TEXT as WORDS

TEXT = {
    "vocab_size": 97, "additional_vocab_size": 3, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "alpha_initializer": "ones", "freeze_text_layers": False, "freeze_vision_layers": False,
}  # fmt: skip
RESAMPLER = {
    "resampler_n_latents": 5,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 12,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(Transformers' tower, what is read of its folder) by name."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (tower_of(make_tower(name, folder)), read_vision_tower(folder), folder)
        return made[name]

    return get


def build(tower, **changes):
    """An IDEFICS with this tower's weights."""
    torch.manual_seed(1)
    config = IdeficsConfig(
        **{**TEXT, "vision_config": tower.config, "perceiver_config": RESAMPLER, **changes}
    )
    model = IdeficsForVisionText2Text(config).eval()
    model.model.vision_model.load_state_dict(tower.weights)
    return model


def inputs(size=32):
    generator = torch.Generator().manual_seed(3)
    seen = torch.zeros(2, 9, 2, dtype=torch.long)
    seen[0, 2:6, 0] = seen[0, 6:, 1] = seen[1, 4:, 1] = 1
    return {
        "input_ids": torch.randint(3, 97, (2, 9), generator=generator),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
        "pixel_values": torch.randn(2, 2, 3, size, size, generator=generator),
        "image_attention_mask": seen,
    }


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_are_transformers(found, name):
    theirs, tower, _ = found(name)
    model = build(tower)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels).last_hidden_state
        ours = model.model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert ours.shape[1] == TOWERS[name][3] == tower.config.num_tokens


@pytest.mark.parametrize("name", ["siglip", "dinov2", "registers"])
def test_positions_of_other_sizes_are_transformers(found, name):
    theirs, tower, _ = found(name)
    pixels = torch.randn(1, 3, 48, 40)
    options = {"interpolate_pos_encoding": True} if name == "siglip" else {}
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, **options).last_hidden_state
        ours = build(tower).model.vision_model(pixels, **options).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("resampler", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_an_image_has_the_towers_keys(found, name, resampler):
    """The blocks read as many vectors an image as the tower gives; packing and caches change nothing."""
    _, tower, _ = found(name)
    model = build(tower, use_resampler=resampler)
    batch = inputs()
    with torch.no_grad():
        whole = model(**batch, use_cache=False)
        keys = 5 if resampler else TOWERS[name][3]
        assert whole.image_hidden_states.shape == (2, 2, keys, 32)
        first = {k: v[:, :6] for k, v in batch.items() if k != "pixel_values"}
        step = model(**first, pixel_values=batch["pixel_values"], use_cache=True)
        rest = {"input_ids": batch["input_ids"][:, 6:], "attention_mask": batch["attention_mask"]}
        later = model(
            **rest,
            image_attention_mask=batch["image_attention_mask"][:, 6:],
            past_key_values=step.past_key_values,
        )
        packed = model(
            batch["input_ids"].view(1, -1),
            pixel_values=batch["pixel_values"].flatten(0, 1)[None],
            image_attention_mask=torch.block_diag(*batch["image_attention_mask"])[None],
            document_ids=torch.arange(2).repeat_interleave(9)[None],
        )
        ids = model.generate(**batch, max_new_tokens=2, min_new_tokens=2)
    torch.testing.assert_close(later.logits, whole.logits[:, 6:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed.logits.view_as(whole.logits), whole.logits, atol=1e-5, rtol=1e-4)
    assert ids.shape == (2, 11)


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_those_of_float64(found, name):
    """Every weight that ``last_hidden_state`` depends on learns, recomputed activations or not; frozen, none does."""
    _, tower, _ = found(name)
    model = build(tower).train()
    batch = inputs()

    def gradients(model, batch):
        model.zero_grad()
        (model(**batch, labels=batch["input_ids"]).loss).backward()
        return {n: p.grad for n, p in model.model.vision_model.named_parameters()}

    plain = gradients(model, batch)
    unused = {n for n, grad in plain.items() if grad is None or not bool(grad.any())}
    assert (
        all("post_layernorm" in n for n in unused)
        if name == "clip"
        else not unused
        - {
            n
            for n in unused
            if n.endswith("k_proj.bias")  # a constant on all scores
        }
    )
    model.gradient_checkpointing_enable()
    for n, grad in gradients(model, batch).items():
        torch.testing.assert_close(grad, plain[n], atol=1e-6, rtol=1e-5)
    exact = gradients(
        model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    )
    for n, grad in plain.items():
        if grad is not None:
            torch.testing.assert_close(
                grad.double(), exact[n], atol=2e-5, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}"
            )
    frozen = build(tower, freeze_vision_layers=True).train()
    assert all(grad is None for grad in gradients(frozen, batch).values())


@pytest.mark.parametrize("name", EACH)
def test_models_with_towers_are_saved_and_read(found, name, tmp_path):
    _, tower, _ = found(name)
    model = build(tower)
    model.save_pretrained(tmp_path)
    again = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert again.config.vision_config == tower.config
    assert again.config.vision_config.to_dict() == tower.config.to_dict()
    batch = inputs()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    # And such a model is a source of its tower.
    read = read_vision_tower(tmp_path)
    assert read.config == tower.config
    assert all(torch.equal(read.weights[n], weight) for n, weight in tower.weights.items())


@pytest.mark.parametrize("name", EACH)
def test_arithmetic_is_what_pytorch_counts(found, name):
    _, tower, _ = found(name)
    encoder = build(tower).model.vision_model
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.randn(2, 3, 32, 32))
    # The counter cannot see into the assignment's own operation: two products of groups and tokens in each stage.
    unseen = 2 * 32 * (8 * 16 + 4 * 8) if name == "groupvit" else 0
    assert counter.get_total_flops() == 2 * 2 * (tower.config.multiply_adds - unseen)


def test_a_tower_draws_weights_of_its_own(found):
    for name in EACH:
        _, tower, _ = found(name)
        encoder = build(tower).model.vision_model
        before = {n: p.clone() for n, p in encoder.named_parameters()}
        encoder.reset_parameters()
        kept = [n for n, p in encoder.named_parameters() if torch.equal(p, before[n])]
        assert all("group_token" in n for n in kept), kept  # of later stages, which are never drawn
        with torch.no_grad():
            assert bool(encoder(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all())


def test_a_groupvit_of_ours_is_a_tower(tmp_path):
    """With options that Transformers does not know, noise and stochastic depth in its own training."""
    torch.manual_seed(0)
    options = {**GROUPS, "drop_path_rate": 0.5, "group_residual": False, "group_mixing": "none"}
    own = GroupViTModel(GroupViTConfig(vision_config=options, text_config=WORDS)).eval()
    own.save_pretrained(tmp_path / "model")  # of a run directory
    model = build(read_vision_tower(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = own.vision_model(pixels, output_attentions=True)
        ours = model.model.vision_model(pixels, output_attentions=True)
        again = model.train().model.vision_model(pixels)
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, expected.attentions, strict=True))


def test_maps_of_what_a_word_looks_at():
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 16).softmax(1), torch.randn(2, 3, 6).softmax(1)
    weights = torch.randn(2, 5, 3).softmax(-1)  # of five words over three groups
    maps = attention_map([first, second], weights)
    assert maps.shape == (2, 5, 4, 4)
    for image in range(2):
        for word in range(5):
            for patch in range(16):
                value = sum(
                    weights[image, word, g] * second[image, g, m] * first[image, m, patch]
                    for g in range(3)
                    for m in range(6)
                )
                assert float(maps[image, word, patch // 4, patch % 4]) == pytest.approx(
                    float(value), abs=1e-6
                )
    one = attention_map([first[0], second[0]], weights[0, 0], (8, 12))
    assert one.shape == (8, 12)
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1
    heads = attention_map([first, second], weights[:, None].expand(2, 7, 5, 3), grid=(2, 8))
    assert heads.shape == (2, 7, 5, 2, 8)
    for wrong in ([], [first]):
        with pytest.raises(ValueError, match=r"weights has shape"):
            attention_map(wrong, weights)
    with pytest.raises(ValueError, match="no square"):
        attention_map([torch.rand(1, 3, 15)], torch.rand(1, 3))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (67, 53, 3), np.uint8)).resize((230, 331))
PROCESSORS = {
    "clip": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "siglip": ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 32}, "resample": 2}),
    "registers": ("BitImageProcessorPil", {
        "size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }),
    "groupvit": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_the_tower_expects(found, name, tmp_path):
    """Within 1e-5: the same Pillow filter, and normalisation in float32."""
    _, _, folder = found(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    kind, settings = PROCESSORS[name]
    theirs = getattr(transformers, kind)(**settings)
    theirs.save_pretrained(tmp_path)
    tower = read_vision_tower(tmp_path)
    ours = IdeficsImageProcessor.from_dict(tower.image_processor)
    for picture in (PICTURE, PICTURE.rotate(90, expand=True)):
        expected = theirs(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours(picture), expected, atol=1e-5, rtol=0)
    # Its file says the same again.
    ours.save_pretrained(tmp_path)
    assert IdeficsImageProcessor.from_pretrained(tmp_path) == ours
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_size"] == ours.image_size
    if name == "registers":  # positions learnt on 32 pixels, pictures of 40
        assert (tower.config.image_size, tower.config.position_size, tower.config.num_tokens) == (40, 32, 29)
        with torch.no_grad():
            expected = make_tower(name)(pixel_values=ours(PICTURE)).last_hidden_state
            tokens = build(tower).model.vision_model(ours(PICTURE)).last_hidden_state
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)
    else:
        assert tower.config.image_size == ours.image_size == 32


def test_a_tower_and_its_pictures_that_differ_in_size(found, tmp_path):
    _, _, folder = found("clip")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="prepares pictures of 224 pixels for a tower of 32"):
        tower = read_vision_tower(tmp_path)
    assert (tower.image_processor["image_size"], tower.image_processor["size"]) == (32, {"shortest_edge": 32})
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, "do_center_crop": False}))
    with pytest.raises(ValueError, match="nothing cuts them to a square"):
        read_vision_tower(tmp_path)


def change(folder: Path, target: Path, **values):
    shutil.copytree(folder, target, dirs_exist_ok=True)
    found = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**found, **values}))
    return target


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("clip", {"model_type": "vit"}, "'vit' model, which is no image tower that is known"),
        ("siglip", {"model_type": "siglip2_vision_model"}, "NaFlex"),
        (
            "clip",
            {"model_type": "llama", "vocab_size": 100},
            r"language model \(llama\) and has no image tower",
        ),
        ("clip", {"hidden_size": 64}, "does not fit IdeficsVisionTransformer: misshapen weights"),
        ("siglip", {"num_hidden_layers": 3}, "missing weights"),
        ("siglip", {"num_hidden_layers": 1}, "unknown weights"),
        ("registers", {"num_register_tokens": 5}, "misshapen"),
        ("dinov2", {"qkv_bias": False}, "qkv_bias=False"),
        ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate=0.1"),
        ("clip", {"hidden_size": "wide"}, "embed_dim is 'wide'"),
        ("groupvit", {"image_size": [32, 64]}, "not square"),
        ("clip", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("dinov2", {"num_hidden_layers": 10**9}, "need more than the"),
        ("dinov2", {"mlp_ratio": "x"}, "mlp_ratio='x'"),
        ("groupvit", {"depths": [10**8, 1, 1]}, "need more than the"),
        ("groupvit", {"intermediate_size": "x"}, "damaged or holds a value of the wrong kind"),
        ("siglip", {"layer_norm_eps": None}, "wrong kind"),
    ],
)
def test_what_is_no_tower_gets_a_sentence(found, tmp_path, name, values, message):
    _, _, folder = found(name)
    with pytest.raises(ValueError, match=message) as caught:
        read_vision_tower(change(folder, tmp_path, **values))
    assert "\n" not in str(caught.value)


def test_half_a_folder_gets_a_sentence(found, tmp_path):
    _, _, folder = found("dinov2")
    for file, message in (("config.json", "no config.json"), ("model.safetensors", "has no weights")):
        half = tmp_path / file
        shutil.copytree(folder, half)
        (half / file).unlink()
        with pytest.raises(ValueError, match=message):
            read_vision_tower(half)
    cut = change(folder, tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_vision_tower(cut)
    with pytest.raises(ValueError, match="does not exist"):
        read_vision_tower(tmp_path / "nowhere")


def test_a_configuration_names_its_tower():
    with pytest.raises(ValueError, match="model_type is 'swin', which is no image tower"):
        IdeficsConfig(vision_config={"model_type": "swin"})
    with pytest.raises(ValueError, match="NaFlex"):
        IdeficsConfig(vision_config={"model_type": "siglip2_vision_model"})
    config = IdeficsConfig(
        vision_config={"model_type": "dinov2", "hidden_size": 64, "mlp_ratio": 3, "num_attention_heads": 4}
    )
    assert config.vision_config.intermediate_size == 192
    again = IdeficsConfig.from_dict(json.loads(config.to_json()))
    assert again == config
    assert type(again.vision_config) is type(config.vision_config)
    with pytest.raises(ValueError, match="describes a tower 'dinov2'"):
        IdeficsSiglipConfig.from_dict(config.to_dict())
