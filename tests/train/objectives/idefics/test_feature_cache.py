"""Cached features of the frozen encoder: the same loss and gradients, and every image encoded once."""

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from interloom.train.objectives.idefics.feature_cache import FeatureCache
from interloom.train.runs import read_metrics


def small_model(seed=0):
    torch.manual_seed(seed)
    vision = IdeficsVisionConfig(
        embed_dim=16, image_size=28, patch_size=14, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    config = IdeficsConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        cross_layer_interval=1, alpha_initializer="ones", freeze_vision_layers=True, vision_config=vision,
    )  # fmt: skip
    return IdeficsForVisionText2Text(config)


def test_features_are_the_encoders(tmp_path):
    model = small_model()
    pixels = torch.rand(2, 3, 3, 28, 28)
    wanted = torch.tensor([[True, True, False], [True, False, False]])
    cache = FeatureCache(tmp_path, model)
    expected = model.model.vision_model(pixels.flatten(0, 1)).last_hidden_state.view(2, 3, -1, 16)
    for hits, misses in ((0, 3), (3, 3), (6, 3)):
        features = cache(pixels, wanted)
        torch.testing.assert_close(features[wanted], expected[wanted], atol=1e-6, rtol=1e-5)
        assert not features[~wanted].any()
        assert (cache.hits, cache.misses) == (hits, misses)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_another_encoder_and_a_damaged_file_are_not_believed(tmp_path):
    pixels, wanted = torch.rand(1, 1, 3, 28, 28), torch.ones(1, 1, dtype=torch.bool)
    first, other = small_model(), small_model(seed=1)
    features = FeatureCache(tmp_path, first)(pixels, wanted)
    assert not torch.equal(FeatureCache(tmp_path, other)(pixels, wanted), features)
    again = FeatureCache(tmp_path, first)
    again.file_of(pixels[0, 0]).write_bytes(b"damaged")
    assert torch.equal(again(pixels, wanted), features)
    assert again.misses == 1
    assert torch.equal(FeatureCache(tmp_path, first)(pixels, wanted), features)


def test_an_encoder_that_trains_is_refused(tmp_path):
    model = small_model()
    model.model.vision_model.requires_grad_(True)
    with pytest.raises(ValueError, match="needs a frozen vision tower"):
        FeatureCache(tmp_path, model)


def test_a_run_with_the_cache_is_the_run_without(tmp_path, capsys):
    write_demo(tmp_path / "demo", train=40, val=8, seed=1)
    options = [
        "experiment=idefics_demo", "task=none", "trainer=cpu", "callbacks.progress=false", "trainer.max_steps=4",
        f"data.sources={{demo: [{tmp_path}/demo/train]}}", f"data.val={{demo: [{tmp_path}/demo/val]}}",
        f"data.tokenizer={tmp_path}/demo/tokenizer", "data.image_size=32", "data.max_tokens=96",
        "data.batch_size=4", "data.workers=0", "model.config.hidden_size=32", "model.config.intermediate_size=48",
        "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2",
        "model.config.alpha_initializer=ones", "model.config.freeze_vision_layers=true",
        "model.config.freeze_vision_module_exceptions=[]", "model.config.vision_config.embed_dim=16",
        "model.config.vision_config.image_size=32", "model.config.vision_config.patch_size=16",
        "model.config.vision_config.intermediate_size=32", "model.config.vision_config.num_hidden_layers=1",
        "model.config.vision_config.num_attention_heads=2",
    ]  # fmt: skip
    losses = []
    for name, extra in (("plain", []), ("cold", [f"model.feature_cache={tmp_path}/features"]),
                        ("warm", [f"model.feature_cache={tmp_path}/features"])):  # fmt: skip
        assert main(["train", *options, f"runs_dir={tmp_path}/{name}", *extra]) == 0
        losses.append(read_metrics(tmp_path / name / "idefics_demo" / "latest")["train/loss"])
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    refused = ["train", *options, f"model.feature_cache={tmp_path}/features", "data.crop_scale=[0.9,1.0]"]
    assert main(refused) == 2
    assert "data.crop_scale=null" in capsys.readouterr().err
