"""Drawn documents whose text can only be completed by looking: ``interloom data demo --kind interleaved``.

    OUT/records/train.parquet, val.parquet   records in the published OBELICS schema, images as bytes
    OUT/tokenizer/                           tokenizer of the demo's words
    OUT/train/, OUT/val/                     shards, made from the records by the ordinary conversion

A document shows two to four scenes of one to three objects and tells of each. Five kinds of statement end in an
*answer*, one word that the text before it does not give away:

- ``colour``: "the cat is red", or "on the left is a red"; colours are independent of kinds
- ``class``: "the red one is a cat", or, going on, "on the left is a red cat"
- ``count``: "the number of objects is three"
- ``relation``: "the cat has the star on its left"
- ``reference``: after the last scene, "in the first picture the cat was red", of an object not told of before

The other documents are *in-context* tasks: two made-up words stand for two kinds of object, agreed upon
within the document only, and one scene after the other is called by its word.

``general_metadata`` of a record lists the answers: ``{"questions": [{"part", "start", "end", "kind",
"choices"}]}``, characters ``start:end`` of ``texts[part]``, chosen among ``choices`` equally likely words: those
that the text has not used of the scene before. A document is a pure function of (seed, number); held-out ones are
numbered from 1,000,000,000.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...files import sweep, write_atomically
from ...parallel.processes import end_with_parent
from .backdrops import BACKDROP_NAMES, draw_backdrop
from .objects import CLASS_NAMES, draw_object

IMAGE_SIZE = 64
VAL_START = 1_000_000_000
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
NUMBERS = ("one", "two", "three")
ORDINALS = ("first", "second", "third", "fourth")
SIDES = ("left", "right")
MADE_UP = ("blicket", "dax", "fep", "gorp", "kiki", "lorp", "toma", "wug", "zib", "modi")
# Rounded up, so that a new word does not change the shape of every model.
VOCAB_SIZE = 128
# What the objects of a scene of one, two and three are pointed at with, from left to right.
PLACES = (
    ("it is a",),
    ("on the left is a", "on the right is a"),
    ("on the left is a", "in the middle is a", "on the right is a"),
)
_IN_CONTEXT = 0.15
_COUNTED, _RELATED = 0.3, 0.45
_LEFT_OUT = 1 / 3
_BY_PLACE = 0.6
# Shares of scenes with one, two and three objects.
OBJECTS = (0.5, 0.3, 0.2)
_OVERSAMPLING = 2


class Statement(NamedTuple):
    """Words, the answer after them, its kind (none: no question) and among how many words it is, and the end."""

    before: str
    answer: str
    kind: str
    choices: int
    end: str = " ."


@dataclass
class DrawnDocument:
    """One record in the making: parallel lists, and the answers in its texts."""

    images: list[bytes | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)

    def image(self, pixels: Image.Image) -> None:
        """Append a scene."""
        stream = io.BytesIO()
        pixels.save(stream, "JPEG", quality=92, subsampling=0)
        self.images.append(stream.getvalue())
        self.texts.append(None)

    def say(self, statements: list[Statement]) -> None:
        """Append a text of statements."""
        text = ""
        for said in statements:
            text += (" " if text else "") + said.before + (" " if said.before else "")
            if said.kind:
                self.questions.append(
                    {
                        "part": len(self.texts),
                        "start": len(text),
                        "end": len(text) + len(said.answer),
                        "kind": said.kind,
                        "choices": said.choices,
                    }
                )
            text += said.answer + said.end
        self.images.append(None)
        self.texts.append(text)

    def record(self, source: str) -> dict[str, Any]:
        """The record in the published schema."""
        about = [
            None if image is None else {"src": f"{source}/{number}.jpg"}
            for number, image in enumerate(self.images)
        ]
        return {
            "images": self.images,
            "texts": self.texts,
            "metadata": json.dumps(about),
            "general_metadata": json.dumps({"url": source, "questions": self.questions}),
        }


@dataclass(frozen=True)
class Thing:
    """An object of a scene: kind, colour and where its centre is, in image sides."""

    kind: str
    colour: str
    x: float


def _draw(rng: np.random.Generator, things: list[tuple[str, str]]) -> tuple[Image.Image, list[Thing]]:
    """A scene of one to three objects side by side."""
    size = IMAGE_SIZE
    canvas = draw_backdrop(str(rng.choice(BACKDROP_NAMES)), size, rng)
    count = len(things)
    placed = []
    for slot, (kind, colour) in zip(rng.permutation(count), things, strict=True):
        radius = rng.uniform(0.75, 1.0) * (0.4, 0.25, 0.17)[count - 1]
        x = (slot + 0.5) / count + rng.uniform(-0.03, 0.03)
        y = rng.uniform(radius, 1 - radius)
        side = max(8, round(2 * radius * size))
        tile = draw_object(CLASS_NAMES.index(kind) + 1, colour, side * _OVERSAMPLING, rng)
        tile = tile.convert("RGBa").reduce(_OVERSAMPLING).convert("RGBA")
        canvas.paste(tile, (round(x * size - side / 2), round(y * size - side / 2)), tile)
        placed.append(Thing(kind, colour, x))
    return canvas, placed


def draw_document(seed: int, number: int, *, in_context: int | None = None) -> DrawnDocument:
    """Document ``number`` of a seed.

    Args:
        seed, number: what it is a function of.
        in_context: makes it an in-context task with this many solved scenes before the question; None
            leaves the kind of document to chance.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, number, 0x1D0C]))
    if in_context is None and rng.random() >= _IN_CONTEXT:
        return _scenes(rng)
    return _in_context(rng, int(rng.integers(2, 5)) if in_context is None else in_context)


def _scenes(rng: np.random.Generator) -> DrawnDocument:
    document, history = DrawnDocument(), []
    scenes = int(rng.integers(2, 5))
    for number in range(scenes):
        count = int(rng.choice((1, 2, 3), p=OBJECTS))
        kinds = rng.choice(CLASS_NAMES, count, replace=False)
        colours = rng.choice(COLOURS, count, replace=False)
        canvas, things = _draw(rng, list(zip(map(str, kinds), map(str, colours), strict=True)))
        document.image(canvas)
        statements, untold = _statements(rng, things)
        if number == scenes - 1:
            statements += _reference(rng, history)
        history.append((untold, count - len(untold)))
        document.say(statements)
    return document


def _statements(rng: np.random.Generator, things: list[Thing]) -> tuple[list[Statement], list[Thing]]:
    """Statements about a scene, in an order in which none answers the next; and the things not told of.

    Every thing is told of once, either all by their places or all by what they look like. In a third of the scenes of
    several things one is left for a reference to come back to. A word once used of a scene is no answer any more.
    """
    order = [things[i] for i in rng.permutation(len(things))]
    statements: list[Statement] = []
    # Asked more rarely of scenes that are more frequent: every number is the answer equally often.
    if rng.random() < _COUNTED * min(OBJECTS) / OBJECTS[len(things) - 1]:
        statements.append(
            Statement("the number of objects is", NUMBERS[len(things) - 1], "count", len(NUMBERS))
        )
    left_out = int(len(order) > 1 and rng.random() < _LEFT_OUT)
    told, untold = order[: len(order) - left_out], order[len(order) - left_out :]
    by_place = rng.random() < _BY_PLACE
    places = dict(zip(sorted(thing.x for thing in things), PLACES[len(things) - 1], strict=True))
    for used, thing in enumerate(told):
        colours, kinds = len(COLOURS) - used, len(CLASS_NAMES) - used
        if by_place:
            statements.append(Statement(places[thing.x], thing.colour, "colour", colours, ""))
            statements.append(Statement("", thing.kind, "class", kinds))
        elif rng.random() < 0.5:
            statements.append(Statement(f"the {thing.colour} one is a", thing.kind, "class", kinds))
        else:
            statements.append(Statement(f"the {thing.kind} is", thing.colour, "colour", colours))
    if not by_place and len(order) > 1 and rng.random() < _RELATED:
        one, other = order[:2]
        side = SIDES[int(other.x > one.x)]
        about = f"the {one.kind} has the {other.kind} on its"
        statements.append(Statement(about, side, "relation", len(SIDES)))
    return statements, untold


def _reference(rng: np.random.Generator, history: list[tuple[list[Thing], int]]) -> list[Statement]:
    """A statement about an earlier scene, if one holds something that was not told.

    Args:
        history: of each earlier scene what was not told of, and the number of colours named.
    """
    scenes = [number for number, (things, _) in enumerate(history) if things]
    if not scenes:
        return []
    number = scenes[int(rng.integers(0, len(scenes)))]
    things, named = history[number]
    thing = things[int(rng.integers(0, len(things)))]
    about = f"in the {ORDINALS[number]} picture the {thing.kind} was"
    return [Statement(about, thing.colour, "reference", len(COLOURS) - named)]


def _in_context(rng: np.random.Generator, shots: int) -> DrawnDocument:
    document = DrawnDocument()
    kinds = [str(kind) for kind in rng.choice(CLASS_NAMES, 2, replace=False)]
    words = [str(word) for word in rng.choice(MADE_UP, 2, replace=False)]
    # Every solved scene shows the one or the other, the asked one either, but one that was solved before.
    order = [int(rng.integers(0, 2))]
    order += [1 - order[0]] * (shots > 1) + [int(rng.integers(0, 2)) for _ in range(shots - 2)]
    order = [order[i] for i in rng.permutation(len(order))][:shots]
    asked = order[int(rng.integers(0, shots))] if shots else int(rng.integers(0, 2))
    for place, which in enumerate([*order, asked]):
        canvas, _ = _draw(rng, [(kinds[which], str(rng.choice(COLOURS)))])
        document.image(canvas)
        last = place == len(order)
        choices = 2 if shots else len(MADE_UP)
        document.say([Statement("this is a", words[which], "in_context" if last else "", choices)])
    return document


def words() -> list[str]:
    """Every word of the documents, sorted."""
    fixed = [
        "the",
        "is",
        "one",
        "a",
        "number",
        "of",
        "objects",
        "has",
        "on",
        "its",
        "in",
        "picture",
        "was",
        "this",
        ".",
        "and",
        "it",
        "middle",
    ]
    return sorted({*fixed, *CLASS_NAMES, *COLOURS, *NUMBERS, *ORDINALS, *SIDES, *MADE_UP})


def write_tokenizer(folder: Path) -> None:
    """Word-level tokenizer with the tokens of IDEFICS; the two image tokens come after the base vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = ["<unk>", "<s>", "</s>", "<pad>", *words()]
    base += [f"<unused{number}>" for number in range(VOCAB_SIZE - len(base))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(base)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.add_special_tokens(["<fake_token_around_image>", "<image>"])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    names = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    write_atomically(folder / "tokenizer_config.json", (json.dumps(names, indent=1) + "\n").encode())


def records(seed: int, numbers: range) -> Iterator[dict[str, Any]]:
    """Documents as records of the published schema."""
    for number in numbers:
        yield draw_document(seed, number).record(f"demo://{seed}/{number}")


def _draw_records(seed: int, numbers: range) -> list[dict[str, Any]]:
    return list(records(seed, numbers))


def write_records(path: Path, seed: int, numbers: range) -> None:
    """Write records as Parquet, atomically; drawn by as many processes as there are cores."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = pa.schema(
        [
            ("images", pa.list_(pa.binary())),
            ("texts", pa.list_(pa.string())),
            ("metadata", pa.string()),
            ("general_metadata", pa.string()),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = pa.BufferOutputStream()
    chunks = [range(n, min(n + 256, numbers.stop)) for n in range(numbers.start, numbers.stop, 256)]
    workers = min(len(chunks), os.cpu_count() or 1)
    draw = partial(_draw_records, seed)
    with parquet.ParquetWriter(stream, schema) as writer, ExitStack() as stack:
        drawn = map(draw, chunks)
        if workers > 1:
            # Spawned, not forked: the caller may run threads.
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
            )
            drawn = pool.map(draw, chunks)
        for rows in drawn:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    write_atomically(path, stream.getvalue().to_pybytes())


def write_demo(out: str | Path, *, train: int = 8192, val: int = 512, seed: int = 0) -> None:
    """Write records, tokenizer and shards; what is there from an earlier run with the same arguments stays.

    Raises:
        ValueError: counts out of range, or ``out`` holds a demo made with other arguments.
    """
    from ..documents.build import convert
    from ..documents.options import ConvertOptions
    from ..documents.records import Filters

    if train < 1 or val < 0 or seed < 0:
        raise ValueError(
            f"train={train}, val={val}, seed={seed} given, expected train >= 1, val >= 0, seed >= 0"
        )
    out = Path(out)
    made_with = {"format": 2, "kind": "interleaved", "train": train, "val": val, "seed": seed}
    marker = out / "demo.json"
    if marker.exists():
        if json.loads(marker.read_text()) != made_with:
            raise ValueError(f"{out} holds another demo than {made_with}; remove it or choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other data; choose another folder for the demo")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, (json.dumps(made_with) + "\n").encode())
    for folder in (out, out / "records"):
        sweep(folder)
    write_tokenizer(out / "tokenizer")
    options = ConvertOptions(str(out / "tokenizer"), filters=Filters.none(), records_per_shard=1024)
    for split, first, count in (("train", 0, train), ("val", VAL_START, val)):
        if count == 0:
            continue
        file = out / "records" / f"{split}.parquet"
        if not file.exists():
            write_records(file, seed, range(first, first + count))
        convert(str(file), out / split, options, workers=2)
