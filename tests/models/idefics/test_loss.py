"""The loss against float64 arithmetic on materialised logits."""

import pytest
import torch
import torch.nn.functional as F
from interloom.models.idefics import loss as loss_module
from interloom.models.idefics.loss import language_model_loss


def reference(hidden, weight, labels, exclude=()):
    logits = hidden.double() @ weight.double().T
    lse = logits.logsumexp(-1)
    keep = torch.tensor([int(y) not in exclude for y in labels])
    return F.cross_entropy(logits, labels, reduction="sum"), (lse.square() * keep).sum()


@pytest.mark.parametrize("exclude", [(), (3, 4)])
def test_sums_and_gradients_in_float32(exclude):
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 6, (40,))
    ids = torch.tensor(exclude) if exclude else None
    sums = language_model_loss(hidden, weight, labels, ids)
    nll, z = reference(hidden, weight, labels, exclude)
    torch.testing.assert_close(sums.nll.double(), nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.z.double(), z, rtol=1e-5, atol=0)
    assert sums.rows == 40
    mine = torch.autograd.grad(sums.nll + 0.1 * sums.z, (hidden, weight))
    theirs = torch.autograd.grad(nll + 0.1 * z, (hidden, weight))
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_the_sum_alone():
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (40,))
    sums = language_model_loss(hidden, weight, labels, want_z=False)
    nll, _ = reference(hidden, weight, labels)
    torch.testing.assert_close(sums.nll.double(), nll, rtol=1e-6, atol=0)
    assert sums.z == 0
    mine = torch.autograd.grad(sums.nll / 3, (hidden, weight))
    theirs = torch.autograd.grad(nll / 3, (hidden, weight))
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_reduced_precision_sums_in_float32(mode, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 64 * 50)  # several chunks
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    hidden = torch.randn(300, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (300,))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        sums = language_model_loss(hidden, weight, labels)
    assert sums.nll.dtype == torch.float32
    logits = F.linear(
        hidden.bfloat16(), weight.bfloat16()
    ).double()  # the product is rounded, nothing after it
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(sums.nll.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.z.double(), logits.logsumexp(-1).square().sum(), rtol=1e-5, atol=0)
    mine = torch.autograd.grad(sums.nll, (hidden, weight))
    theirs = torch.autograd.grad(reference(hidden, weight, labels)[0], (hidden, weight))
    for ours, other in zip(mine, theirs, strict=True):
        assert (ours - other).float().norm() < 0.02 * other.float().norm()


def test_no_logits_are_made_for_the_loss(pair_of, inputs_of):
    from torch.utils._python_dispatch import TorchDispatchMode

    model = pair_of().ours

    class Watch(TorchDispatchMode):
        widest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.shape[-1] == 100:
                    Watch.widest = max(Watch.widest, tensor.shape[1])
            return out

    inputs = inputs_of()
    with Watch():
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
    assert Watch.widest == 0
    assert output.logits.shape == (2, 12, 100)  # on request
    model.zero_grad()


def test_z_loss_and_accumulation(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    labels = inputs["input_ids"]
    with torch.no_grad():
        plain = model(**inputs, labels=labels)
        with_z = model(**inputs, labels=labels, z_loss=1e-3)
        keep = inputs["attention_mask"][:, 1:].bool()
        lse = plain.logits[:, :-1][keep].double().logsumexp(-1)
        torch.testing.assert_close(
            (with_z.loss - plain.loss).double(), 1e-3 * lse.square().mean(), atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(with_z.z_loss, with_z.loss - plain.loss)
        parts = [
            model(
                **{k: v[i : i + 1] for k, v in inputs.items()},
                labels=labels[i : i + 1],
                z_loss=1e-3,
                num_items_in_batch=plain.token_count,
            ).loss
            for i in range(2)
        ]
    torch.testing.assert_close(sum(parts), with_z.loss)


def test_nothing_to_predict_is_a_loss_of_zero(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    model.zero_grad()
    output = model(**inputs, labels=torch.full((2, 12), -100), z_loss=1e-3)
    assert output.loss == 0
    assert output.token_count == 0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_frozen_encoder_keeps_no_graph(settings_of, inputs_of):
    from interloom.models import IdeficsConfig, IdeficsForVisionText2Text

    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(IdeficsConfig(**settings_of(freeze_vision_layers=True))).train()
    flags = []
    model.model.vision_model.register_forward_hook(lambda *_: flags.append(torch.is_grad_enabled()))
    inputs = inputs_of(batch=4)
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    assert flags == [False] * 3  # twelve images, four at a time
    assert model.model.perceiver_resampler.latents.grad.any()
