"""A run that begins from a checkpoint follows what the checkpoint says: its configuration, pictures and generation."""

import json
from pathlib import Path

import pytest
import yaml
from interloom.models import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsPerceiverConfig,
    IdeficsVisionConfig,
)
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo

QUICK = [
    "trainer=cpu",
    "trainer.max_steps=1",
    "data.workers=0",
    "callbacks.progress=false",
    "data.batch_size=2",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A few documents, and an IDEFICS whose files say unusual things."""
    root = tmp_path_factory.mktemp("adoption")
    write_demo(root / "demo", train=4, val=2, seed=0)
    config = IdeficsConfig(
        vocab_size=128, additional_vocab_size=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, alpha_initializer="ones", use_resampler=True, dropout=0.125, rms_norm_eps=1e-5,
        vision_config=IdeficsVisionConfig(
            embed_dim=16, image_size=32, patch_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2,
        ),
        perceiver_config=IdeficsPerceiverConfig(
            resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8
        ),
        max_position_embeddings=77,
    )  # fmt: skip
    model = IdeficsForVisionText2Text(config)
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.num_beams = 2
    model.save_pretrained(root / "start")
    for file in (root / "demo" / "tokenizer").iterdir():
        (root / "start" / file.name).write_bytes(file.read_bytes())
    (root / "start" / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "note": "ours"}
        )
    )
    return root


def train(root, name, *overrides):
    shards = next(p.parent for p in (root / "demo").rglob("*.tar") if "train" in str(p))
    code = main(
        ["train", "experiment=idefics_9b_lora", f"data.sources={{demo: [{shards}]}}", "model.lora.rank=0",
         "trainer.precision=32-true", "model.frozen_dtype=float32", f"data.tokenizer={root}/demo/tokenizer",
         f"model.init_checkpoint={root}/start", f"runs_dir={root}/{name}", "data.max_tokens=64",
         "data.max_images=2", *QUICK, *overrides]
    )  # fmt: skip
    return code, root / name / "idefics_9b_lora" / "latest"


def test_what_the_checkpoint_says_is_trained_written_down_and_exported(root, capsys):
    code, run = train(root, "plain")
    assert code == 0
    told = capsys.readouterr().err
    assert "pictures follow preprocessor_config.json" in told
    said = yaml.safe_load((run / "config.yaml").read_text())
    assert said["data"]["mean"] == said["data"]["std"] == [0.5] * 3
    assert said["data"]["image_size"] == 32
    assert said["data"]["resample"] == 2
    assert said["model"]["config"]["hidden_size"] == 32
    assert said["model"]["config"]["vision_config"]["embed_dim"] == 16
    assert said["model"]["config"]["rms_norm_eps"] == 1e-5
    assert said["model"]["config"]["dropout"] == 0.125
    pictures = json.loads((run / "model" / "preprocessor_config.json").read_text())
    assert pictures["image_mean"] == pictures["image_std"] == [0.5] * 3
    assert (pictures["resample"], pictures["note"]) == (2, "ours")
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["dropout"], config["max_position_embeddings"]) == (0.125, 77)
    generation = json.loads((run / "model" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["num_beams"]) == ([2, 7], 2)
    saved = next((run / "checkpoints").glob("*.ckpt"))
    assert main(["convert", str(saved), str(root / "converted")]) == 0
    assert json.loads((root / "converted" / "generation_config.json").read_text()) == generation
    assert json.loads((root / "converted" / "preprocessor_config.json").read_text()) == pictures


def test_what_is_given_beside_it_is_applied_with_a_warning(root, capsys):
    code, run = train(
        root, "given", "model.config.dropout=0.25", "data.mean=[0.4,0.4,0.4]", "data.resample=1"
    )
    assert code == 0
    told = capsys.readouterr().err
    assert "warning: model.config.dropout=0.25 (the checkpoint has 0.125)" in told
    assert "warning: data.mean=[0.4, 0.4, 0.4]" in told
    assert "data.resample=1 (the checkpoint has 2)" in told
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["config"]["dropout"] == 0.25
    assert json.loads((run / "model" / "config.json").read_text())["dropout"] == 0.25
    pictures = json.loads((run / "model" / "preprocessor_config.json").read_text())
    assert (pictures["image_mean"], pictures["resample"]) == ([0.4] * 3, 1)


def test_a_filter_that_there_is_not_is_refused(root, capsys):
    code, _ = train(root, "filter", "data.resample=9")
    assert code == 2
    assert (
        "data.resample=9 given, expected the number of a Pillow filter: 0 nearest" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "override", ["model.config.hidden_size=64", "model.config.vision_config.embed_dim=32"]
)
def test_what_cannot_be_is_refused_before_anything_is_written(root, override, capsys):
    code, run = train(root, "refused", override)
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {override}")
    assert len(error.splitlines()) == 1
    assert not run.exists()


def test_the_plan_is_of_the_checkpoint(root, capsys):
    code, _ = train(root, "planned", "plan_only=true")
    assert code == 0
    count = IdeficsForVisionText2Text.from_pretrained(root / "start").num_parameters()
    assert f"{count / 1e9:.2f} B parameters" in capsys.readouterr().out


def test_groupvit_follows_its_checkpoint_too(tmp_path, capsys):
    fixture = Path(__file__).parents[2] / "fixtures" / "transformers_437" / "groupvit"
    assert main(["data", "demo", "--out", str(tmp_path / "pairs"), "--train", "8", "--val", "4"]) == 0
    shards = next(p.parent for p in (tmp_path / "pairs").rglob("*.tar") if "train" in str(p))
    run = ["train", "experiment=groupvit_demo", f"data.train=[{shards}]", "data.val=[]", "task=none",
           f"model.init_checkpoint={fixture}", "model.tokenizer=null", f"runs_dir={tmp_path}/runs",
           "data.batch_size=4", "trainer.max_steps=1", "data.workers=0", "callbacks.progress=false",
           "trainer=cpu", "model.multi_label=0"]  # fmt: skip
    assert main(run) == 0
    model = tmp_path / "runs" / "groupvit_demo" / "latest" / "model"
    pictures = json.loads((model / "preprocessor_config.json").read_text())
    assert (pictures["image_mean"], pictures["resample"]) == ([0.5] * 3, 2)
    said = yaml.safe_load((model.parent / "config.yaml").read_text())
    assert said["data"]["image_size"] == 24
    assert said["model"]["config"]["vision_config"]["hidden_size"] == 16
    assert main([*run, "model.config.projection_dim=16"]) == 2
    assert "model.config.projection_dim=16" in capsys.readouterr().err
