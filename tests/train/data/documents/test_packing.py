"""Packing and its plan, against brute-force counts of every token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.train.data.documents.order import IDEFICS_MIXTURE, DocumentsPlan
from interloom.train.data.documents.packing import Lengths, cut_documents, num_sequences, pack_window


def documents(lengths, images):
    """Documents whose images stand at the given positions."""
    return Lengths(
        np.array(lengths, np.int64),
        np.array([p for row in images for p in row], np.int64),
        np.cumsum([0, *map(len, images)]),
    )


def obelics_like(count, seed=0):
    """Median 677 and mean 816 tokens, 2.5 images a document, as published for OBELICS."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(np.exp(rng.normal(np.log(677), 0.61, count)), 13, 4000).astype(int)
    images = np.minimum(np.minimum(rng.geometric(1 / 2.5, count), 30), tokens // 4)
    places = [
        np.sort(rng.choice((t - 3) // 3, k, replace=False)) * 3 + 1
        for t, k in zip(tokens, images, strict=True)
    ]
    return documents(tokens, places)


def check_every_token_once(lengths, packed, max_tokens, max_images):
    seen = [np.zeros(t, int) for t in lengths.tokens]
    images = [np.zeros(k, int) for k in np.diff(lengths.offsets)]
    for pieces in packed:
        assert sum(p.length for p in pieces) <= max_tokens
        assert max_images is None or sum(p.num_images for p in pieces) <= max_images
        for p in pieces:
            seen[p.document][p.start : p.end] += 1
            images[p.document][p.first_image : p.first_image + p.num_images] += 1
            starts = lengths.image_starts[lengths.offsets[p.document] : lengths.offsets[p.document + 1]]
            # exactly the images whose tokens lie in the piece, and both of an image's tokens with it
            inside = [i for i, s in enumerate(starts) if p.start <= s < p.end]
            assert inside == list(range(p.first_image, p.first_image + p.num_images))
            assert all(starts[i] + 1 < p.end for i in inside)
    assert all((s == 1).all() for s in seen)
    assert all((i == 1).all() for i in images)


@pytest.mark.parametrize(("max_tokens", "max_images"), [(1024, 10), (2048, 20)])
def test_fill_on_obelics_like_lengths(max_tokens, max_images):
    lengths = obelics_like(8192)
    packed = pack_window(lengths, max_tokens, max_images)
    check_every_token_once(lengths, packed, max_tokens, max_images)
    assert lengths.tokens.sum() / (len(packed) * max_tokens) >= 0.97
    # A text after an image is torn only where it is longer than a sequence: filling adds next to nothing.
    unavoidable = torn(lengths, cut_documents(lengths, max_tokens, max_images))
    assert torn(lengths, [p for pieces in packed for p in pieces]) < unavoidable + 0.01 * len(lengths.tokens)


def torn(lengths, pieces):
    """Pieces that begin inside a text whose image lies in another piece."""
    count = 0
    for piece in pieces:
        starts = lengths.image_starts[lengths.offsets[piece.document] : lengths.offsets[piece.document + 1]]
        count += piece.start not in starts and piece.start > starts[0]
    return count


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 90), st.lists(st.integers(0, 40), max_size=6, unique=True)),
        min_size=1,
        max_size=30,
    ),
    st.integers(8, 40),
    st.integers(1, 4),
)
def test_any_documents_lose_no_token(rows, max_tokens, max_images):
    lengths, places = [], []
    for tokens, slots in rows:
        positions = [3 * s + 1 for s in sorted(slots)]
        positions = [p for p in positions if p + 3 <= tokens]
        lengths.append(tokens)
        places.append(positions)
    found = documents(lengths, places)
    packed = pack_window(found, max_tokens, max_images)
    check_every_token_once(found, packed, max_tokens, None)
    assert len(packed) == num_sequences(sum(lengths), sum(map(len, places)), max_tokens, max_images)


@pytest.mark.parametrize(
    ("text", "images", "max_images"), [(40, 3, 10), (30, 1, 10), (300, 3, 3), (25, 8, 6)]
)
def test_dense_images_keep_their_limit(text, images, max_images):
    """Captioned pictures, picture stories, and pages whose images take up most of the room."""
    rng = np.random.default_rng(0)
    counts = np.maximum(1, rng.poisson(images, 1500))
    tokens = rng.integers(text // 2, 2 * text, 1500) + 4 * counts + 2
    places = [
        np.sort(rng.choice((t - 3) // 3, k, replace=False)) * 3 + 1
        for t, k in zip(tokens, counts, strict=True)
    ]
    lengths = documents(tokens, places)
    packed = pack_window(lengths, 256, max_images)
    check_every_token_once(lengths, packed, 256, max_images)
    ideal = max(tokens.sum() / 256, counts.sum() / max_images)
    assert len(packed) < 1.25 * ideal


def test_documents_are_cut_where_an_image_begins():
    lengths = documents([300], [[10, 90, 92, 200]])  # 90 and 92 share a token
    pieces = [(p.start, p.end, p.first_image, p.num_images) for p in cut_documents(lengths, 128, 8)]
    assert pieces == [(0, 90, 0, 1), (90, 200, 1, 2), (200, 300, 3, 1)]
    by_images = [(p.start, p.end) for p in cut_documents(lengths, 512, 3)]
    assert by_images == [(0, 200), (200, 300)]


def test_text_longer_than_a_sequence_is_cut_inside():
    pieces = [(p.start, p.end, p.num_images) for p in cut_documents(documents([250], [[1]]), 100, 4)]
    assert sum(e - s for s, e, _ in pieces) == 250
    assert all(e - s <= 100 for s, e, _ in pieces)


def test_no_room_is_said():
    with pytest.raises(ValueError, match="max_tokens=4"):
        pack_window(documents([10], [[]]), 4, 1)


class Memory:
    """A source in memory: shards of documents."""

    def __init__(self, name, shards, text_only=False):
        self.name, self.shards = name, shards
        self.samples = np.array([len(s.tokens) for s in shards])
        self.tokens = np.array([s.tokens.sum() for s in shards])
        self.images = np.array([len(s.image_starts) for s in shards])

    def lengths(self, shard):
        return self.shards[shard]

    def digests(self):
        return {f"{self.name}-{i}": str(int(s.tokens.sum())) for i, s in enumerate(self.shards)}


def source(name="a", shards=6, size=70, seed=0):
    return Memory(name, [obelics_like(size, seed * 100 + i) for i in range(shards)])


def plan(sources=None, **options):
    sources = sources or {"a": source()}
    return DocumentsPlan(
        sources, **{"max_tokens": 1024, "max_images": 10, "window_documents": 140, **options}
    )


def covered(made, positions):
    count = {}
    for row in made.locate(positions):
        for where, shard, sample, piece in made.sequence(row):
            total = count.setdefault((where, shard, sample), {})
            for token in range(piece.start, piece.end):
                total[token] = total.get(token, 0) + 1
    return count


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_an_epoch_holds_every_token_once(names):
    sources = {name: source(name, seed=i) for i, name in enumerate(names)}
    made = plan(sources)
    for epoch in range(2):
        count = covered(made, np.arange(len(made)) + epoch * len(made))
        if epoch and len(made) != int(made.streams[0].epoch(1).firsts[-1]):
            continue  # the second epoch has another number of windows, hence of sequences
        for number, name in enumerate(names):
            for shard, lengths in enumerate(sources[name].shards):
                for sample, tokens in enumerate(lengths.tokens):
                    assert count[(number, shard, sample)] == dict.fromkeys(range(tokens), 1)


def test_order_is_a_pure_function_of_the_seed():
    positions = np.arange(50)
    first, again, other = plan().locate(positions), plan().locate(positions), plan(seed=1).locate(positions)
    np.testing.assert_array_equal(first, again)
    pieces = lambda made: [made.sequence(row) for row in made.locate(positions)]  # noqa: E731
    assert pieces(plan()) == pieces(plan())
    assert pieces(plan()) != pieces(plan(seed=1))
    assert other.shape == first.shape
    # any position by itself, in any order
    made = plan()
    np.testing.assert_array_equal(made.locate(positions[::-1])[::-1], first)
    assert [made.sequence(row) for row in made.locate(positions)[::-1]][::-1] == pieces(plan())


def test_mixture_keeps_its_weights():
    sources = {name: source(name, seed=i) for i, name in enumerate(IDEFICS_MIXTURE)}
    # One of them is of captioned pictures, whose sequences are full of images before they are full of tokens.
    tokens = np.full(700, 12, np.int64)
    sources["laion"] = Memory("laion", [documents(tokens, [[1]] * 700) for _ in range(4)])
    made = plan(sources, weights=IDEFICS_MIXTURE)
    rows = made.locate(np.arange(10_000, 20_000))
    filled = np.array([sum(piece.length for *_, piece in made.sequence(row)) for row in rows])
    shares = np.array([filled[rows[:, 0] == number].sum() for number in range(4)]) / filled.sum() * 100
    np.testing.assert_allclose(shares, list(IDEFICS_MIXTURE.values()), atol=0.7)
    # and within shorter stretches up to chance: no source is read in one lump
    whole = (rows[:, 0] == 0).mean() * 100
    for start in range(0, 10_000, 1000):
        assert abs((rows[start : start + 1000, 0] == 0).mean() * 100 - whole) < 6
    # each source is read in its own order, without gaps
    for number in range(4):
        block = rows[rows[:, 0] == number]
        assert len(np.unique(block, axis=0)) == len(block)


def test_a_mixture_packs_each_window_once(monkeypatch):
    """Sequences of a block come from all over it; of a small source that is many epochs."""
    from interloom.train.data.documents import order as module

    whole, packed = module.pack_window, []
    monkeypatch.setattr(module, "pack_window", lambda *given: packed.append(1) or whole(*given))
    sources = {name: source(name, shards=shards, seed=shards) for name, shards in (("a", 2), ("b", 12))}
    made = plan(sources, weights={"a": 0.4, "b": 0.6})
    rows = made.locate(np.arange(10_000))
    for row in rows:
        made.sequence(row)
    assert len(packed) == len(np.unique(rows[:, :3], axis=0)) > 50


def test_image_ratio_does_not_drift_within_a_window():
    made = plan({"a": source(shards=4, size=2048)}, window_documents=8192)
    tokens = np.array(
        [sum(p.num_images for *_, p in made.sequence(r)) for r in made.locate(np.arange(len(made)))]
    )
    slope = np.polyfit(np.linspace(-0.5, 0.5, len(tokens)), tokens, 1)[0]
    assert abs(slope) < 0.1 * tokens.mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 0.0}}, "above 0"),
        ({"weights": {"b": 1.0}}, "weights name b but the sources are a"),
        ({"window_documents": 0}, "window_documents=0"),
    ],
)
def test_bad_mixtures(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_an_empty_source_is_an_error():
    with pytest.raises(ValueError, match="holds no tokens"):
        plan({"a": Memory("a", [documents([], [])])})
