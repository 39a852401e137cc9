"""Where every random number of a run comes from.

A run's randomness (gumbel noise, DropPath, dropout, prompt draws, augmentation, shuffling) is a function of
(run seed, optimiser step, global sample index, site), never of rank, worker or micro-batch. Runs are then equal
on any number of ranks, and a resumed run needs no generator state.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from ...models.noise import Noise, mix_seed


def step_noise(seed: int, step: int, row_offset: int, device: torch.device | str = "cpu") -> Noise:
    """The noise of optimiser step ``step`` for samples ``row_offset``, ``row_offset + 1``, … of the run.

    The seed is a tensor, so that a compiled model does not specialise on the number.
    """
    return Noise(torch.tensor(mix_seed(seed, step), dtype=torch.int64, device=device), row_offset)


def sample_generator(seed: int, step: int, position: int, site: str) -> np.random.Generator:
    """A generator of its own for one use (``site``) of one sample in one optimiser step."""
    return np.random.Generator(np.random.Philox(mix_seed(seed, step, position, zlib.crc32(site.encode()))))


def initialisation_seed(seed: int) -> int:
    """The seed of PyTorch's generator while a model's weights are drawn; the same on every rank."""
    return mix_seed(seed, zlib.crc32(b"initialisation"))
