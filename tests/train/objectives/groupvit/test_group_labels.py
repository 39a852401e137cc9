"""Nouns against single groups: against loops in float64, and over ranks as on one."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from interloom.train.objectives.groupvit.group_labels import (
    group_label_loss,
    image_noun_identities,
    noun_identities,
    positive_pairs,
)
from interloom.train.objectives.groupvit.prompts import draw_noun_prompts, draw_prompts
from interloom.train.parallel.ranks import gather_rows

NOUNS = [["cat", "dog"], ["cat"], [], ["boat", "sea", "dog"]]
PROMPTS = ["dog", "cat", "cat", "tree", "sea"]


def inputs(images=4, groups=3, prompts=5, width=6):
    generator = torch.Generator().manual_seed(0)
    group = torch.randn(images, groups, width, generator=generator, dtype=torch.float64)
    prompt = torch.randn(prompts, width, generator=generator, dtype=torch.float64)
    return F.normalize(group, dim=-1).requires_grad_(), F.normalize(prompt, dim=-1).requires_grad_()


def test_pairs_are_positive_where_the_noun_is_in_the_caption():
    found = positive_pairs(noun_identities(PROMPTS), image_noun_identities(NOUNS))
    assert found.tolist() == [[prompt in own for prompt in PROMPTS] for own in NOUNS]
    assert noun_identities(PROMPTS).min() > 0


def test_loss_against_a_loop():
    groups, prompts = inputs()
    positive = positive_pairs(noun_identities(PROMPTS), image_noun_identities(NOUNS))
    scale, bias = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    loss = group_label_loss(groups, prompts, positive, scale, bias)
    total = 0.0
    for own, nouns in zip(groups.tolist(), NOUNS, strict=True):
        for prompt, noun in zip(prompts.tolist(), PROMPTS, strict=True):
            scores = [7.0 * sum(a * b for a, b in zip(group, prompt, strict=True)) for group in own]
            logit = math.log(sum(math.exp(score) for score in scores) / len(scores)) - 2.0
            sign = 1.0 if noun in nouns else -1.0
            total += math.log1p(math.exp(-sign * logit))
    assert loss.item() == pytest.approx(total / int(positive.sum()), rel=1e-12)


def test_a_batch_without_nouns_has_a_finite_loss():
    groups, prompts = inputs(images=2, prompts=3)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = group_label_loss(groups, prompts, nothing, torch.tensor(5.0), torch.tensor(-5.0))
    loss.backward()
    assert loss.isfinite()
    assert groups.grad is not None
    assert groups.grad.isfinite().all()


def test_prompts_know_their_nouns():
    arguments = ("a cat and a dog", ["cat", "dog"], 3)
    drawn = draw_noun_prompts(*arguments, seed=1, step=2, position=3)
    assert draw_prompts(*arguments, seed=1, step=2, position=3) == [prompt for _, prompt in drawn]
    assert {noun for noun, _ in drawn} == {"cat", "dog", "a cat and a dog"}
    assert all(noun in prompt for noun, prompt in drawn)


def share(rank, world_size, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    groups, prompts = inputs(prompts=4)
    nouns = [["cat"], ["cat", "dog"], ["dog"], ["tree", "cat"]]
    mine = slice(rank * 2, rank * 2 + 2)
    about = gather_rows(noun_identities(["cat", "dog", "tree", "cat"][mine]))
    positive = positive_pairs(about, image_noun_identities(nouns[mine]))
    everything = gather_rows(prompts[mine])
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-2.0)
    loss = group_label_loss(groups[mine], everything, positive, scale, bias)
    loss.backward()
    result = (loss.detach(), groups.grad[mine], prompts.grad[mine], scale.grad)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(share, (2, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    groups, prompts = inputs(prompts=4)
    positive = positive_pairs(
        noun_identities(["cat", "dog", "tree", "cat"]),
        image_noun_identities([["cat"], ["cat", "dog"], ["dog"], ["tree", "cat"]]),
    )
    scale = torch.tensor(7.0, requires_grad=True)
    loss = group_label_loss(groups, prompts, positive, scale, torch.tensor(-2.0))
    loss.backward()
    # Each rank leaves twice the derivative at its rows; gradients are averaged over ranks later.
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, groups.grad)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]) / 2, prompts.grad)
    torch.testing.assert_close(sum(part[3] for part in parts) / 2, scale.grad)
