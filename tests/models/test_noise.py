"""The counter-based noise: statistics, and independence of how the work is split."""

import pytest
import torch
from interloom.models.noise import Noise, mix_seed


def test_uniform_has_the_moments_and_no_correlations():
    values = Noise(mix_seed(1, 2)).uniform("site", 4000, 50)
    assert values.shape == (4000, 50)
    assert values.dtype == torch.float32
    assert 0 <= values.min() < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=3e-3)
    assert values.var().item() == pytest.approx(1 / 12, rel=2e-2)
    columns = torch.corrcoef(values.T) - torch.eye(50)
    rows = torch.corrcoef(values[:, :].reshape(50, -1)) - torch.eye(50)
    assert columns.abs().max() < 0.08
    assert rows.abs().max() < 0.08


def test_rows_depend_on_their_global_index_alone():
    whole = Noise(5, 100).uniform("a", 8, 3, 2)
    assert torch.equal(Noise(5, 104).uniform("a", 4, 3, 2), whole[4:])
    assert torch.equal(Noise(torch.tensor(5), 100).uniform("a", 8, 3, 2), whole)
    for other in (Noise(6, 100).uniform("a", 8, 3, 2), Noise(5, 100).uniform("b", 8, 3, 2)):
        assert not torch.equal(other, whole)


def test_parts_of_samples_are_themselves_in_any_batch():
    """Image n of sample i has the same numbers whatever batch, and whatever number of images, it comes with."""
    four = Noise(5, 100)
    rows = four.parts(torch.arange(4 * 3), 3)  # 4 samples of 3 images
    assert len(rows.unique()) == 12
    whole = four.uniform("a", rows, 7).view(4, 3, 7)
    two = Noise(5, 102)
    part = two.uniform("a", two.parts(torch.arange(2 * 2), 2), 7).view(2, 2, 7)  # the last two, 2 images each
    assert torch.equal(part, whole[2:, :2])
    chosen = four.parts(torch.tensor([1, 5, 11]), 3)
    assert torch.equal(Noise(5, rows=chosen).uniform("a", 3, 7), whole.flatten(0, 1)[[1, 5, 11]])


def test_sites_and_seeds():
    noise = Noise(mix_seed(7, 8))
    seeds = {noise.site(name) for name in ("a", "b", 0, 1, "vision.layer1", "vision.layer2")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert int(Noise(torch.tensor(noise.seed)).site("a")) == noise.site("a")
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(0) != mix_seed(0, 0)


def test_a_drawn_seed_follows_torchs_generator():
    torch.manual_seed(3)
    first = Noise.draw()
    torch.manual_seed(3)
    assert Noise.draw() == first
    assert Noise.draw() != first
