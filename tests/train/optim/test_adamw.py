"""Schedules against PyTorch's schedulers, parameter groups against a walk by hand."""

import pytest
import torch
from interloom.train.config import OptimConfig
from interloom.train.optim.adamw import adamw, learning_rate, parameter_groups, set_learning_rate
from torch import nn


def test_warm_up_and_cosine_follow_torchs_schedulers() -> None:
    config = OptimConfig(lr=0.4, warmup_steps=5, warmup_lr=0.1, final_lr=0.04)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.04),
        ],
        milestones=[5],
    )
    for step in range(20):
        assert learning_rate(config, step, 20, 128) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )
        optimizer.step()
        schedule.step()


def test_rates_scale_with_the_global_batch() -> None:
    config = OptimConfig(lr=1.6e-3, lr_batch_size=4096, warmup_steps=2, warmup_lr=4e-6, final_lr=4e-5)
    for step in (0, 1, 2, 7, 10):
        assert learning_rate(config, step, 10, 1024) == pytest.approx(
            learning_rate(config, step, 10, 4096) / 4
        )
    assert learning_rate(config, 2, 10, 4096) == pytest.approx(1.6e-3)
    assert learning_rate(config, 10, 10, 4096) == pytest.approx(4e-5)


def test_the_schedule_does_not_depend_on_where_a_run_was_resumed() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=3, schedule="linear", final_lr=0.0)
    assert [learning_rate(config, step, 7, 1) for step in range(7)] == pytest.approx(
        [0.0, 1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    )


def test_no_decay_on_vectors_and_each_shared_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    model.append(nn.Linear(4, 4, bias=False))
    model[3].weight = model[2].weight
    model[0].weight.requires_grad_(True)
    frozen = nn.Linear(2, 2)
    frozen.requires_grad_(False)
    decayed, plain = parameter_groups([model, frozen], 0.05)
    assert [p.shape for p in decayed["params"]] == [(4, 3), (4, 4)]
    assert {tuple(p.shape) for p in plain["params"]} == {(4,)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_a_step_equals_adamw_written_out() -> None:
    config = OptimConfig(lr=0.1, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.2)
    layer = nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().double().clone()
    gradient = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    optimizer = adamw(parameter_groups([layer], config.weight_decay), config)
    set_learning_rate(optimizer, 0.05)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    g = gradient.double()
    # After the first step both bias-corrected moments are the gradient and its square.
    expected = before * (1 - 0.05 * 0.2) - 0.05 * g / (g.abs() + 1e-6)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"schedule": "cosin"}, {"lr": 0.0}, {"warmup_steps": -1}])
def test_impossible_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**wrong)
