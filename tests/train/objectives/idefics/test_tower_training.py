"""Runs with other image towers than CLIP's: the objective, adapters, cached features, plans and shards."""

import os
import subprocess
import sys

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from interloom.train.config import OptimConfig, TrainConfig, TrainerConfig
from interloom.train.data.documents.dataset import DocumentsConfig
from interloom.train.data.drawn.documents import write_demo
from interloom.train.objectives.idefics.build import build_loader, build_module
from interloom.train.objectives.idefics.config import IdeficsTrainConfig, LoraConfig
from interloom.train.objectives.idefics.cost import LOSS_CHUNK, idefics_activations, plan_idefics
from interloom.train.objectives.idefics.flops import idefics_flops

MODEL = {
    "vocab_size": 128, "additional_vocab_size": 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "alpha_initializer": "ones", "freeze_text_layers": False, "freeze_vision_layers": False,
    "pad_token_id": 3,
}  # fmt: skip
VIT = {
    "embed_dim": 16, "image_size": 32, "patch_size": 8, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
TOWERS = {
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh"},
    "dinov2": {"position_size": 48, "use_swiglu_ffn": True},
    "dinov2_with_registers": {"num_register_tokens": 3},
    "groupvit_vision_model": {
        "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4], "drop_path_rate": 0.5,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "demo"
    write_demo(folder, train=24, val=4, seed=1)
    return folder


def configured(folder, tower, model=None, trainer=None, **options):
    training = IdeficsTrainConfig(**options)
    for name, value in {**MODEL, **(model or {})}.items():
        setattr(training.config, name, value)
    for name, value in {**VIT, "model_type": tower, **TOWERS[tower]}.items():
        setattr(training.config.vision_config, name, value)
    data = DocumentsConfig(
        sources={"a": [str(folder / "train")]}, weights={"a": 1.0}, tokenizer=str(folder / "tokenizer"), max_tokens=96,
        image_size=32, crop_scale=None, batch_size=4, workers=0,
    )  # fmt: skip
    trainer = TrainerConfig(max_steps=10, micro_batch_size=2, **(trainer or {}))
    return TrainConfig(model=training, data=data, optim=OptimConfig(), trainer=trainer, name="x")


def module_and_batch(folder, tower, **options):
    config = configured(folder, tower, **options)
    loader = build_loader(config, rank=0, world_size=1)
    module = build_module(config, fingerprint=loader.fingerprint())
    module.manual_backward = lambda loss: loss.backward()
    return module, module.transform(next(iter(loader)))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tower", TOWERS)
def test_a_step_of_the_objective(folder, tower, tmp_path):
    """All of the tower learns; the same step again, recomputed or in other portions, is the same step."""
    module, batch = module_and_batch(folder, tower)
    loss = module.backward_step(batch, 0)["loss"]
    own = gradients(module)
    assert bool(torch.isfinite(loss))
    idle = {
        n for n, p in module.named_parameters() if "vision_model" in n and not bool(own.get(n, p * 0).any())
    }
    assert all(n.endswith("k_proj.bias") for n in idle), idle
    again, _ = module_and_batch(folder, tower, gradient_checkpointing=True)
    assert torch.equal(again.backward_step(batch, 0)["loss"], loss)
    for name, grad in gradients(again).items():
        torch.testing.assert_close(grad, own[name], atol=1e-6, rtol=1e-4)
    # Frozen, its features can be kept; the second step reads them.
    frozen = {"freeze_vision_layers": True}
    cached, _ = module_and_batch(folder, tower, model=frozen, feature_cache=str(tmp_path))
    plain, _ = module_and_batch(folder, tower, model=frozen)
    expected = plain.backward_step(batch, 0)["loss"]
    for _ in range(2):
        torch.testing.assert_close(cached.backward_step(batch, 0)["loss"], expected)
    assert cached.features.hits == cached.features.misses > 0
    assert not any("vision_model" in name for name in gradients(plain))


@pytest.mark.parametrize("tower", ["dinov2", "groupvit_vision_model"])
def test_adapters_in_a_tower(folder, tower):
    pytest.importorskip("peft")
    frozen = {"freeze_text_layers": True, "freeze_vision_layers": True}
    module, batch = module_and_batch(folder, tower, lora=LoraConfig(rank=2, parts="vision"), model=frozen)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    module.backward_step(batch, 0)
    adapted = [n for n in gradients(module) if "vision_model" in n]
    layers = 2 if tower == "dinov2" else 3
    assert len(adapted) == 2 * layers * (7 if tower == "dinov2" else 6)
    plain = IdeficsForVisionText2Text(module.model.config)
    plain.load_state_dict(module.export_state_dict())
    inputs = {name: batch[name][:2] for name in ("input_ids", "pixel_values", "image_attention_mask")}
    with torch.no_grad():
        ours, merged = module.model.eval()(**inputs).logits, plain.eval()(**inputs).logits
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    if tower == "groupvit_vision_model":
        with pytest.raises(ValueError, match=r"lora\.dropout=0\.1 with model\.lora\.parts=both"):
            module_and_batch(folder, tower, lora=LoraConfig(rank=2, parts="both", dropout=0.1))


@pytest.mark.parametrize("tower", TOWERS)
def test_plans_follow_the_towers_numbers(folder, tower):
    """Activations of a tower that trains are what autograd keeps; keys an image enter every count."""
    config = configured(folder, tower)
    shape = config.model.model_config()
    size, plans = plan_idefics(config)
    assert size.parameters == sum(p.numel() for p in IdeficsForVisionText2Text(shape).parameters())
    assert plans
    counts = {"tokens": 10, "images": 0, "predicted": 10, "pairs": 50}
    without = idefics_flops(shape, **counts, looks=0).gated
    assert (
        idefics_flops(shape, **counts, looks=7).gated - without
        == 2 * 2 * 2 * 7 * shape.vision_config.num_tokens * 32
    )

    wide = {**VIT, **TOWERS[tower], "model_type": tower, "embed_dim": 64, "intermediate_size": 256}
    if tower == "groupvit_vision_model":
        wide = {**wide, "depths": [3, 2, 2], "drop_path_rate": 0.0}
        del wide["num_hidden_layers"]
    shape = IdeficsConfig(**{**MODEL, "vision_config": wide})
    encoder = IdeficsForVisionText2Text(shape).train().model.vision_model
    images = 24
    kept = kept_bytes(encoder, torch.randn(images, 3, 32, 32))
    sizes = {"rows": 1, "tokens": 1, "images": images, "checkpointing": False, "compute_bytes": 4}
    planned = idefics_activations(shape, **sizes, vision_trains=True) - LOSS_CHUNK
    one = idefics_activations(shape, **sizes, vision_trains=False) - LOSS_CHUNK
    depth = sum(depth for depth, _ in shape.vision_config.layer_tokens)
    assert 0.65 < (planned - one) / (kept * (depth - 1) / depth) < 1.35


def kept_bytes(module, pixels):
    """Bytes of the distinct storages that a forward pass saves for backward, parameters left out."""
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(pixels).last_hidden_state
    total = sum(size for size, _ in seen.values())
    del out
    return total


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_tower_training import TOWERS, gradients, module_and_batch
from interloom.train.config import TrainerConfig
from interloom.train.parallel.sharding import Sharder
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
for tower in TOWERS:
    for frozen in (False, True):
        module, batch = module_and_batch(Path({folder!r}), tower, model={{"freeze_vision_layers": frozen}})
        inputs = {{k: batch[k] for k in ("input_ids", "pixel_values", "image_attention_mask", "document_ids")}}
        def step():
            loss = module.losses(inputs, batch["labels"], torch.tensor(100.0), None, module.noise(0, 0))[0]
            loss.backward()
            return loss.item(), gradients(module)
        loss, plain = step()
        module.zero_grad()
        module.shard(Sharder.over_all_ranks(TrainerConfig()))
        shards = [n for n, p in module.named_parameters() if isinstance(p, DTensor) and "vision_model" in n]
        again, found = step()
        assert abs(loss - again) < 1e-5, (tower, loss, again)
        assert shards and plain.keys() == found.keys(), tower
        for name, grad in found.items():
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            torch.testing.assert_close(grad, plain[name], atol=1e-5, rtol=1e-4, msg=f"{{tower}} {{name}}")
        print(tower, frozen, len(shards))
dist.destroy_process_group()
"""


@pytest.mark.faults  # two ranks a tower: twenty seconds
def test_shards_compute_what_one_process_does(folder, tmp_path):
    """Two ranks with the same batch: the mean of their gradients is that of one."""
    code = SHARDED.format(tests=os.path.dirname(__file__), store=tmp_path / "store", folder=str(folder))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=280)[0].decode() for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(outputs)[-3000:]
    assert outputs[0].count("True") == len(TOWERS)
