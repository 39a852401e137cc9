"""Runs on a quantised base: gradients, bytes, checkpoints without the base, resume, adapters for Transformers."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from interloom.models.idefics import image_attention_mask
from interloom.models.idefics.quantized import QuantizedLinear
from interloom.train.checkpointing.frozen_base import FrozenBase
from interloom.train.checkpointing.load import load_pretrained, read_state
from interloom.train.cli import main
from interloom.train.commands.schemas import register_schemas
from interloom.train.config import typed
from interloom.train.data.drawn.documents import write_demo
from interloom.train.objectives.idefics.cost import plan_idefics
from interloom.train.objectives.idefics.objective import prepare
from torch import nn

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """demo/ of drawn documents and released/, a checkpoint as Transformers writes it."""
    root = tmp_path_factory.mktemp("qlora")
    write_demo(root / "demo", train=12, val=4, seed=0)
    config = transformers.IdeficsConfig(
        vocab_size=128, additional_vocab_size=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, cross_layer_interval=1, alpha_initializer="ones", initializer_range=0.2,
        use_resampler=True, qk_layer_norms=True,
        vision_config={
            "embed_dim": 64, "image_size": 32, "patch_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
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
    return root


def overrides(root, *further):
    return [
        "experiment=idefics_9b_qlora", f"data.sources={{mine: [{root}/demo/train]}}",
        f"data.tokenizer={root}/demo/tokenizer", f"model.init_checkpoint={root}/released", "trainer.max_steps=4",
        "trainer=cpu", "model.frozen_dtype=float32", "data.image_size=32", "data.max_tokens=64", "data.max_images=2",
        "data.batch_size=4", "data.workers=0", "callbacks.progress=false", "optim.lr=0.003", "optim.warmup_steps=0",
        "callbacks.checkpoint.every_steps=2", f"runs_dir={root}/runs", *further,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(root):
    """Directory of a run of four steps that saved after two and exported its adapters."""
    assert main(["train", *overrides(root)]) == 0
    return root / "runs" / "idefics_9b_qlora" / "latest"


def weights_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def inputs(image):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 100, (2, 24), generator=generator)
    ids[:, 2] = image
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, 32, 32, generator=generator),
        "image_attention_mask": image_attention_mask(ids, image, None, 1),
    }


def configured(root, *further):
    register_schemas()
    given = [one for one in overrides(root, "name=x", *further) if not one.startswith("data.sources")]
    with initialize_config_module("interloom.conf", version_base=None):
        return typed(compose("train", given))


def prepared(root, settings):
    model, _ = load_pretrained(root / "released", dtype="float32", processor=False)
    torch.manual_seed(1)
    prepare(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_those_of_the_dequantised_base(root, kind):
    settings = configured(
        root, f"model.quantize={kind}", "model.lora.parts=both", "model.lora.dropout=0"
    ).model
    model = prepared(root, settings)
    stored = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(stored) == 2 * 7 + 2 * 7 + 6
    reference = copy.deepcopy(model)
    for name in stored:
        layer = reference.get_submodule(name)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = layer.bias
        reference.set_submodule(name, linear)
    reference.double()
    batch = inputs(128)
    for one in (model, reference):
        values = {n: v.to(one.dtype) if v.is_floating_point() else v for n, v in batch.items()}
        one.train()(**values, labels=values["input_ids"]).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert sum("lora_A" in name for name in found) == len(stored)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name].double(), gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "options",
    [("model.quantize=nf4",), ("model.quantize=nf4", "model.quantization.double_quant=false"), ("model.quantize=int8",),
     ("model.quantization.skip=[vision_model, down_proj]", "model.frozen_dtype=bfloat16")],
)  # fmt: skip
def test_bytes_equal_the_plan(root, options):
    settings = configured(root, *OWN_SHAPE, *options)
    model = prepared(root, settings.model)
    size, plans = plan_idefics(settings)
    assert sum(parameter.nbytes for parameter in model.parameters()) == size.weight_bytes
    assert plans[0][0].weights == size.weight_bytes
    plain, _ = load_pretrained(root / "released", processor=False)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert size.parameters == adapters + sum(parameter.numel() for parameter in plain.parameters())


# What `interloom train` takes over from the checkpoint before it plans.
OWN_SHAPE = [
    f"model.config.{option}"
    for option in (
        "vocab_size=128", "additional_vocab_size=2", "hidden_size=64", "intermediate_size=96", "num_hidden_layers=2",
        "num_attention_heads=2", "cross_layer_interval=1", "alpha_initializer=ones", "use_resampler=true",
        "qk_layer_norms=true", "vision_config.embed_dim=64", "vision_config.image_size=32",
        "vision_config.patch_size=16", "vision_config.intermediate_size=64", "vision_config.num_hidden_layers=1",
        "vision_config.num_attention_heads=2", "perceiver_config.resampler_n_latents=4",
        "perceiver_config.resampler_depth=1", "perceiver_config.resampler_n_heads=2",
        "perceiver_config.resampler_head_dim=8", "perceiver_config.qk_layer_norms_perceiver=false",
    )
]  # fmt: skip


def test_a_checkpoint_holds_what_trains_and_names_the_rest(run, root):
    checkpoint = run / "checkpoints" / "step-00000004.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert not any(".base_layer." in name or "embed_tokens.weight" in name for name in state["state_dict"])
    assert any("lora_A" in name for name in state["state_dict"])
    assert any("alpha_cross_attn" in name for name in state["state_dict"])
    base = state["interloom"]["base"]
    assert base["source"] == str((root / "released").resolve())
    saved = FrozenBase.from_dict(base, checkpoint)
    with pytest.raises(ValueError, match="another machine or version"):
        saved.check(replace(saved, fingerprint="0" * 64), checkpoint)
    with pytest.raises(ValueError, match="not say what its frozen weights are"):
        FrozenBase.from_dict(base | {"storage": {"kind": "nf4", "block_size": 0}}, checkpoint)
    loaded, _ = load_pretrained(checkpoint)
    adapters, _ = load_pretrained(run)
    assert_equal(loaded.state_dict(), adapters.state_dict())


def test_a_resumed_run_is_the_same_run(run, root, tmp_path):
    begun = tmp_path / "begun.ckpt"
    shutil.copy(run / "checkpoints" / "step-00000002.ckpt", begun)
    assert main(["train", *overrides(root, f"runs_dir={tmp_path}", f"ckpt_path={begun}")]) == 0
    last = "idefics_9b_qlora/latest/checkpoints/step-00000004.ckpt"
    assert_equal(weights_of(tmp_path / last), weights_of(run / "checkpoints" / "step-00000004.ckpt"))


@pytest.mark.faults
def test_a_killed_run_goes_on_bit_for_bit(run, root, tmp_path):
    code = "import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))"
    # Enough steps that it is killed in the midst of them.
    job = subprocess.Popen([sys.executable, "-c", code, "train", *overrides(root, f"runs_dir={tmp_path}")])
    saved = "idefics_9b_qlora/latest/checkpoints/step-00000002.ckpt"
    while not (tmp_path / saved).exists():
        assert job.poll() is None
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert not (tmp_path / "idefics_9b_qlora/latest/model").exists()
    assert main(["train", *overrides(root, f"runs_dir={tmp_path}", "ckpt_path=last")]) == 0
    last = "idefics_9b_qlora/latest/checkpoints/step-00000004.ckpt"
    assert_equal(weights_of(tmp_path / last), weights_of(run / "checkpoints" / "step-00000004.ckpt"))


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_go_on_as_one_would(strategy, run, root, tmp_path):
    """From the checkpoint of one process; frozen matrices are cut up or copied, and stay out of what is saved."""
    begun = tmp_path / "begun.ckpt"
    shutil.copy(run / "checkpoints" / "step-00000002.ckpt", begun)
    code = "import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))"
    options = [
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
        f"ckpt_path={begun}",
        f"runs_dir={tmp_path}",
    ]
    assert subprocess.run([sys.executable, "-c", code, "train", *overrides(root, *options)]).returncode == 0
    (last,) = (tmp_path / "idefics_9b_qlora" / "latest" / "checkpoints").glob("step-00000004.*")
    found, wanted = (
        read_state(path)["state_dict"] for path in (last, run / "checkpoints" / "step-00000004.ckpt")
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=0, msg=name)


def test_another_base_is_refused(run, root, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(root / "released", other)
    model = transformers.IdeficsForVisionText2Text.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    begun = run / "checkpoints" / "step-00000002.ckpt"
    capsys.readouterr()
    for option, said in [
        (f"model.init_checkpoint={other}", "are not what they were"),
        ("model.quantize=int8", "stored in another way"),
    ]:
        arguments = overrides(root, f"runs_dir={tmp_path}/runs", f"ckpt_path={begun}", option)
        assert main(["train", *arguments]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert said in errors[0]
        assert not (tmp_path / "runs").exists()


def test_transformers_and_peft_generate_the_same_tokens(run):
    folder = run / "model"
    ours, processor = load_pretrained(folder)
    told = json.loads((folder / "quantization.json").read_text())
    settings = transformers.BitsAndBytesConfig(**told["transformers"] | {"bnb_4bit_compute_dtype": "float32"})
    base = transformers.IdeficsForVisionText2Text.from_pretrained(
        told["base"]["source"], quantization_config=settings, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    batch = inputs(processor.tokenizer.require("<image>"))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    found, wanted = ours.generate(**batch, **options), theirs.generate(**batch, **options)
    assert torch.equal(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=1e-4)
        before, _ = load_pretrained(told["base"]["source"], processor=False)
        assert (before(**batch).logits - ours(**batch).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.quantize=nf5"], "use nf4, int8"),
        (["model.init_checkpoint=null", *OWN_SHAPE], "needs model.init_checkpoint"),
        ([], "interloom[qlora]"),
    ],
)
def test_bad_input_is_one_sentence(options, message, root, tmp_path, capsys, monkeypatch):
    if not options:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert main(["train", *overrides(root, f"runs_dir={tmp_path}/bad", *options)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.quantization.block_size=128"], "narrower"),
        (["model.quantization.skip=[nowhere]"], "names nowhere"),
        (["model.lora.rank=0"], "needs adapters"),
        (["model.lora.export=both"], "use merged, adapters"),
        (["model.quantization.block_size=65"], "use 32, 64"),
        (["model.quantization.compute_dtype=int8"], "use auto, float32"),
        (["model.lora.rank=0", "model.lora.export=merged", "model.config.freeze_text_layers=false",
          "model.config.freeze_vision_layers=false", "model.freeze_cross_attention=false"], "no frozen matrix"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_is_refused_by_the_plan_too(options, message, root):
    with pytest.raises(ValueError, match=message):
        plan_idefics(configured(root, *OWN_SHAPE, *options))


def test_nine_billion_parameters_fit_a_gpu_of_24_gb():
    register_schemas()
    with initialize_config_module("interloom.conf", version_base=None):
        settings = typed(compose("train", ["experiment=idefics_9b_qlora", "name=x"]))
    size, plans = plan_idefics(settings)
    assert size.parameters > 8.9e9
    # 3 GiB are left to CUDA and the allocator.
    assert plans[0][0].gpus == 1
    assert plans[0][0].total < 24e9 - 3 * 2**30
