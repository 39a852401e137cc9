"""The five commands of docs/finetuning.md, on a handful of records and a small checkpoint made by Transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from PIL import Image

WORDS = "a red ball lies beside the blue box and a small green cup stands on it"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """records.jsonl, pictures/ and released/, a checkpoint as Transformers writes it beside its tokenizer."""
    root = tmp_path_factory.mktemp("finetuning")
    write_demo(root / "demo", train=4, val=2, seed=0)
    config = transformers.IdeficsConfig(
        vocab_size=128, additional_vocab_size=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, cross_layer_interval=1, alpha_initializer="ones", use_resampler=True,
        vision_config={
            "embed_dim": 16, "image_size": 32, "patch_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.IdeficsForVisionText2Text(config).save_pretrained(root / "released")
    for file in (root / "demo" / "tokenizer").iterdir():
        shutil.copy(file, root / "released" / file.name)
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    with open(root / "records.jsonl", "w") as file:
        for number in range(12):
            name = f"{number}.png"
            Image.fromarray(rng.integers(0, 255, (160, 160, 3), np.uint8)).save(root / "pictures" / name)
            record = {
                "images": [None, name, None],
                "texts": [WORDS, None, WORDS],
                "metadata": json.dumps([None, {"src": name}, None]),
                "general_metadata": "{}",
            }
            file.write(json.dumps(record) + "\n")
    return root


def test_from_raw_records_to_transformers(root, capsys):
    released, shards, run = root / "checkpoint", root / "mine", root / "runs" / "idefics_9b_lora" / "latest"
    assert main(["convert", str(root / "released"), str(released), "--dtype", "float32"]) == 0
    assert main(
        ["data", "obelics", str(root / "records.jsonl"), str(shards), "--tokenizer", str(released),
         "--image-root", str(root / "pictures"), "--workers", "1"]
    ) == 0  # fmt: skip
    assert main(["data", "verify", str(shards)]) == 0
    picture = root / "plan.png"
    plan = ["data", "plan", str(shards), "--max-tokens", "64", "--max-images", "2", "--out", str(picture)]
    assert main(plan) == 0
    assert Image.open(picture).size[0] > 100
    assert main(
        ["train", "experiment=idefics_9b_lora", f"data.sources={{mine: [{shards}]}}", f"data.tokenizer={released}",
         f"model.init_checkpoint={released}", "trainer.max_steps=2", f"runs_dir={root}/runs", "trainer=cpu",
         "trainer.precision=bf16-mixed", "data.image_size=32", "data.max_tokens=64", "data.max_images=2",
         "data.batch_size=4", "data.workers=0", "callbacks.progress=false"]
    ) == 0  # fmt: skip
    assert main(["convert", str(run / "model"), str(root / "exported"), "--merge-vocabulary"]) == 0
    model = transformers.IdeficsForVisionText2Text.from_pretrained(root / "exported")
    before = transformers.IdeficsForVisionText2Text.from_pretrained(root / "released")
    name = "model.layers.0.self_attn.q_proj.weight"
    change = (model.state_dict()[name] - before.state_dict()[name]).abs().max()
    assert 0 < float(change) < 0.1
    ids = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(model(input_ids=ids, labels=ids, pixel_values=torch.zeros(1, 1, 3, 32, 32),
                                image_attention_mask=torch.ones(1, 3, 1, dtype=torch.long)).loss)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.sources={mine: [NOWHERE]}"], "nowhere"),
        (["data.weights={mine: 0.0}"], "above 0"),
        (["trainer.precision=32-true"], "bf16"),
    ],
)
def test_bad_input_is_one_sentence(options, message, root, capsys):
    shards = root / "mine"
    options = [option.replace("NOWHERE", str(root / "nowhere")) for option in options]
    code = main(
        ["train", "experiment=idefics_9b_lora", f"data.sources={{mine: [{shards}]}}",
         f"data.tokenizer={root}/checkpoint", f"model.init_checkpoint={root}/checkpoint", "trainer.max_steps=2",
         f"runs_dir={root}/bad", "trainer=cpu", "trainer.precision=bf16-mixed", "data.image_size=32",
         "data.max_tokens=64", "data.workers=0", *options]
    )  # fmt: skip
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (root / "bad").exists()
