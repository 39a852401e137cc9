"""The memory model against tensors that autograd really keeps, and against known parameter counts."""

import subprocess
import sys

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig
from interloom.train.idefics_config import IdeficsTrainConfig
from interloom.train.memory_plan import LOSS_CHUNK, idefics_activations, measure, plan_memory


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing):
    config = IdeficsConfig(
        vocab_size=64, additional_vocab_size=2, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
        num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=True, freeze_text_layers=False,
        freeze_vision_layers=True, freeze_lm_head=False,
        vision_config=IdeficsVisionConfig(
            embed_dim=64, image_size=32, patch_size=8, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2,
        ),
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
    assert not list(tmp_path.iterdir())
