"""``interloom compose``, and runs that begin from what it writes or compose their model themselves."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from interloom.models import IdeficsForVisionText2Text, IdeficsProcessor
from interloom.train.checkpointing.load import load_pretrained, model_type
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo

TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Drawn documents; a Llama and a Qwen3 over their tokenizer; a CLIP for pictures of 32 pixels."""
    root = tmp_path_factory.mktemp("compose")
    write_demo(root / "demo", train=16, val=4, seed=0)
    torch.manual_seed(0)
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
        "qwen3": transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=True)
        ),
        "clip": transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                patch_size=16,
            )
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(root / name)
        if name != "clip":
            shutil.copytree(root / "demo" / "tokenizer", root / name, dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def composed(root):
    """A Qwen3 with the CLIP, as the command writes it."""
    folder = root / "composed"
    code = main(
        ["compose", "--text", str(root / "qwen3"), "--vision", str(root / "clip"), str(folder), "--alpha", "vector",
         "--cross-layer-interval", "2", "--no-resampler"]
    )  # fmt: skip
    assert code == 0
    return folder


def train(root, name, *overrides, sharded=False):
    arguments = [
        "train", "experiment=idefics_9b_lora", f"data.sources={{demo: [{root}/demo/train]}}", "model.lora.rank=0",
        "trainer.precision=32-true", "model.frozen_dtype=float32", f"data.tokenizer={root}/demo/tokenizer",
        f"runs_dir={root}/runs", f"name={name}", "data.max_tokens=96", "data.max_images=4", "trainer.max_steps=2",
        "data.workers=0", "callbacks.progress=false", "data.batch_size=4", "callbacks.log_every=1", "optim.lr=0.01",
        "optim.warmup_steps=0",
    ]  # fmt: skip
    if not sharded:
        arguments.append("trainer=cpu")
    return main([*arguments, *overrides]), root / "runs" / name / "latest"


def first_loss(run):
    return float((run / "metrics.csv").read_text().splitlines()[1].split(",")[1])


def test_the_command_writes_a_model_ready_to_train(composed, root, capsys):
    assert model_type(composed) == "idefics"
    model, processor = load_pretrained(composed)
    config = model.config
    assert (config.num_key_value_heads, config.head_dim, config.gated_blocks) == (2, 16, 2)
    assert config.alpha_type == "vector"
    assert isinstance(processor, IdeficsProcessor)
    assert processor.image_processor.image_size == 32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "qwen3").eval()
    batch = processor(text=["the red ball"], add_special_tokens=True)
    with torch.no_grad():
        ours = model(input_ids=batch["input_ids"]).logits[..., :128]
        torch.testing.assert_close(ours, theirs(batch["input_ids"]).logits, atol=1e-5, rtol=1e-5)
    generate = ["generate", "--checkpoint", str(composed), "--prompt", "the red", "--max-new-tokens", "3"]
    assert main(generate) == 0
    capsys.readouterr()


def test_help_shows_worked_examples(capsys):
    assert main(["compose", "--help"]) == 0
    assert capsys.readouterr().out.count("interloom compose --text") == 3
    assert main(["--help"]) == 0
    assert "compose" in capsys.readouterr().out


def test_what_transformers_has_is_converted_for_it(composed, root, capsys):
    plain, out = root / "plain", root / "for_transformers"
    sources = ["--text", str(root / "llama"), "--vision", str(root / "clip")]
    assert main(["compose", *sources, str(plain)]) == 0
    assert main(["convert", str(plain), str(out)]) == 0
    assert "for Transformers, with 4 heads of keys for 2" in capsys.readouterr().out
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
    ours = IdeficsForVisionText2Text.from_pretrained(plain)
    ids = torch.randint(4, 128, (1, 9), generator=torch.Generator().manual_seed(0))
    seen, pixels = torch.ones(1, 9, 1, dtype=torch.long), torch.zeros(1, 1, 3, 32, 32)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_attention_mask": seen}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert main(["convert", str(plain), str(root / "kept"), "--format", "interloom"]) == 0
    assert IdeficsForVisionText2Text.from_pretrained(root / "kept").config.num_key_value_heads == 2
    # A Qwen3 is refused where it is asked for, and else written for this program alone.
    capsys.readouterr()
    refused = ["convert", str(composed), str(root / "no"), "--format", "transformers"]
    assert main(refused) == 2
    error = capsys.readouterr().err
    assert "norms of queries and keys" in error
    assert len(error.strip().splitlines()) == 1
    assert not (root / "no").exists()
    assert main(["convert", str(composed), str(root / "own")]) == 0
    assert "for this program alone" in capsys.readouterr().out
    assert json.loads((root / "own" / "config.json").read_text())["model_type"] == "interloom_idefics"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--text", "CLIP"], "holds a 'clip_vision_model' model; a text source is one of llama"),
        (["--vision", "LLAMA"], "llama"),
        (["--alpha", "matrix"], "alpha is 'matrix'; give float, vector"),
        (["--cross-layer-interval", "0"], "cross_layer_interval is 0"),
        (["--latents", "0"], "latents is 0"),
        (["--dtype", "int8"], "dtype=int8 is not known"),
        (["--text", "EMPTY"], "has no config.json"),
        (["--text", "GGUF"], "GGUF"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(options, message, root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    places = {
        "CLIP": root / "clip", "LLAMA": root / "llama", "EMPTY": tmp_path / "empty", "GGUF": tmp_path / "broken.gguf",
    }  # fmt: skip
    given = {"--text": str(root / "llama"), "--vision": str(root / "clip")}
    given |= {
        name: str(places.get(value, value)) for name, value in zip(options[::2], options[1::2], strict=True)
    }
    arguments = [part for pair in given.items() for part in pair]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["compose", *arguments, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_checkpoint_is_not_overwritten_unasked(composed, root, capsys):
    again = ["compose", "--text", str(root / "llama"), "--vision", str(root / "clip"), str(composed)]
    assert main(again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["compose", *again[1:-1], str(root / "demo")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_run_composes_its_model_itself(composed, root, capsys):
    """It follows the sources and the run's own way of joining them, and starts at the language model's loss."""
    sources = [f"model.init_text={root}/qwen3", f"model.init_vision={root}/clip"]
    joined = ["model.config.use_resampler=false", "model.config.cross_layer_interval=2"]
    code, run = train(root, "itself", *sources, *joined)
    assert code == 0
    assert "model.config follows" in capsys.readouterr().err
    said = yaml.safe_load((run / "config.yaml").read_text())["model"]["config"]
    assert (said["num_key_value_heads"], said["text_qk_norms"], said["tie_word_embeddings"]) == (
        2,
        True,
        True,
    )
    assert (said["cross_layer_interval"], said["use_resampler"], said["vision_config"]["embed_dim"]) == (
        2,
        False,
        16,
    )
    exported, _ = load_pretrained(run)
    assert exported.config.max_position_embeddings == 256
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    source = load_pretrained(composed)[0].state_dict()
    trained = exported.state_dict()
    frozen = [
        n
        for n in source
        if n.startswith(("model.layers.", "model.vision_model.", "model.embed_tokens.weight"))
    ]
    assert frozen
    assert all(torch.equal(source[name], trained[name]) for name in frozen)
    assert any(bool(v.any()) for n, v in trained.items() if "alpha" in n)
    # The same model read from the folder gives the same first loss: the gates are closed.
    code, other = train(root, "folder", f"model.init_checkpoint={composed}")
    assert code == 0
    assert first_loss(other) == pytest.approx(first_loss(run), rel=1e-6)
    assert main(["convert", str(next((run / "checkpoints").glob("*.ckpt"))), str(root / "converted")]) == 0
    again = IdeficsForVisionText2Text.from_pretrained(root / "converted").state_dict()
    assert all(torch.equal(again[name], trained[name]) for name in trained)


def test_a_run_with_adapters_on_grouped_heads(composed, root):
    pytest.importorskip("peft")
    code, run = train(root, "adapters", f"model.init_checkpoint={composed}", "model.lora.rank=2")
    assert code == 0
    before, after = load_pretrained(composed)[0].state_dict(), load_pretrained(run)[0].state_dict()
    name = "model.layers.0.self_attn.k_proj.weight"
    assert before[name].shape == after[name].shape == (32, 32)
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.init_text=QWEN"], "model.init_text is given without model.init_vision"),
        (["model.init_vision=CLIP"], "model.init_vision is given without model.init_text"),
        (
            ["model.init_text=QWEN", "model.init_vision=CLIP", "model.init_checkpoint=COMPOSED"],
            "are both given",
        ),
        (
            ["model.init_text=QWEN", "model.init_vision=CLIP", "data.tokenizer=OTHER"],
            "is not the tokenizer of",
        ),
        (["model.init_text=QWEN", "model.init_vision=CLIP", "model.config.hidden_size=64"], "do not fit"),
        (["model.init_text=CLIP", "model.init_vision=CLIP"], "a text source is one of"),
    ],
)
def test_sources_that_do_not_fit_a_run(overrides, message, composed, root, capsys):
    other = root / "other"
    if not other.exists():
        shutil.copytree(root / "demo" / "tokenizer", other)
        described = json.loads((other / "tokenizer.json").read_text())
        described["added_tokens"].append({**described["added_tokens"][-1], "id": 130, "content": "<more>"})
        (other / "tokenizer.json").write_text(json.dumps(described))
    places = {"QWEN": root / "qwen3", "CLIP": root / "clip", "COMPOSED": composed, "OTHER": other}
    given = [f"{name}={places.get(value, value)}" for name, value in (item.split("=") for item in overrides)]
    code, run = train(root, "wrong", *given)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not run.parent.exists()


def test_a_plan_of_what_would_be_composed(root, capsys):
    sources = [f"model.init_text={root}/qwen3", f"model.init_vision={root}/clip"]
    code, run = train(root, "plan", *sources, "plan_only=true", "model.config.use_resampler=false")
    assert code == 0
    assert "0.00 B parameters" in capsys.readouterr().out
    assert not run.parent.exists()


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from interloom.models import IdeficsForVisionText2Text
from interloom.train.config import TrainerConfig
from interloom.train.objectives.idefics.sharding import shard_idefics
from interloom.train.parallel.sharding import Sharder
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://{store}", rank=int(sys.argv[1]), world_size=2)
model = IdeficsForVisionText2Text.from_pretrained({folder!r}).train().requires_grad_(True)
with torch.no_grad():
    for block in model.model.gated_cross_attn_layers:
        block.alpha_cross_attn.fill_(0.5), block.alpha_dense.fill_(0.5)
generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 128, (2, 24), generator=generator)
inputs = dict(
    input_ids=ids, labels=ids, document_ids=torch.arange(24).expand(2, -1) // 9,
    pixel_values=torch.randn(2, 1, 3, 32, 32, generator=generator),
    image_attention_mask=torch.ones(2, 24, 1, dtype=torch.bool),
)
def step():
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
loss, plain = step()
model.zero_grad()
sharder = Sharder.over_all_ranks(TrainerConfig())
shard_idefics(model, sharder)
sharder.root(model, [])
again, found = step()
assert abs(loss - again) < 1e-5, (loss, again)
assert plain.keys() == found.keys() and any(isinstance(g, DTensor) for g in found.values())
assert model.lm_head.weight is model.model.embed_tokens.weight
for name, grad in found.items():
    grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
    torch.testing.assert_close(grad, plain[name], atol=1e-5, rtol=1e-4, msg=name)
print("equal", len(found))
dist.destroy_process_group()
"""


@pytest.mark.faults  # for its time alone
def test_shards_of_grouped_and_tied_heads_compute_what_one_process_does(composed, tmp_path):
    code = SHARDED.format(store=tmp_path / "store", folder=str(composed))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=280)[0].decode() for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(outputs)[-3000:]
    assert "equal" in outputs[0]
