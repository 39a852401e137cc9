"""A source of documents that do not exist: OBELICS's size and lengths, without its bytes.

Shows what a plan costs at full scale before anybody has downloaded anything. Lengths follow the published
figures (Laurençon et al. 2023, section 4: 141 million documents, median 677 and mean 816 tokens, 2.5 images a
document on average): log-normal tokens, geometric images, images anywhere in the text. A shard's lengths are
a function of its number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..order import mix, mix_array
from .order import DocumentsPlan
from .packing import Lengths

MEDIAN_TOKENS, MEAN_TOKENS, MEAN_IMAGES = 677, 816, 2.5
_SIGMA = float(np.sqrt(2 * np.log(MEAN_TOKENS / MEDIAN_TOKENS)))


class SimulatedDocuments:
    """A :class:`~.plan.DocumentSource` of ``documents`` invented documents.

    Args:
        documents: how many.
        documents_per_shard: as a conversion would write them.
        seed: other documents.
    """

    def __init__(self, documents: int, documents_per_shard: int = 4096, seed: int = 0) -> None:
        if documents < 1:
            raise ValueError(f"--simulate {documents} given, expected at least one document")
        shards = -(-documents // documents_per_shard)
        self.seed = seed
        self.samples = np.full(shards, documents_per_shard, np.int64)
        self.samples[-1] = documents - documents_per_shard * (shards - 1)
        # A shard's totals are what its index header would say. Drawing every document to add them up would
        # take minutes, so a shard is a rotation of one of a few drawn in full: same totals, another order.
        self._models = [self._draw(model, int(self.samples[0])) for model in range(min(64, shards))]
        totals = [(int(m.tokens.sum()), len(m.image_starts)) for m in self._models]
        which = np.arange(shards) % len(self._models)
        self.tokens = np.array([t for t, _ in totals], np.int64)[which]
        self.images = np.array([i for _, i in totals], np.int64)[which]
        last = self.lengths(shards - 1)
        self.tokens[-1], self.images[-1] = last.tokens.sum(), len(last.image_starts)

    def _draw(self, model: int, count: int) -> Lengths:
        rng = np.random.default_rng(mix(self.seed, model))
        tokens = np.exp(rng.normal(np.log(MEDIAN_TOKENS), _SIGMA, count))
        tokens = np.clip(tokens, 16, 8192).astype(np.int64)
        images = np.minimum(np.minimum(rng.geometric(1 / MEAN_IMAGES, count), 30), tokens // 4)
        starts = [
            np.sort(rng.choice((int(t) - 3) // 3, int(k), replace=False)) * 3 + 1
            for t, k in zip(tokens, images, strict=True)
        ]
        return Lengths(tokens, np.concatenate(starts), np.concatenate([[0], np.cumsum(images)]))

    def lengths(self, shard: int) -> Lengths:
        """Lengths of one shard's documents."""
        model = self._models[shard % len(self._models)]
        count = int(self.samples[shard])
        order = np.roll(np.arange(len(model.tokens)), int(mix_array(7, np.array([shard]))[0] % 4096))[:count]
        counts = np.diff(model.offsets)[order]
        starts = [model.image_starts[model.offsets[d] : model.offsets[d + 1]] for d in order]
        return Lengths(model.tokens[order], np.concatenate(starts), np.concatenate([[0], np.cumsum(counts)]))

    def digests(self) -> Mapping[str, str]:
        """One line: the simulation is its parameters."""
        return {"simulated": f"{int(self.samples.sum())}:{self.seed}"}


def measure(
    documents: int, *, max_tokens: int, max_images: int, seeks: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Cost of a plan over ``documents`` invented documents.

    Returns:
        Seconds to make them up (``invent_s``: index headers of real shards are read instead) and to start
        (``start_s``), to seek random positions (``seek_s`` median and ``seek_max_s``), the peak resident
        memory of the process (``peak_gb``), sequences an epoch and the fill of the windows visited.
    """
    import resource

    before = time.perf_counter()
    source = SimulatedDocuments(documents, seed=seed)
    invented = time.perf_counter()
    plan = DocumentsPlan({"simulated": source}, max_tokens=max_tokens, max_images=max_images, seed=seed)
    plan.sequence(plan.locate(np.array([0]))[0])
    started = time.perf_counter()
    positions = mix_array(seed, np.arange(seeks)) % np.uint64(len(plan))
    times, tokens, sequences = [], 0, 0
    for position in positions.astype(np.int64):
        begin = time.perf_counter()
        row = plan.locate(np.array([position]))[0]
        plan.sequence(row)
        times.append(time.perf_counter() - begin)
        packed = plan.streams[0].window(int(row[1]), int(row[2])).sequences
        tokens += sum(piece.length for pieces in packed for piece in pieces)
        sequences += len(packed)
    return {
        "documents": documents,
        "sequences": len(plan),
        "invent_s": invented - before,
        "start_s": started - invented,
        "seek_s": float(np.median(times)),
        "seek_max_s": max(times),
        "fill": tokens / (sequences * max_tokens),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
