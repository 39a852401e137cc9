"""A ``.ckpt`` of a run with adapters is the model that the run exported."""

import pytest
import torch
from interloom.models.idefics.adapters import merge_saved_adapters
from interloom.train.checkpointing.load import load_pretrained, model_type
from interloom.train.cli import main
from safetensors import safe_open


def test_a_checkpoint_with_adapters_loads_as_the_exported_model(adapted_run):
    (path,) = (adapted_run / "checkpoints").glob("*.ckpt")
    names = torch.load(path, weights_only=True)["state_dict"]
    up = [value for name, value in names.items() if "lora_B" in name]
    assert up
    assert any(bool(value.any()) for value in up)
    loaded, processor = load_pretrained(path)
    exported, _ = load_pretrained(adapted_run)
    assert model_type(path) == model_type(adapted_run) == "idefics"
    assert processor.image_token_id == processor.tokenizer.require("<image>")
    weights = loaded.state_dict()
    assert weights.keys() == exported.state_dict().keys()
    for name, value in exported.state_dict().items():
        assert torch.equal(weights[name].to(value.dtype), value), name


def test_the_exported_model_has_one_dtype_and_writes(adapted_run, capsys):
    (file,) = (adapted_run / "model").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert (
        main(["generate", "--checkpoint", str(adapted_run), "--prompt", "this is a", "--max-new-tokens", "2"])
        == 0
    )
    assert capsys.readouterr().out.strip()


def test_adapters_without_their_scale_are_refused(adapted_run):
    (path,) = (adapted_run / "checkpoints").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): value for name, value in state.items()}
    with pytest.raises(ValueError, match="not their scale"):
        merge_saved_adapters(weights, None, "x.ckpt")
    broken = {
        name: value for name, value in weights.items() if "layers.0.self_attn.q_proj.lora_A" not in name
    }
    with pytest.raises(ValueError, match="lacks the adapter"):
        merge_saved_adapters(broken, 8.0, "x.ckpt")
