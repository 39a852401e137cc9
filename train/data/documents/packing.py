"""Packing one window of documents into sequences: which piece of which document goes where.

How *many* sequences a window makes is a formula of its tokens and images (:func:`num_sequences`), known
before anything is packed: so the place of every sequence in an epoch is known too, and a run can start
anywhere in 141 million documents at once. *Which* piece goes where is a pure function of the lengths:

1. **Cut** documents that exceed ``max_tokens`` or ``max_images``, at the last image that fits. A piece then
   opens with its image, so no token loses the picture it looks at; only a run of text longer than a whole
   sequence is cut inside the text. An image's own tokens are never separated.
2. **Best fit, longest first**: a piece goes to the sequence whose free space it fills best. Free space is a
   bit set, so a search is one shift; a window of 8,192 documents takes about 20 ms.
3. **Fill**: best fit leaves 2–4 % of 1,024-token sequences empty, because long pieces find no partner. The
   emptiest sequences are dissolved, and their documents cut further into pieces that close the gaps: at
   images, or in the text that precedes a document's first image; elsewhere only if nothing else is left.

Every token of the window appears in exactly one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A gap smaller than this is not worth cutting a document for.
MIN_FRAGMENT = 16
# Gaps tried for one piece, and sequences that may refuse to dissolve in a row, before cuts are forced.
PATIENCE = 64


@dataclass(frozen=True)
class Answers:
    """Where the answers of D documents stand; pages have none.

    Attributes:
        starts, ends: int64 [sum of answers], tokens of each inside its document, ascending within one.
        offsets: int64 [D + 1], document d owns the answers ``offsets[d]:offsets[d + 1]``.
    """

    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray

    @classmethod
    def none(cls, documents: int) -> Answers:
        """Those of pages."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(documents + 1, np.int64))


@dataclass(frozen=True)
class Lengths:
    """What packing knows of D documents.

    Attributes:
        tokens: int64 [D], length of each in tokens.
        image_starts: int64 [sum of images], position of each image's first token inside its document,
            ascending within a document.
        offsets: int64 [D + 1], document d owns ``image_starts[offsets[d]:offsets[d + 1]]``.
        answers: of dialogues (:mod:`.truncation`); None if there are pages alone.
    """

    tokens: np.ndarray
    image_starts: np.ndarray
    offsets: np.ndarray
    answers: Answers | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens ``start:end`` of a document, with its images ``first_image:first_image + num_images``."""

    document: int
    start: int
    end: int
    first_image: int
    num_images: int

    @property
    def length(self) -> int:
        """Tokens in the piece."""
        return self.end - self.start


class _Documents:
    """Cuts pieces; the only place that knows where a document may be cut."""

    def __init__(self, lengths: Lengths) -> None:
        self.starts = lengths.image_starts.tolist()
        self.offsets = lengths.offsets.tolist()

    def longest_prefix(self, piece: Piece, room: int, images: int, *, forced: bool) -> Piece | None:
        """Return the longest beginning of ``piece`` within ``room`` tokens and ``images`` images.

        ``forced`` allows the cuts that cost something (inside text that follows an image, between adjacent
        images), for pieces that fit nowhere otherwise. None if no cut is allowed.
        """
        base = self.offsets[piece.document] + piece.first_image
        inner = self.starts[base : base + piece.num_images]
        limit = piece.start + room
        if not inner or inner[0] >= limit:  # all of the prefix precedes the first image
            end = limit
            return (
                None if end <= piece.start else Piece(piece.document, piece.start, end, piece.first_image, 0)
            )
        best, between = None, None
        for count, position in enumerate(inner):
            if position > limit or count > images:
                break
            if position == piece.start:
                continue
            if count and position - inner[count - 1] <= 2:  # shares its opening token with its neighbour
                between = (count, position)
            else:
                best = (count, position)
        if best is None and forced:
            best = between
        if best is not None:
            count, end = best
            return Piece(piece.document, piece.start, end, piece.first_image, count)
        if not forced:
            # Text before the first image may be cut anywhere: no token there looks at a picture.
            end = min(limit, inner[0])
            if end <= piece.start:
                return None
            return Piece(piece.document, piece.start, end, piece.first_image, 0)
        count = sum(position < limit for position in inner)
        return Piece(piece.document, piece.start, limit, piece.first_image, count)

    def cut_anywhere(self, piece: Piece, room: int, images: int) -> Piece | None:
        """Return as much of ``piece`` as fits, cut at any token that does not separate an image's own."""
        base = self.offsets[piece.document] + piece.first_image
        inner = self.starts[base : base + piece.num_images]
        end = piece.start + min(room, piece.length)
        if images < len(inner):
            end = min(end, inner[images])
        count = sum(position < end for position in inner)
        if count and end - inner[count - 1] < min(3, piece.end - inner[count - 1]):
            count, end = count - 1, inner[count - 1]
        return (
            Piece(piece.document, piece.start, end, piece.first_image, count) if end > piece.start else None
        )

    @staticmethod
    def rest(piece: Piece, prefix: Piece) -> Piece:
        """Return what is left of ``piece`` after ``prefix``."""
        return Piece(
            piece.document,
            prefix.end,
            piece.end,
            piece.first_image + prefix.num_images,
            piece.num_images - prefix.num_images,
        )


class _Sequences:
    """Open sequences, found by free space: ``at[s]`` lists those with s tokens left, in ``mask``."""

    def __init__(self, max_tokens: int, max_images: int) -> None:
        self.max_tokens, self.max_images = max_tokens, max_images
        self.members: list[list[Piece]] = []
        self.images: list[int] = []
        self.at: list[list[int]] = [[] for _ in range(max_tokens + 1)]
        self.mask = 0

    def _file(self, number: int, space: int) -> None:
        self.at[space].append(number)
        self.mask |= 1 << space

    def _unfile(self, space: int, position: int) -> int:
        number = self.at[space].pop(position)
        if not self.at[space]:
            self.mask &= ~(1 << space)
        return number

    def space(self, number: int) -> int:
        """Tokens left in a sequence."""
        return self.max_tokens - sum(piece.end - piece.start for piece in self.members[number])

    def place(self, piece: Piece, *, opening: bool = True) -> bool:
        """Put ``piece`` where it leaves least space; in a new sequence if nowhere, if ``opening``."""
        length, images = piece.end - piece.start, piece.num_images
        mask = self.mask >> length
        while mask:
            space = length + (mask & -mask).bit_length() - 1
            numbers = self.at[space]
            for position in range(len(numbers) - 1, -1, -1):
                number = numbers[position]
                if self.images[number] + images <= self.max_images:
                    self._unfile(space, position)
                    self.members[number].append(piece)
                    self.images[number] += images
                    if space > length:
                        self._file(number, space - length)
                    return True
            mask &= mask - 1
        if not opening:
            return False
        self.members.append([piece])
        self.images.append(images)
        if length < self.max_tokens:
            self._file(len(self.members) - 1, self.max_tokens - length)
        return True

    def add(self, number: int, space: int, piece: Piece) -> None:
        """Put ``piece`` into a sequence that has ``space`` tokens left."""
        self._unfile(space, self.at[space].index(number))
        self.members[number].append(piece)
        self.images[number] += piece.num_images
        if space > piece.length:
            self._file(number, space - piece.length)

    def widest(self, skip: int) -> tuple[int, int] | None:
        """Return (number, space) of the ``skip``-th sequence by free space, widest first."""
        mask = self.mask
        while mask:
            space = mask.bit_length() - 1
            numbers = self.at[space]
            if skip < len(numbers):
                return numbers[-1 - skip], space
            skip -= len(numbers)
            mask &= ~(1 << space)
        return None

    def dissolve(self, number: int) -> list[Piece]:
        """Take a sequence apart and return its pieces."""
        space = self.space(number)
        if space:
            self._unfile(space, self.at[space].index(number))
        pieces, self.members[number], self.images[number] = self.members[number], [], 0
        return pieces

    def restore(self, number: int, pieces: list[Piece]) -> None:
        """Refill an empty sequence."""
        self.members[number] = pieces
        self.images[number] = sum(piece.num_images for piece in pieces)
        if space := self.space(number):
            self._file(number, space)


def cut_documents(lengths: Lengths, max_tokens: int, max_images: int) -> list[Piece]:
    """Return every document as one piece, or as several where it exceeds a limit."""
    documents = _Documents(lengths)
    counts = np.diff(lengths.offsets).tolist()
    pieces = []
    for document, (tokens, images) in enumerate(zip(lengths.tokens.tolist(), counts, strict=True)):
        piece = Piece(document, 0, tokens, 0, images)
        while piece.length > max_tokens or piece.num_images > max_images:
            room = min(max_tokens, piece.length)
            prefix = documents.longest_prefix(piece, room, max_images, forced=True)
            assert prefix is not None, "a forced cut always exists"
            pieces.append(prefix)
            piece = documents.rest(piece, prefix)
        if piece.length:
            pieces.append(piece)
    return pieces


def num_sequences(tokens: int, images: int, max_tokens: int, max_images: int) -> int:
    """Number of sequences that a window of ``tokens`` and ``images`` is packed into.

    Were only tokens limited, 98.8 % of them would be filled; were only images, all. Where both bind, the two
    counts are joined by their 3-norm: 26 % more than either if they are equal, 1 % if one is a third of the
    other.
    """
    if tokens == 0:
        return 0
    by_tokens = tokens / min(0.988 * max_tokens, max_tokens - 4)
    by_images = images / max_images
    return int((by_tokens**3 + by_images**3) ** (1 / 3)) + 2


def pack_window(
    lengths: Lengths, max_tokens: int, max_images: int, sequences: int | None = None
) -> list[list[Piece]]:
    """Pack one window of documents.

    Args:
        lengths: of the window's documents, in the order of the plan.
        max_tokens: of a sequence, at least 8.
        max_images: of a sequence, at least 1.
        sequences: how many to make; :func:`num_sequences` of the window if None.

    Returns:
        Exactly ``sequences`` lists of pieces; every token and image of the window in exactly one piece. No
        sequence exceeds ``max_tokens``; one exceeds ``max_images`` only where documents crowd so many images
        together that no packing into so few sequences was found.

    Raises:
        ValueError: limits that leave no room.
    """
    if max_tokens < 8 or max_images < 1:
        raise ValueError(
            f"max_tokens={max_tokens} and max_images={max_images} leave no room for an image and its tokens; "
            "use at least 8 and 1."
        )
    if sequences is None:
        total = int(lengths.tokens.sum())
        sequences = num_sequences(total, len(lengths.image_starts), max_tokens, max_images)
    packs = _placed(cut_documents(lengths, max_tokens, max_images), max_tokens, max_images)
    documents = _Documents(lengths)
    for forced in (False, True):
        _reduce(documents, packs, sequences, forced=forced)
    packed = [members for members in packs.members if members]
    if len(packed) > sequences:
        packed = _end_to_end(lengths, documents, max_tokens, max_images)
    if len(packed) > sequences:
        # Images crowd in part of the window: rather more of them in a sequence than a token lost.
        packed = _end_to_end(lengths, documents, max_tokens, len(lengths.image_starts))
    while len(packed) < sequences:
        _split(documents, packed)
    return packed


def best_fit(pieces: list[Piece], max_tokens: int, max_images: int) -> list[list[Piece]]:
    """Sequences of whole pieces, each of at most ``max_tokens`` and ``max_images``; as many as it takes."""
    return _placed(pieces, max_tokens, max_images).members


def _placed(pieces: list[Piece], max_tokens: int, max_images: int) -> _Sequences:
    # Longest first; ties in the order of the plan, so that the result is a function of the lengths alone.
    packs = _Sequences(max_tokens, max_images)
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):
        packs.place(piece)
    return packs


def _reduce(documents: _Documents, sequences: _Sequences, target: int, *, forced: bool) -> None:
    """Dissolve the emptiest sequences into the gaps of the others until ``target`` are left."""
    count = sum(1 for members in sequences.members if members)
    stubborn = in_a_row = 0
    while count > target and (forced or in_a_row < PATIENCE):
        widest = sequences.widest(stubborn)
        if widest is None:
            return
        number, _ = widest
        pieces = sequences.dissolve(number)
        left = [rest for piece in pieces for rest in _spread(documents, sequences, piece, forced=forced)]
        if left:
            # What found no gap returns to where it came from: parts of one sequence always fit in one again.
            sequences.restore(number, left)
            stubborn, in_a_row = stubborn + 1, in_a_row + 1
        else:
            count, in_a_row = count - 1, 0


def _spread(documents: _Documents, sequences: _Sequences, piece: Piece, *, forced: bool) -> list[Piece]:
    """Place ``piece``, cut where it may be cut, in gaps of open sequences; return what found none."""
    tries, fragment = 0, 4 if forced else MIN_FRAGMENT
    while piece.length:
        if sequences.place(piece, opening=False):
            return []
        gap = sequences.widest(tries)
        if gap is None or gap[1] < fragment or (tries > PATIENCE and not forced):
            return [piece]
        number, space = gap
        room = min(space, piece.length - 1)
        free_images = sequences.max_images - sequences.images[number]
        prefix = documents.longest_prefix(piece, room, free_images, forced=forced) if room > 0 else None
        if prefix is None or prefix.length < fragment or prefix.num_images > free_images:
            tries += 1
            continue
        sequences.add(number, space, prefix)
        piece = documents.rest(piece, prefix)
        tries = 0
    return []


def _end_to_end(
    lengths: Lengths, documents: _Documents, max_tokens: int, max_images: int
) -> list[list[Piece]]:
    """Lay documents end to end and cut when a limit is met.

    Every sequence but the last ends within 3 tokens of the limit or with its last image taken.
    """
    packed: list[list[Piece]] = [[]]
    tokens = images = 0
    counts = np.diff(lengths.offsets).tolist()
    for document, (length, count) in enumerate(zip(lengths.tokens.tolist(), counts, strict=True)):
        piece = Piece(document, 0, length, 0, count)
        while piece.length:
            room, free = max_tokens - tokens, max_images - images
            if piece.length <= room and piece.num_images <= free:
                prefix = piece
            else:
                prefix = documents.cut_anywhere(piece, room, free)
            if prefix is None:
                packed.append([])
                tokens = images = 0
                continue
            packed[-1].append(prefix)
            tokens, images = tokens + prefix.length, images + prefix.num_images
            piece = documents.rest(piece, prefix)
    return packed


def _split(documents: _Documents, packed: list[list[Piece]]) -> None:
    """Make one sequence two: half of its pieces go, or its only piece is cut."""
    fullest = max(range(len(packed)), key=lambda number: len(packed[number]))
    members = packed[fullest]
    if len(members) == 1:
        fullest = max(range(len(packed)), key=lambda number: packed[number][0].length)
        whole = packed[fullest][0]
        half = documents.longest_prefix(whole, whole.length // 2, whole.num_images, forced=True)
        if half is None or half.length >= whole.length:
            packed.append([])  # a lone image and nothing to cut: an empty sequence is padding
            return
        members = [half, documents.rest(whole, half)]
    packed[fullest] = members[::2]
    packed.append(members[1::2])
