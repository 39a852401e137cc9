"""The average of the weights, against its definition in float64 from the weights after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig
from interloom.train.checkpointing.folder import checkpoints_newest_first
from interloom.train.checkpointing.load import load_pretrained
from interloom.train.cli import main
from interloom.train.objectives.groupvit.objective import GroupViTModule
from interloom.train.optim.averages import WeightAverage, copy_whole
from torch import nn

STEPS, DECAY = 8, 0.3
SKIPPED = 5  # the step whose loss is not finite


def arguments(world: Any, root: Path, *extra: str) -> list[str]:
    settings = ["name=average", f"runs_dir={root}", f"trainer.max_steps={STEPS}", f"optim.ema_decay={DECAY}"]
    return ["train", *world.overrides, *settings, "callbacks.checkpoint.every_steps=1", *extra]


def checkpoints(root: Path) -> list[Path]:
    """Oldest first."""
    kept = checkpoints_newest_first(root / "average" / "latest" / "checkpoints")
    return [path for _, path in reversed(kept)]


@pytest.fixture
def one_step_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GroupViTModule.backward_step

    def backward_step(self: Any, batch: Any, step: int) -> Any:
        metrics = whole(self, batch, step)
        return metrics if step != SKIPPED - 1 else {**metrics, "loss": metrics["loss"] * torch.nan}

    monkeypatch.setattr(GroupViTModule, "backward_step", backward_step)


@pytest.mark.usefixtures("one_step_not_finite")
def test_checkpoints_hold_the_average_of_the_weights_so_far(tiny_world: Any, tmp_path: Path) -> None:
    keep_all = (
        "callbacks.checkpoint.keep=99",
        "optim.lr=0.01",
        "model.config.vision_config.drop_path_rate=0.2",
    )
    # The weights before the first step: those of a run without steps that change any.
    assert (
        main(arguments(tiny_world, tmp_path / "still", *keep_all, "optim.lr=1e-30", "trainer.max_steps=1"))
        == 0
    )
    (first,) = (torch.load(path, weights_only=True) for path in checkpoints(tmp_path / "still"))
    assert main(arguments(tiny_world, tmp_path, *keep_all)) == 0
    states = [torch.load(path, weights_only=True) for path in checkpoints(tmp_path)]
    assert len(states) == STEPS
    trained = {name for name, _ in loaded_module_parameters(tiny_world, tmp_path)}
    buffers = {n for n in states[0]["state_dict"] if n.endswith(("running_mean", "running_var"))}
    assert set(states[0]["average"]["tensors"]) == trained | buffers

    for name in trained:
        wanted = first["state_dict"][name].double()
        updates = 0
        for step, state in enumerate(states, 1):
            if step != SKIPPED:
                keep = min(DECAY, (1 + updates) / (10 + updates))
                wanted = keep * wanted + (1 - keep) * state["state_dict"][name].double()
                updates += 1
            assert state["average"]["updates"] == updates
            found = state["average"]["tensors"][name].double()
            assert (found - wanted).abs().max() <= 1e-6 * (1 + wanted.abs().max()), (name, step)
    apart = [
        float((state["average"]["tensors"][name] - state["state_dict"][name]).abs().max())
        for state in states
        for name in trained
    ]
    assert max(apart) > 1e-3  # the average is something else than the weights


def loaded_module_parameters(world: Any, root: Path) -> list[tuple[str, torch.Tensor]]:
    """What the run trains, by the names of its checkpoints: the model and its second temperature."""
    model, _ = load_pretrained(root / "average" / "latest" / "model")
    extra = [("multi_label_logit_scale", torch.zeros(()))]
    return [*((f"model.{name}", parameter) for name, parameter in model.named_parameters()), *extra]


def test_the_average_is_what_a_run_exports_and_a_checkpoint_stands_for(
    tiny_world: Any, tmp_path: Path
) -> None:
    assert main(arguments(tiny_world, tmp_path)) == 0
    run = tmp_path / "average" / "latest"
    newest = checkpoints(tmp_path)[-1]
    state = torch.load(newest, weights_only=True)
    averages = {n.removeprefix("model."): v for n, v in state["average"]["tensors"].items()}
    weights = {n.removeprefix("model."): v for n, v in state["state_dict"].items()}
    assert main(["convert", str(newest), str(tmp_path / "averaged")]) == 0
    assert main(["convert", str(newest), str(tmp_path / "last"), "--no-average"]) == 0
    for source, wanted in ((run, averages), (newest, averages), (tmp_path / "averaged", averages)):
        found = load_pretrained(source)[0].state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in found if name in wanted)
    found = load_pretrained(tmp_path / "last")[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    assert main(["convert", str(run), str(tmp_path / "other"), "--no-average"]) == 2

    # A run that is done already exports the same once more.
    exported = (run / "model" / "model.safetensors").read_bytes()
    (run / "model" / "model.safetensors").unlink()
    assert main(arguments(tiny_world, tmp_path, "ckpt_path=last")) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == exported


def test_a_resumed_run_may_begin_an_average_or_leave_it_and_says_so(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = "optim.ema_decay=null"
    assert main(arguments(tiny_world, tmp_path, "trainer.max_steps=2", without)) == 0
    before = torch.load(checkpoints(tmp_path)[-1], weights_only=True)
    assert "average" not in before
    assert main(arguments(tiny_world, tmp_path, "trainer.max_steps=3", "ckpt_path=last")) == 0
    assert "begins at step 2" in capsys.readouterr().err
    after = torch.load(checkpoints(tmp_path)[-1], weights_only=True)
    assert after["average"]["updates"] == 1
    name = "model.logit_scale"
    wanted = 0.1 * before["state_dict"][name].double() + 0.9 * after["state_dict"][name].double()
    assert float(after["average"]["tensors"][name]) == pytest.approx(float(wanted), rel=1e-6)
    assert main(arguments(tiny_world, tmp_path, "trainer.max_steps=4", "ckpt_path=last", without)) == 0
    assert "averaged weights are left behind" in capsys.readouterr().err
    assert "average" not in torch.load(checkpoints(tmp_path)[-1], weights_only=True)


@pytest.mark.parametrize("decay", ["0", "1", "-0.5", "1.5"])
def test_an_impossible_decay_is_refused(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], decay: str
) -> None:
    assert main(arguments(tiny_world, tmp_path, f"optim.ema_decay={decay}")) == 2
    assert "must lie between 0 and 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_frozen_weight_has_none_and_a_tied_one_has_one_under_both_names() -> None:
    model = IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=32, additional_vocab_size=0, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, cross_layer_interval=1, tie_word_embeddings=True, use_resampler=False,
            freeze_text_layers=False,
            vision_config=IdeficsVisionConfig(
                embed_dim=16, image_size=16, patch_size=8, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2,
            ),
        )
    )  # fmt: skip
    model.model.vision_model.requires_grad_(False)
    average = WeightAverage(0.9)
    average.begin(model, copy_whole)
    assert not [name for name in average.tensors if "vision_model" in name]
    assert average.tensors["lm_head.weight"] is average.tensors["model.embed_tokens.weight"]
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    before = average.tensors["lm_head.weight"].clone()
    average.update()
    assert torch.allclose(average.tensors["lm_head.weight"], before + 0.9)


def test_the_average_of_another_model_is_refused() -> None:
    average = WeightAverage(0.9)
    average.begin(nn.Linear(2, 3), copy_whole)
    with pytest.raises(ValueError, match=r"averages other weights .*bias, weight"):
        WeightAverage(0.9).resume(nn.Linear(2, 4), average.state())
