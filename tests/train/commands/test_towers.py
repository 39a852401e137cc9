"""The command line with image towers other than CLIP's: plans, a run from a checkpoint, and what it writes."""

import pytest
import torch
import yaml
from interloom.models import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessor
from interloom.models.idefics import IdeficsProcessor, IdeficsTokenizer
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from PIL import Image

VIT = {"image_size": 32, "patch_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
TOWERS = {
    "siglip_vision_model": {**VIT, "embed_dim": 16, "num_hidden_layers": 1},
    "dinov2_with_registers": {**VIT, "embed_dim": 16, "num_hidden_layers": 1, "num_register_tokens": 3,
                              "position_size": 48},
    "groupvit_vision_model": {**VIT, "embed_dim": 16, "depths": [1, 1], "num_group_tokens": [4, 0],
                              "num_output_groups": [4, 4]},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    write_demo(root / "demo", train=4, val=2, seed=0)
    return root


def write_model(root, tower):
    """A folder with a tower and its own way of preparing pictures."""
    folder = root / tower
    config = IdeficsConfig(
        vocab_size=128, additional_vocab_size=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, alpha_initializer="ones", vision_config={**TOWERS[tower], "model_type": tower},
    )  # fmt: skip
    torch.manual_seed(0)
    IdeficsForVisionText2Text(config).save_pretrained(folder)
    tokenizer = IdeficsTokenizer.from_pretrained(root / "demo" / "tokenizer")
    images = IdeficsImageProcessor(image_size=32, shortest_edge=40, image_mean=[0.5] * 3, resample=2)
    IdeficsProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def train(root, *overrides):
    shards = next(p.parent for p in (root / "demo").rglob("*.tar") if "train" in str(p))
    return main(
        ["train", "experiment=idefics_9b_lora", f"data.sources={{demo: [{shards}]}}", "model.lora.rank=0",
         "trainer=cpu", "trainer.precision=32-true", "model.frozen_dtype=float32", "data.workers=0",
         f"data.tokenizer={root}/demo/tokenizer", "data.max_tokens=64", "data.max_images=2", "data.batch_size=2",
         "trainer.max_steps=1", "callbacks.progress=false", f"runs_dir={root}/runs", *overrides]
    )  # fmt: skip


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_named_in_the_configuration_is_planned(tower, root, capsys):
    settings = {**TOWERS[tower], "model_type": tower}
    wanted = [f"model.config.vision_config.{name}={value}" for name, value in settings.items()]
    assert train(root, "plan_only=true", "model.config.num_hidden_layers=4", *wanted) == 0
    assert "GiB each" in capsys.readouterr().out


def test_a_tower_that_is_not_known_is_refused(root, capsys):
    assert train(root, "plan_only=true", "model.config.vision_config.model_type=vit") == 2
    told = capsys.readouterr().err
    assert "'vit', which is no image tower that is known here" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("tower", ["dinov2_with_registers", "groupvit_vision_model"])
def test_a_run_begins_from_a_model_with_a_tower_and_writes_one(tower, root, capsys):
    folder = write_model(root, tower)
    assert train(root, f"model.init_checkpoint={folder}") == 0
    run = root / "runs" / "idefics_9b_lora" / "latest"
    said = yaml.safe_load((run / "config.yaml").read_text())
    assert said["model"]["config"]["vision_config"]["model_type"] == tower
    assert said["model"]["config"]["vision_config"]["embed_dim"] == 16
    before = IdeficsForVisionText2Text.from_pretrained(folder)
    after = IdeficsForVisionText2Text.from_pretrained(run / "model")
    assert after.config.vision_config == before.config.vision_config
    for name, weight in after.model.vision_model.state_dict().items():  # frozen
        assert torch.equal(weight, before.model.vision_model.state_dict()[name])
    # Pictures are prepared as the loader prepared them.
    images = IdeficsImageProcessor.from_pretrained(run / "model")
    assert (images.image_size, images.shortest_edge, list(images.image_mean)) == (32, None, [0.5] * 3)
    Image.new("RGB", (50, 40), "red").save(root / "a.png")
    capsys.readouterr()
    arguments = ["--image", str(root / "a.png"), "--prompt", "A", "--max-new-tokens", "2"]
    assert main(["generate", "--checkpoint", str(run), *arguments]) == 0
