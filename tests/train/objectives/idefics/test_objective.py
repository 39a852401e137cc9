"""The objective of packed documents against plain sums in float64, over micro-batches and ranks."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from interloom.models.idefics import IdeficsForVisionText2Text
from interloom.train.config import OptimConfig, TrainConfig, TrainerConfig
from interloom.train.data.documents.dataset import DocumentsConfig, documents_loader
from interloom.train.data.drawn.documents import write_demo
from interloom.train.objectives.idefics.build import build_loader, build_module
from interloom.train.objectives.idefics.config import IdeficsTrainConfig, LoraConfig

MODEL = {
    "vocab_size": 128,
    "additional_vocab_size": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "alpha_initializer": "ones",
    "freeze_text_layers": False,
    "freeze_vision_layers": False,
    "pad_token_id": 3,
}
VISION = {
    "embed_dim": 16, "image_size": 32, "patch_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "demo"
    write_demo(folder, train=60, val=8, seed=1)
    return folder


def configured(folder, *, micro=None, batch=6, model=None, vision=None, **options):
    training = IdeficsTrainConfig(**options)
    for name, value in {**MODEL, **(model or {})}.items():
        setattr(training.config, name, value)
    for name, value in {**VISION, **(vision or {})}.items():
        setattr(training.config.vision_config, name, value)
    data = DocumentsConfig(
        sources={"a": [str(folder / "train")], "b": [str(folder / "val")]},
        weights={"a": 1.0, "b": 1.0},
        tokenizer=str(folder / "tokenizer"),
        max_tokens=96,
        image_size=32,
        crop_scale=None,
        batch_size=batch,
        workers=0,
    )
    trainer = TrainerConfig(max_steps=10, micro_batch_size=micro)
    return TrainConfig(model=training, data=data, optim=OptimConfig(), trainer=trainer, name="x")


def module_and_batch(folder, **options):
    config = configured(folder, **options)
    loader = build_loader(config, rank=0, world_size=1)
    module = build_module(config, fingerprint=loader.fingerprint())
    module.manual_backward = lambda loss: loss.backward()
    batch = module.transform(next(iter(loader)))
    return module, batch


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_accumulation_equals_the_one_big_batch(folder, z_loss):
    whole, batch = module_and_batch(folder, z_loss=z_loss)
    metrics = whole.backward_step(batch, 0)
    for micro in (1, 4):
        parts, _ = module_and_batch(folder, z_loss=z_loss, micro=micro)
        assert parts.backward_step(batch, 0)["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)
        for name, gradient in gradients(parts).items():
            torch.testing.assert_close(gradient, gradients(whole)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("where", ["adapters", "images", "everywhere"])
def test_dropout_follows_the_samples_whatever_the_split(folder, where, recomputed):
    """So it does over ranks and resumes; nothing is drawn from PyTorch's generator, which no checkpoint holds."""
    if where == "adapters":
        pytest.importorskip("peft")
    options = {
        "adapters": {"lora": LoraConfig(rank=2, parts="both", dropout=0.4), "freeze_cross_attention": True},
        "images": {"vision": {"attention_dropout": 0.3}},
        "everywhere": {"vision": {"attention_dropout": 0.3}, "model": {"dropout": 0.3}},
    }[where]

    def step(micro, number):
        module, batch = module_and_batch(folder, micro=micro, gradient_checkpointing=recomputed, **options)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # zeros at first: nothing would pass the dropout before it
                torch.nn.init.constant_(parameter, 0.05)
        before = torch.get_rng_state()
        loss = float(module.backward_step(batch, number)["loss"])
        assert torch.equal(torch.get_rng_state(), before)
        return loss, gradients(module)

    loss, whole = step(None, 3)
    for micro in (1, 4):
        found, parts = step(micro, 3)
        assert found == pytest.approx(loss, rel=1e-6)
        assert parts.keys() == whole.keys()
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
    assert step(None, 4)[0] != pytest.approx(loss, rel=1e-6)


def test_loss_is_the_mean_over_real_tokens_and_each_source(folder):
    module, batch = module_and_batch(folder)
    metrics = module.backward_step(batch, 0)
    model = copy.deepcopy(module.model).double().eval()
    total, count, by_source = 0.0, 0, {0: [0.0, 0], 1: [0.0, 0]}
    for row in range(len(batch["input_ids"])):
        documents = batch["document_ids"][row]
        for document in range(int(documents.max()) + 1):
            where = documents == document
            images = batch["image_attention_mask"][row][where].any(0)
            images = images if images.any() else torch.arange(len(images)) == 0
            logits = model(
                input_ids=batch["input_ids"][row][where][None],
                pixel_values=batch["pixel_values"][row][images][None].double(),
                image_attention_mask=batch["image_attention_mask"][row][where][:, images][None],
            ).logits[0]
            labels = batch["labels"][row][where][1:]
            nll = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum").item()
            total, count = total + nll, count + len(labels)
            source = int(batch["source_ids"][row][where][0])
            by_source[source] = [by_source[source][0] + nll, by_source[source][1] + len(labels)]
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)
    assert int(metrics["tokens"]) == count
    for number, name in enumerate(("a", "b")):
        nll, tokens = by_source[number]
        assert float(metrics[f"loss/{name}"]) == pytest.approx(nll / tokens, rel=1e-5)


def test_image_tokens_can_be_left_out_of_the_labels(folder):
    module, batch = module_and_batch(folder, predict_image_tokens=False)
    labels = module.labels(batch)
    image, around = module.image_tokens.tolist()
    assert not torch.isin(labels, module.image_tokens).any()
    kept = (batch["labels"] != -100) & (batch["labels"] != image) & (batch["labels"] != around)
    assert torch.equal(labels[kept], batch["labels"][kept])


def test_labels_all_masked_make_an_empty_step(folder):
    module, batch = module_and_batch(folder)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    metrics = module.backward_step(batch, 0)
    assert module.nothing_to_learn
    assert float(metrics["loss"]) == 0.0
    before = copy.deepcopy(module.state_dict())
    optimizer = module.configure_optimizers()
    steps = SimpleNamespace(optimizer=optimizer, step=optimizer.step, zero_grad=optimizer.zero_grad)
    module.optimizers = lambda: steps
    module.log_dict = lambda values, **_: None
    module._trainer = SimpleNamespace(global_step=0, precision_plugin=None)
    module.training_step(batch, 0)
    assert module.empty_steps == 1
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_parts_keep_no_graph_and_no_optimiser_state(folder):
    module, batch = module_and_batch(
        folder,
        model={
            "freeze_text_layers": True,
            "freeze_vision_layers": True,
            "freeze_lm_head": True,
            "use_resampler": True,
        },
    )
    module.backward_step(batch, 0)
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert any("gated_cross_attn" in name for name in trained)
    assert any("perceiver" in name for name in trained)
    assert any("additional" in name for name in trained)
    assert not any("vision_model" in name or ".layers.0.self_attn" in name for name in trained)
    inside = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert inside == {id(p) for p in module.parameters() if p.requires_grad}
    seen = []
    module.model.model.vision_model.register_forward_hook(
        lambda _, __, out: (
            seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)
            if not isinstance(out, dict) and not hasattr(out, "last_hidden_state")
            else seen.append(out.last_hidden_state.requires_grad)
        )
    )
    module.backward_step(batch, 0)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"parts": "head"}])
def test_impossible_adapters_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"model\.lora\.{next(iter(wrong))}="):
        LoraConfig(**wrong)


@pytest.mark.parametrize("parts", ["text", "vision", "both"])
def test_adapters_are_merged_on_export(folder, parts):
    pytest.importorskip("peft")
    frozen = {"freeze_text_layers": True, "freeze_vision_layers": True}
    module, batch = module_and_batch(folder, lora=LoraConfig(rank=2, parts=parts), model=frozen)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert any("vision_model" in n and "lora_A" in n for n in trained) == (parts != "text")
    assert any("model.layers" in n and "lora_A" in n for n in trained) == (parts != "vision")
    assert any("gated_cross_attn" in n for n in trained)
    assert not any("base_layer" in n for n in trained)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    plain = IdeficsForVisionText2Text(copy.deepcopy(module.model.config))
    plain.load_state_dict(module.export_state_dict())
    inputs = {name: batch[name][:2] for name in ("input_ids", "pixel_values", "image_attention_mask")}
    with torch.no_grad():
        ours, merged = module.model.eval()(**inputs).logits, plain.eval()(**inputs).logits
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match="tokens; set vocab_size"):
        module_and_batch(folder, model={"vocab_size": 100})


TWO_RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from interloom.train.parallel.gradients import average_gradients
from test_objective import configured, build_loader, build_module
from pathlib import Path
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
config = configured(Path({folder!r}))
loader = build_loader(config, rank=rank, world_size=2)
module = build_module(config, fingerprint=loader.fingerprint())
module.manual_backward = lambda loss: loss.backward()
batch = module.transform(next(iter(loader)))
if rank == 1:  # text only
    batch["image_attention_mask"][:] = False
metrics = module.backward_step(batch, 0)
average_gradients(module.parameters())
torch.save(({{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}, float(metrics["loss"])),
           "{out}" + str(rank))
"""


def test_a_rank_without_images_changes_nothing(folder, tmp_path):
    """Two ranks, one with text alone, give the gradient of one process with the same global batch."""
    module, batch = module_and_batch(folder)
    batch["image_attention_mask"][3:] = False
    loss = float(module.backward_step(batch, 0)["loss"])
    code = TWO_RANKS.format(
        tests=os.path.dirname(__file__), store=tmp_path / "store", folder=str(folder), out=tmp_path / "out"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    for rank in (0, 1):
        found, their_loss = torch.load(f"{tmp_path}/out{rank}", weights_only=True)
        assert their_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients(module).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_empty_source_is_an_error(folder):
    config = configured(folder)
    config.data.sources = {}
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        documents_loader(config.data)
