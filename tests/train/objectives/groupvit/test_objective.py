"""GroupViT's step: large batches in small pieces, and the objective against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from interloom.train.commands.schemas import register_schemas
from interloom.train.config import typed
from interloom.train.objectives.groupvit.build import build_loader, build_module
from interloom.train.objectives.groupvit.objective import GroupViTModule, text_identities


def make_module(tiny_world: Any, *extra: str) -> tuple[GroupViTModule, dict[str, Any]]:
    """A module in float64 and its batch of step 0."""
    register_schemas()
    with initialize_config_module("interloom.conf", version_base="1.3"):
        config = compose("train", overrides=[*tiny_world.overrides, *extra])
    settings = typed(config)
    loader = build_loader(settings, rank=0, world_size=1)
    module = build_module(settings, fingerprint={}).train().double()
    # Outside a trainer there is no scaling of the loss to ask it for.
    module.manual_backward = torch.Tensor.backward  # type: ignore[method-assign]
    batch = module.transform(next(iter(loader)))
    batch["pixel_values"] = batch["pixel_values"].double()
    return module, batch


def gradients(module: GroupViTModule, batch: dict[str, Any], step: int = 5) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module.backward_step(batch, step)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize(("hard", "objective"), [(True, "image"), (False, "image"), (True, "groups")])
def test_small_pieces_give_the_gradient_of_the_big_batch(
    tiny_world: Any, micro_batch: int, hard: bool, objective: str
) -> None:
    extra = [
        f"model.multi_label_objective={objective}",
        f"model.config.vision_config.assign_hard={hard}",
        "model.config.vision_config.drop_path_rate=0.3",
        "model.config.text_config.dropout=0.0",
    ]
    whole, batch = make_module(tiny_world, *extra)
    pieces, _ = make_module(tiny_world, *extra, f"trainer.micro_batch_size={micro_batch}")
    expected, found = gradients(whole, batch), gradients(pieces, batch)
    assert expected.keys() == found.keys() == {name for name, _ in whole.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(pieces.get_buffer(name), buffer, msg=name)


def test_naive_accumulation_would_not(tiny_world: Any) -> None:
    module, batch = make_module(tiny_world)
    expected = gradients(module, batch)
    module.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        part = {name: value[rows] for name, value in batch.items()}
        module.backward_step(part, 5)
    name = "model.visual_projection.0.weight"
    naive = dict(module.named_parameters())[name].grad / 2
    assert not torch.allclose(naive, expected[name], rtol=1e-2, atol=1e-6)


def test_noise_changes_with_the_step_and_not_between_calls(tiny_world: Any) -> None:
    module, batch = make_module(tiny_world, "model.multi_label=0")
    state = torch.get_rng_state()
    first, again, later = (gradients(module, batch, step) for step in (1, 1, 2))
    name = "model.vision_model.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], later[name])
    # PyTorch's generator, which no checkpoint holds, has no part in it.
    assert torch.equal(torch.get_rng_state(), state)


def test_the_objective_is_the_papers(tiny_world: Any) -> None:
    module, _ = make_module(tiny_world, "model.multi_label_weight=0.5")
    module.eval()  # running statistics: each row stands for itself below
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(6, 3, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        module.model.logit_scale.fill_(math.log(9.0))
        module.multi_label_logit_scale.fill_(math.log(500.0))  # above the clamp at 100
        loss, metrics = module.objective(image, text)
        v = F.normalize(module.model.visual_projection(image), dim=-1)
        t = F.normalize(module.model.text_projection(text.flatten(0, 1)), dim=-1).view(6, 3, -1)
    logits = 9.0 * v @ t[:, 0].T
    own = torch.arange(6)
    caption_loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    prompts = t[:, 1:].reshape(12, -1)
    to_text = (100.0 * v @ prompts.T).log_softmax(-1)
    image_to_text = -torch.stack([to_text[i, 2 * i : 2 * i + 2].mean() for i in range(6)]).mean()
    text_to_image = F.cross_entropy(100.0 * prompts @ v.T, own.repeat_interleave(2))
    label_loss = (image_to_text + text_to_image) / 2
    torch.testing.assert_close(metrics["contrastive_loss"], caption_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["multi_label_loss"], label_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, caption_loss + 0.5 * label_loss, rtol=1e-6, atol=1e-6)


def test_equal_texts_have_equal_identities() -> None:
    a, b, c = text_identities(["red square", "blue square", "red square"]).tolist()
    assert a == c != b


def test_a_tokenizer_of_another_size_is_refused(tiny_world: Any) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=5 .*set both in model\.config\.text_config"):
        make_module(tiny_world, "model.config.text_config.vocab_size=5")


def test_weights_depend_on_the_seed_alone(tiny_world: Any) -> None:
    torch.manual_seed(1)
    first, _ = make_module(tiny_world)
    torch.manual_seed(2)
    second, _ = make_module(tiny_world)
    other, _ = make_module(tiny_world, "seed=1")
    name = "model.visual_projection.0.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
