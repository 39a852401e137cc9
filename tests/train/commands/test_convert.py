"""``interloom convert`` between the formats that can be read."""

import json

import pytest
import torch
import transformers
from interloom.models import IdeficsForVisionText2Text
from interloom.train.cli import main
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def old_checkpoint(tmp_path_factory):
    """A ``.bin`` folder as Transformers once wrote it, with files of a tokenizer nobody here reads."""
    folder = tmp_path_factory.mktemp("old")
    torch.manual_seed(0)
    config = transformers.IdeficsConfig(
        vocab_size=50,
        additional_vocab_size=2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_config={
            "embed_dim": 16, "image_size": 28, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )  # fmt: skip
    model = transformers.IdeficsForVisionText2Text(config)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(config.to_json_string())
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder, model


def test_bin_becomes_safetensors(old_checkpoint, tmp_path, capsys):
    source, model = old_checkpoint
    target = tmp_path / "new"
    assert main(["convert", str(source), str(target), "--max-shard-size", "20KB"]) == 0
    assert "no processor" in capsys.readouterr().out
    assert not list(target.glob("*.bin"))
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "tokenizer.model").read_bytes() == b"pieces"
    back = transformers.IdeficsForVisionText2Text.from_pretrained(target, dtype="float32")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    again = tmp_path / "half"
    assert main(["convert", str(target), str(again), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((again / "config.json").read_text())["model_type"] == "idefics"
    assert IdeficsForVisionText2Text.from_pretrained(again).dtype == torch.bfloat16


def test_groupvit_goes_through_too(tmp_path):
    config = transformers.GroupViTConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
                     "vocab_size": 50},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 32,
                       "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]},
        projection_dim=8,
        projection_intermediate_dim=16,
    )  # fmt: skip
    model = transformers.GroupViTModel(config)
    model.save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "target")]) == 0
    back = transformers.GroupViTModel.from_pretrained(tmp_path / "target")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere"}, "nowhere"),
        ({"model_type": "llama"}, "llama"),
        ({"target": "file"}, "is a file"),
        ({"target": "source"}, "SRC and DST"),
        ({"target": "full"}, "--overwrite"),
    ],
)
def test_mistakes_are_one_line(change, message, old_checkpoint, tmp_path, capsys):
    source, _ = old_checkpoint
    target = tmp_path / "target"
    if change.get("source"):
        source = tmp_path / change["source"] / "a" / "b"
    if change.get("model_type"):
        source = tmp_path / "other"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(change))
    if change.get("target") == "file":
        target.touch()
    if change.get("target") == "source":
        target = source
    if change.get("target") == "full":
        target.mkdir()
        (target / "config.json").write_text("{}")
    assert main(["convert", str(source), str(target)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
