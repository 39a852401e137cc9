"""The memory model against tensors that autograd really keeps, and against known parameter counts."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig
from interloom.train.objectives.idefics.config import IdeficsTrainConfig
from interloom.train.objectives.idefics.cost import LOSS_CHUNK, idefics_activations, idefics_work
from interloom.train.objectives.idefics.sharding import shard_idefics
from interloom.train.optim.averages import WeightAverage, copy_whole
from interloom.train.parallel.sharding import Sharder
from interloom.train.planning.communication import (
    EFFICIENCY,
    LINK_EFFICIENCY,
    Hardware,
    StepWork,
    plan_communication,
)
from interloom.train.planning.memory import measure, plan_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor


def kept_bytes(model, **inputs):
    """Bytes of the distinct storages that a forward pass saves for backward, parameters left out."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(size for size, _ in seen.values())
    del loss
    return total


GROUPED = {
    "num_key_value_heads": 1,
    "head_dim": 48,
    "text_qk_norms": True,
    "attention_bias": True,
    "sliding_window": 64,
}


@pytest.mark.parametrize("relative", [{}, GROUPED], ids=["llama", "relative"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing, relative):
    config = IdeficsConfig(
        vocab_size=64, additional_vocab_size=2, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
        num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=True, freeze_text_layers=False,
        freeze_vision_layers=True, freeze_lm_head=False,
        vision_config=IdeficsVisionConfig(
            embed_dim=64, image_size=32, patch_size=8, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2,
        ), **relative,
    )  # fmt: skip
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows, tokens, images = 3, 256, 4
    ids = torch.randint(0, 64, (rows, tokens))
    mask = torch.zeros(rows, tokens, images, dtype=torch.bool)
    for image in range(images):
        mask[:, 64 * image : 64 * (image + 1), image] = True
    kept = kept_bytes(
        model,
        input_ids=ids,
        labels=ids,
        document_ids=torch.zeros_like(ids),
        pixel_values=torch.randn(rows, images, 3, 32, 32),
        image_attention_mask=mask,
    )
    planned = idefics_activations(
        config, rows=rows, tokens=tokens, images=images, checkpointing=checkpointing, compute_bytes=4
    )
    planned -= LOSS_CHUNK  # sized for real vocabularies
    if checkpointing:  # the forward pass keeps the streams; the inside of a block comes when it is recomputed
        streams = (6 + 3) * 4 * rows * tokens * 128
        assert 0.9 * streams < kept < 1.5 * streams
        assert kept < planned
    else:
        assert 0.75 < planned / kept < 1.35


def test_counts_are_exact_and_sharded():
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsTrainConfig().model_config())
    size = measure(model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    one = plan_memory(size, 0.0, gpus=1, sharded=True)
    eight = plan_memory(size, 0.0, gpus=8, sharded=True)
    whole = plan_memory(size, 0.0, gpus=8, sharded=False)
    assert one.weights == whole.weights == 4 * size.parameters
    assert eight.weights * 8 == one.weights
    assert eight.optimizer * 8 == 8 * size.trained
    assert eight.gathered > 0 == whole.gathered


@pytest.mark.parametrize(
    ("experiment", "parameters"), [("idefics_9b_lora", "8.98 B"), ("groupvit_gcc_yfcc", "0.06 B")]
)
def test_plan_only_prints_the_memory_of_a_recipe(experiment, parameters, tmp_path):
    code = "import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", f"experiment={experiment}", "plan_only=true"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert parameters in done.stdout
    assert "GiB each" in done.stdout
    assert "sends" in done.stdout
    assert not list(tmp_path.iterdir())


def test_bytes_sent_are_those_of_rings():
    work = StepWork(
        flops=1e15, trained=1000, gathered=3000, passes=2, extra_forwards=1, features=0, images=64
    )
    ddp = plan_communication(work, gpus=4, sharded=False, compute_bytes=2)
    assert ddp.sent == 2 * 3 / 4 * 1000 * 4
    fsdp = plan_communication(work, gpus=4, sharded=True, compute_bytes=2)
    assert fsdp.sent == 3 / 4 * ((2 * 2 + 1) * 3000 * 2 + 2 * 1000 * 4)
    assert plan_communication(work, gpus=1, sharded=False, compute_bytes=2).share == 0.0
    slow = Hardware("x", flops=1e12, nvlink=1e9, network=1e6)
    near, far = (
        plan_communication(work, gpus=g, sharded=False, compute_bytes=2, hardware=slow) for g in (8, 16)
    )
    assert near.seconds == near.sent / (1e9 * LINK_EFFICIENCY)
    assert far.seconds == far.sent / (1e6 * LINK_EFFICIENCY)
    assert far.compute_seconds == 1e15 / 16 / (1e12 * EFFICIENCY)


@pytest.mark.parametrize("relative", [{}, GROUPED | {"sliding_window": None}], ids=["llama", "relative"])
def test_arithmetic_of_a_step_is_what_pytorch_counts(relative):
    """Against the counter of PyTorch, which sees every matrix product of a forward and backward pass."""
    from types import SimpleNamespace

    from torch.utils.flop_counter import FlopCounterMode

    config = IdeficsConfig(
        vocab_size=512, additional_vocab_size=2, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, freeze_text_layers=False, freeze_vision_layers=False,
        freeze_lm_head=False, use_resampler=False,
        vision_config=IdeficsVisionConfig(
            embed_dim=64, image_size=32, patch_size=4, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2,
        ), **relative,
    )  # fmt: skip
    model = IdeficsForVisionText2Text(config).train()
    rows, tokens, images = 2, 256, 3
    ids = torch.randint(0, 512, (rows, tokens))
    mask = torch.zeros(rows, tokens, images, dtype=torch.bool)
    mask[:, :, 0] = True
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids,
            labels=ids,
            document_ids=torch.zeros_like(ids),
            pixel_values=torch.randn(rows, images, 3, 32, 32),
            image_attention_mask=mask,
        ).loss.backward()
    data = SimpleNamespace(batch_size=rows, max_tokens=tokens, max_images=images)
    training = SimpleNamespace(gradient_checkpointing=False)
    planned = idefics_work(model, SimpleNamespace(data=data, model=training), passes=1).flops
    assert 0.75 < planned / counter.get_total_flops() < 1.3


def test_shards_take_the_memory_that_is_planned(tmp_path):
    """Weights, gradients, moments and averages that two ranks really hold, against the plan."""

    def work(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        torch.manual_seed(0)
        model = IdeficsForVisionText2Text(
            IdeficsConfig(
                vocab_size=64, additional_vocab_size=2, hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                num_attention_heads=4, cross_layer_interval=2, freeze_text_layers=False, freeze_vision_layers=False,
                freeze_lm_head=False, use_resampler=False,
                vision_config=IdeficsVisionConfig(
                    embed_dim=32, image_size=32, patch_size=8, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2,
                ),
            )
        ).train()  # fmt: skip
        size = measure(model)
        sharder = Sharder(init_device_mesh("cpu", (2,)), "32-true")
        shard_idefics(model, sharder)
        sharder.root(model, [])
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.randint(0, 64, (2, 32))
        model(input_ids=ids, labels=ids, document_ids=torch.zeros_like(ids),
              pixel_values=torch.randn(2, 1, 3, 32, 32),
              image_attention_mask=torch.ones(2, 32, 1, dtype=torch.bool)).loss.backward()  # fmt: skip
        optimizer.step()
        average = WeightAverage(0.9)
        average.begin(model, copy_whole)
        average.update()

        def held(tensors):
            local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())

        parameters = list(model.parameters())
        moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = average.tensors.values()
        found = [held(parameters), held(gradients), held(moments), held([*moments, *averages])]
        plan, averaged = (
            plan_memory(size, 0.0, gpus=2, sharded=True, compute_bytes=4, averaged=a) for a in (False, True)
        )
        planned = [plan.weights, plan.gradients, plan.optimizer, averaged.optimizer]
        (tmp_path / f"{rank}.json").write_text(json.dumps([found, planned]))
        dist.destroy_process_group()

    def child(rank):
        try:
            work(rank)
        finally:
            os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for rank in range(2):
        found, planned = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(planned, rel=0.06)
