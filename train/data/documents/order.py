"""The order of packed sequences as a pure function of (seed, indexes).

A *position* is one sequence of ``max_tokens``. From position to tokens, every step is arithmetic on index
headers or a keyed shuffle, so any position is found in milliseconds in 141 million documents::

    position ── mixture ──> source, its n-th sequence ── prefix sums ──> window ── pack_window ──> pieces
                 quotas in blocks of 10,000,             window sizes are formulas
                 shuffled within the block               of the shards' totals

A *window* is a run of whole shards in the epoch's shuffled order, of about ``window_documents``: documents
that lie together are read together. Its sequences come in shuffled order, since packing sorts them by
length: without that last shuffle the ratio of images to text drifts within a window, which has been seen to
make losses jump when a run resumes in the middle of one.

Each sequence holds documents of one source; a mixture picks sources so that their shares of *tokens* are the
given weights (a source's tokens in a sequence, on average, are known from its index). Sources repeat when
exhausted, each at its own pace and in a new order.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..order import Permutation, mix
from ..shards.index import ShardIndex
from ..shards.reader import ShardSet
from .packing import Answers, Lengths, Piece, num_sequences, pack_window
from .truncation import join_lengths, kept_tokens, pack_dialogues

# The published IDEFICS mixture, shares of tokens (model card of idefics-80b).
IDEFICS_MIXTURE = {"obelics": 73.85, "wikipedia": 6.15, "laion": 17.18, "pmd": 2.82}
_BLOCK = 10_000
# Least of what a stream keeps at hand.
_WINDOWS_KEPT, _EPOCHS_KEPT = 8, 2


class DocumentSource(Protocol):
    """What the plan needs of a set of shards; :class:`ShardDocuments` and the simulation have it."""

    samples: np.ndarray
    """int64 [S], documents of each shard."""
    tokens: np.ndarray
    """int64 [S], tokens of each shard."""
    images: np.ndarray
    """int64 [S], images of each shard."""

    def lengths(self, shard: int) -> Lengths:
        """Lengths of one shard's documents."""
        ...

    def digests(self) -> Mapping[str, str]:
        """Name of each shard to a digest of its content."""
        ...


class ShardDocuments:
    """A :class:`DocumentSource` over indexed shards of kind ``documents``."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.samples = np.array([shard.samples for shard in shards.shards], np.int64)
        self.tokens = np.array([shard.tokens for shard in shards.shards], np.int64)
        self.images = np.array([shard.images for shard in shards.shards], np.int64)
        self.dialogues = np.array([shard.dialogues for shard in shards.shards], np.int64)

    def lengths(self, shard: int) -> Lengths:
        """Lengths of one shard's documents, from its index alone."""
        index = self.shards.index(shard)
        images = index.column("images").astype(np.int64)
        return Lengths(
            index.column("tokens").astype(np.int64),
            index.column("image_start").astype(np.int64),
            np.concatenate([[0], np.cumsum(images)]),
            _answers(index) if self.dialogues[shard] else None,
        )

    def digests(self) -> Mapping[str, str]:
        """Digest of every shard and index."""
        return self.shards.digests()


def _answers(index: ShardIndex) -> Answers:
    """Where the answers of a shard stand.

    Raises:
        ValueError: the index contradicts itself.
    """
    counts = index.column("answers").astype(np.int64)
    starts, ends = (index.column(name).astype(np.int64) for name in ("answer_start", "answer_end"))
    if not len(starts) == len(ends) == counts.sum():
        raise ValueError(
            f"{index.path} is damaged: {len(starts)} answers begin, {len(ends)} end and {counts.sum()} are counted; "
            "make the shard again"
        )
    return Answers(starts, ends, np.concatenate([[0], np.cumsum(counts)]))


def dialogues_of(source: DocumentSource) -> np.ndarray:
    """Dialogues of each shard, int64 [S]; sources that know of none have none."""
    return getattr(source, "dialogues", np.zeros(len(source.samples), np.int64))


class _Joined:
    """Several sources as one, for one pass over all of them."""

    def __init__(self, sources: Sequence[DocumentSource]) -> None:
        self.parts = list(sources)
        self.samples = np.concatenate([part.samples for part in sources])
        self.tokens = np.concatenate([part.tokens for part in sources])
        self.images = np.concatenate([part.images for part in sources])
        self.dialogues = np.concatenate([dialogues_of(part) for part in sources])
        self.firsts = np.concatenate([[0], np.cumsum([len(part.samples) for part in sources])])

    def part(self, shard: int) -> tuple[int, int]:
        """(source, shard in it)."""
        source = int(np.searchsorted(self.firsts, shard, side="right")) - 1
        return source, shard - int(self.firsts[source])

    def lengths(self, shard: int) -> Lengths:
        source, number = self.part(shard)
        return self.parts[source].lengths(number)

    def digests(self) -> Mapping[str, str]:
        return {name: digest for part in self.parts for name, digest in part.digests().items()}


@dataclass(frozen=True)
class _Epoch:
    """One source's epoch: shuffled shards, grouped into windows."""

    order: np.ndarray  # [S] shard numbers
    bounds: np.ndarray  # [W + 1] window w holds order[bounds[w]:bounds[w + 1]]
    firsts: np.ndarray  # [W + 1] number of sequences before each window


@dataclass(frozen=True)
class Window:
    """A packed window: where its documents are, and its sequences in the order they are yielded."""

    shards: np.ndarray  # [n] shard numbers
    starts: np.ndarray  # [n + 1] first document of each shard within the window
    sequences: list[list[Piece]]

    def locate(self, document: int) -> tuple[int, int]:
        """(shard number, sample in it) of a document of the window."""
        place = int(np.searchsorted(self.starts, document, side="right")) - 1
        return int(self.shards[place]), document - int(self.starts[place])


class _Stream:
    """One source as an endless, exactly addressable stream of packed sequences."""

    def __init__(
        self,
        source: DocumentSource,
        max_tokens: int,
        max_images: int,
        window_documents: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.source = source
        self.max_tokens, self.max_images = max_tokens, max_images
        self.window_documents, self.seed, self.shuffle = window_documents, seed, shuffle
        self.cut = self.lost = 0  # dialogues of the first epoch that are shortened, and left out
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._ends: list[int] = []  # sequences up to the end of each epoch seen so far
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._windows_kept, self._epochs_kept = _WINDOWS_KEPT, _EPOCHS_KEPT

    def keep_enough_for(self, sequences: int) -> None:
        """Keep windows and epochs at hand for reading so many sequences in any order, one lot after another."""
        first = self.epoch(0).firsts
        epochs = sequences / max(1, int(first[-1]))
        # A lot begins and ends inside a window, and the next lot is begun ahead of time.
        self._windows_kept = max(_WINDOWS_KEPT, math.ceil(epochs * (len(first) - 1)) + 3)
        self._epochs_kept = max(_EPOCHS_KEPT, math.ceil(epochs) + 2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": OrderedDict()}

    def epoch(self, number: int) -> _Epoch:
        """Windows of one epoch."""
        if number not in self._epochs:
            source, shards = self.source, len(self.source.samples)
            order = np.arange(shards)
            if self.shuffle:
                order = Permutation(shards, mix(self.seed, 0x5A4D, number))(order)
            before = np.concatenate([[0], np.cumsum(source.samples[order])])
            # A window begins with the first shard that starts in another multiple of window_documents.
            group = before[:-1] // self.window_documents
            bounds = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [shards]]).astype(np.int64)
            if len(bounds) > 2 and before[-1] - before[bounds[-2]] < self.window_documents // 2:
                bounds = np.delete(bounds, -2)  # a small last window would fill badly
            tokens = np.add.reduceat(source.tokens[order], bounds[:-1])
            images = np.add.reduceat(source.images[order], bounds[:-1])
            sizes = [
                num_sequences(int(t), int(i), self.max_tokens, self.max_images)
                for t, i in zip(tokens, images, strict=True)
            ]
            told = np.add.reduceat(dialogues_of(source)[order], bounds[:-1])
            for window in np.flatnonzero(told):
                # Dialogues stay whole, so only packing tells how many sequences they take.
                found, cut, lost = self._pack_whole(order[bounds[window] : bounds[window + 1]])
                sizes[window] = len(found)
                if number == 0:
                    self.cut, self.lost = self.cut + cut, self.lost + lost
            self._epochs[number] = _Epoch(
                order, bounds, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            )
            if len(self._epochs) > self._epochs_kept:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def locate(self, ordinal: int) -> tuple[int, int, int]:
        """(epoch, window, sequence in it) of the stream's ``ordinal``-th sequence."""
        while not self._ends or ordinal >= self._ends[-1]:
            size = int(self.epoch(len(self._ends)).firsts[-1])
            self._ends.append((self._ends[-1] if self._ends else 0) + size)
        number = int(np.searchsorted(np.array(self._ends), ordinal, side="right"))
        within = ordinal - (self._ends[number - 1] if number else 0)
        firsts = self.epoch(number).firsts
        window = int(np.searchsorted(firsts, within, side="right")) - 1
        return number, window, within - int(firsts[window])

    def window(self, epoch: int, number: int) -> Window:
        """Pack one window; the most recently used are kept."""
        key = (epoch, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        layout = self.epoch(epoch)
        shards = layout.order[layout.bounds[number] : layout.bounds[number + 1]]
        lengths = self._lengths(shards)
        if lengths.answers is not None:
            packed, *_ = self._pack_whole(shards, lengths)
        else:
            sequences = int(layout.firsts[number + 1] - layout.firsts[number])
            packed = pack_window(lengths, self.max_tokens, self.max_images, sequences)
        if self.shuffle and packed:
            order = Permutation(len(packed), mix(self.seed, 0x9AC4, epoch, number))(np.arange(len(packed)))
            packed = [packed[i] for i in order]
        samples = self.source.samples[shards]
        starts = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
        self._windows[key] = Window(shards, starts, packed)
        if len(self._windows) > self._windows_kept:
            self._windows.popitem(last=False)
        return self._windows[key]

    def _lengths(self, shards: np.ndarray) -> Lengths:
        return join_lengths([self.source.lengths(int(shard)) for shard in shards])

    def _pack_whole(
        self, shards: np.ndarray, lengths: Lengths | None = None
    ) -> tuple[list[list[Piece]], int, int]:
        """Sequences of a window with dialogues, and how many of these are shortened and left out."""
        lengths = self._lengths(shards) if lengths is None else lengths
        kept = kept_tokens(lengths, self.max_tokens, self.max_images)
        packed = pack_dialogues(lengths, self.max_tokens, self.max_images, kept)
        return packed, int(((kept > 0) & (kept < lengths.tokens)).sum()), int((kept == 0).sum())


class DocumentsPlan:
    """Order of packed sequences from one source or a mixture; a :class:`~..plan.Plan`.

    Args:
        sources: name to documents.
        weights: name to its share of tokens, any scale; None takes every document of every source once an
            epoch, shuffled together.
        max_tokens: tokens of a sequence.
        max_images: images of a sequence.
        window_documents: documents packed together; more fill better and cost more memory.
        seed: of every shuffle.
        shuffle: False keeps the order of the shards (evaluation).
        tokenizer: digest of the tokenizer the shards were made with, part of the fingerprint.

    Raises:
        ValueError: no documents, or weights that do not fit the sources.
    """

    def __init__(
        self,
        sources: Mapping[str, DocumentSource],
        *,
        max_tokens: int,
        max_images: int,
        weights: Mapping[str, float] | None = None,
        window_documents: int = 8192,
        seed: int = 0,
        shuffle: bool = True,
        tokenizer: str = "",
    ) -> None:
        self.names = list(sources)
        for name, source in sources.items():
            if not len(source.samples) or not source.tokens.sum():
                raise ValueError(
                    f"source {name!r} holds no tokens, expected at least one document; check its folder with "
                    "`interloom data verify DIR` or remove it from the mixture"
                )
        if not sources:
            raise ValueError("no source of documents was given, expected at least one folder of shards")
        if window_documents < 1:
            raise ValueError(f"window_documents={window_documents} given, expected at least 1")
        self.max_tokens, self.max_images, self.seed, self.shuffle = max_tokens, max_images, seed, shuffle
        self.window_documents, self.tokenizer = window_documents, tokenizer
        self.sources = dict(sources)
        self.weights = None if weights is None else _check_weights(weights, self.names)
        self._joined = _Joined(list(sources.values())) if weights is None else None
        drawn = list(sources.values()) if self._joined is None else [self._joined]
        self.streams = [
            _Stream(source, max_tokens, max_images, window_documents, mix(seed, number), shuffle)
            for number, source in enumerate(drawn)
        ]
        self.sizes = [int(stream.epoch(0).firsts[-1]) for stream in self.streams]
        if not all(self.sizes):
            raise ValueError(
                f"every dialogue has its first answer beyond max_tokens={max_tokens} (or more than max_images="
                f"{max_images} images before it); raise them, or leave the source out"
            )
        self._quotas = _quotas(self._shares())
        self._firsts = np.concatenate([[0], np.cumsum(self._quotas)])
        if len(self.streams) > 1:  # a block takes its sequences from all over the windows that it spans
            for stream, quota in zip(self.streams, self._quotas, strict=True):
                stream.keep_enough_for(int(quota))

    def _shares(self) -> list[float]:
        """Shares of sequences that make the shares of tokens the weights: a source of captioned pictures fills
        its sequences with images before it fills them with tokens."""
        if self.weights is None:
            return [1.0]
        return [
            self.weights[name] * size / int(source.tokens.sum())
            for (name, source), size in zip(self.sources.items(), self.sizes, strict=True)
        ]

    @property
    def dialogues(self) -> dict[str, int]:
        """How many dialogues there are, how many are shortened to ``max_tokens`` and how many left out."""
        return {
            "dialogues": sum(int(dialogues_of(source).sum()) for source in self.sources.values()),
            "shortened": sum(stream.cut for stream in self.streams),
            "left out": sum(stream.lost for stream in self.streams),
        }

    def __len__(self) -> int:
        """Sequences of one pass over all sources."""
        return sum(self.sizes)

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """(stream, epoch, window, sequence) int64 [n, 4] of the global positions [n]."""
        rows = [self._locate(int(position)) for position in np.asarray(positions).reshape(-1)]
        return np.array(rows, np.int64).reshape(-1, 4)

    def _locate(self, position: int) -> tuple[int, int, int, int]:
        if len(self.streams) == 1:
            return (0, *self.streams[0].locate(position))
        block, slot = divmod(position, _BLOCK)
        if self.shuffle:
            slot = int(Permutation(_BLOCK, mix(self.seed, 0xB10C, block))(np.array([slot]))[0])
        stream = int(np.searchsorted(self._firsts, slot, side="right")) - 1
        ordinal = block * int(self._quotas[stream]) + slot - int(self._firsts[stream])
        return (stream, *self.streams[stream].locate(ordinal))

    def sequence(self, row: Sequence[int] | np.ndarray) -> list[tuple[int, int, int, Piece]]:
        """(source, shard in it, sample in that, piece) of every piece of one located sequence."""
        stream, epoch, window, number = (int(x) for x in row)
        packed = self.streams[stream].window(epoch, window)
        pieces = []
        for piece in packed.sequences[number]:
            shard, sample = packed.locate(piece.document)
            source, shard = (stream, shard) if self._joined is None else self._joined.part(shard)
            pieces.append((source, shard, sample, piece))
        return pieces

    def fingerprint(self) -> dict[str, Any]:
        """Seed, limits, weights, tokenizer, and the digest of every shard and index."""
        out: dict[str, Any] = {
            "kind": "documents",
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_tokens": self.max_tokens,
            "max_images": self.max_images,
            "window_documents": self.window_documents,
            "tokenizer": self.tokenizer,
            "sources": ", ".join(self.names),
            "weights": dict(self.weights) if self.weights else "each source once",
        }
        for name, source in self.sources.items():
            out[f"shards of {name}"] = dict(source.digests())
        return out


def _check_weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    unknown, missing = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
    if unknown or missing:
        raise ValueError(
            f"weights name {', '.join(weights) or 'nothing'} but the sources are {', '.join(names)}; give "
            "each source one weight"
        )
    wrong = {name: weight for name, weight in weights.items() if not 0 < float(weight) < float("inf")}
    if wrong:
        raise ValueError(
            f"source weights {wrong} given, expected numbers above 0; remove a source that should not be read"
        )
    return {name: float(weights[name]) for name in names}


def _quotas(shares: Sequence[float]) -> np.ndarray:
    """Slots of each source in a block, by largest remainder; every source gets at least one."""
    exact = np.array(shares, np.float64) / sum(shares) * _BLOCK
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for turn in range(_BLOCK * 2):
        missing = _BLOCK - int(quotas.sum())
        if missing == 0:
            break
        if missing > 0:
            quotas[order[turn % len(order)]] += 1
        else:
            quotas[int(np.argmax(quotas))] -= 1
    return quotas
