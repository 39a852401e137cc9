"""Does the language model look? Accuracy of answers with the right images, with others, and with none.

The interleaved demo's documents contain words that only their images give away (see
:mod:`...data.drawn.documents`). One forward pass over a document predicts all of its answers, each from the text
and images before it. The same documents are then shown with the images of other documents, and without images:
a model that merely learnt the language answers all three alike. *Chance* is the accuracy of a guess among the
equally likely words.

``in_context_K``: two made-up words stand for two kinds of object within one document; K solved scenes precede
the question, which one of them answers. With one the answer is that one's word; with four two words were seen, and
which one it is only the pictures tell; with none, only chance is possible: one of ten words.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ....models.idefics.image_mask import image_attention_mask
from ....models.pictures import load_rgb
from ...data.documents.dataset import read_document
from ...data.documents.records import Document, Picture
from ...data.documents.tokenization import DocumentTokenizer
from ...data.drawn.documents import VAL_START, draw_document
from ...data.shards.reader import ShardReader, ShardSet
from ...files import open_atomically
from ...runs import METRICS_TABLE
from ..pictures.curves import draw_curves

MAIN_KINDS = ("colour", "class")
CONDITIONS = ("right", "shuffled", "none")
SHOTS = (0, 1, 4)


@dataclass(frozen=True)
class Asked:
    """One document with its answers.

    Attributes:
        parts: texts, and None for images.
        images: Pillow images in order.
        ids: token ids.
        starts: positions of the images' opening tokens.
        answers: (kind, position of the answer token, number of equally likely words).
    """

    parts: list[str | None]
    images: list[Image.Image]
    ids: list[int]
    starts: list[int]
    answers: list[tuple[str, int, int]]


def ask(
    parts: list[str | None],
    images: list[bytes],
    questions: list[dict[str, Any]],
    tokenizer: DocumentTokenizer,
) -> Asked:
    """Find where the answers of a document stand among its tokens."""
    written = tuple(Picture(None) if part is None else part for part in parts)
    ids, starts = tokenizer.encode(Document("", written))
    answers = []
    for question in questions:
        text = parts[question["part"]]
        assert text is not None
        before = (*written[: question["part"]], text[: question["start"]])
        position = len(tokenizer.encode(Document("", before))[0]) - 1  # without the end token
        word = text[question["start"] : question["end"]]
        if tokenizer.encode_text(word) != [ids[position]]:
            raise ValueError(f"answer {word!r} is not one token of the tokenizer at {tokenizer.path}")
        answers.append((question["kind"], position, question["choices"]))
    pictures = [load_rgb(data) for data in images]
    return Asked(parts, pictures, ids, starts, answers)


def held_out(folder: Path, tokenizer: DocumentTokenizer, limit: int) -> list[Asked]:
    """Held-out documents of a demo folder."""
    return marked(ShardSet.open([str(folder / "val")], kind="documents"), tokenizer, limit)


def marked(shards: ShardSet, tokenizer: DocumentTokenizer, limit: int) -> list[Asked]:
    """Those of the first ``limit`` documents whose metadata mark answers (``questions``)."""
    reader = ShardReader(shards)
    found = []
    for sample in range(min(limit, len(shards))):
        record = reader.read(sample)
        content = read_document(record)
        questions = _questions(content.get("general_metadata"))
        if not questions:
            continue
        names = sorted((n for n in record.members if n != "json"), key=lambda name: int(name.split(".")[0]))
        found.append(ask(content["texts"], [bytes(record.members[n]) for n in names], questions, tokenizer))
    return found


def _questions(metadata: Any) -> list[dict[str, Any]]:
    """The marked answers in a document's metadata, which may be anything."""
    try:
        values = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        return []
    questions = values.get("questions") if isinstance(values, dict) else None
    wanted = {"kind", "part", "start", "end", "choices"}
    return (
        questions
        if isinstance(questions, list) and all(isinstance(q, dict) and wanted <= q.keys() for q in questions)
        else []
    )


def in_context(shots: int, count: int, tokenizer: DocumentTokenizer) -> list[Asked]:
    """Documents of a task that is shown in context only; none of them was trained on."""
    found = []
    for number in range(count):
        document = draw_document(0, 2 * VAL_START + number, in_context=shots)
        images = [image for image in document.images if image is not None]
        found.append(ask(document.texts, images, document.questions, tokenizer))
    return found


@torch.no_grad()
def predict(
    model: Any, image_processor: Any, documents: list[Asked], pixels: list[Tensor | None]
) -> list[list[int]]:
    """The most likely token at every answer of a batch.

    Args:
        pixels: for each document [N, 3, S, S], or None to show no image.
    """
    length = max(len(document.ids) for document in documents)
    slots = max(1, max(len(document.starts) for document in documents))
    size = image_processor.image_size
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    owner = torch.full((len(documents), length), -1)
    with_images = torch.zeros(len(documents), 1, 1, dtype=torch.bool)
    image_token = next((d.ids[d.starts[0] + 1] for d in documents if d.starts), -1)
    values = torch.zeros(len(documents), slots, 3, size, size)
    for row, (document, shown) in enumerate(zip(documents, pixels, strict=True)):
        count = len(document.ids)
        ids[row, :count] = torch.tensor(document.ids)
        owner[row, :count] = 0
        if shown is not None:
            values[row, : len(shown)] = shown
            with_images[row] = True
    seen = image_attention_mask(ids, image_token, None, slots, document_ids=owner).bool() & with_images
    where = next(model.parameters()).device
    logits = model(
        input_ids=ids.to(where),
        document_ids=owner.to(where),
        pixel_values=values.to(where),
        image_attention_mask=seen.to(where),
    ).logits
    return [
        [int(logits[row, position - 1].argmax()) for _, position, _ in document.answers]
        for row, document in enumerate(documents)
    ]


def _batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def answer(
    model: Any, image_processor: Any, documents: list[Asked], condition: str, batch_size: int
) -> list[list[int]]:
    """Predicted answer tokens of every document under one of :data:`CONDITIONS`."""
    pixels = [image_processor(document.images) for document in documents]
    if condition == "shuffled":
        # Each image slot of a document is filled from the next documents: never its own image.
        pool = torch.cat(pixels)
        first = 0
        for number, own in enumerate(pixels):
            own_count = len(own)
            pixels[number] = pool.roll(-(first + own_count), 0)[:own_count]
            first += own_count
    shown = [None] * len(pixels) if condition == "none" else pixels
    found = []
    for rows in _batches(len(documents), batch_size):
        found += predict(model, image_processor, [documents[i] for i in rows], [shown[i] for i in rows])
    return found


def score(documents: list[Asked], predicted: list[list[int]]) -> dict[str, float]:
    """Accuracy of each kind of answer."""
    right, asked = defaultdict(int), defaultdict(int)
    for document, tokens in zip(documents, predicted, strict=True):
        for (kind, position, _), token in zip(document.answers, tokens, strict=True):
            asked[kind] += 1
            right[kind] += token == document.ids[position]
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def evaluate_grounding(
    model: Any,
    processor: Any,
    data: Path,
    *,
    documents: int = 512,
    shots: int = 128,
    batch_size: int = 32,
    picture: Path | None = None,
) -> dict[str, float]:
    """Grounding figures of an IDEFICS on a demo folder.

    Args:
        model, processor: as loaded from a checkpoint.
        data: folder written by ``interloom data demo --kind interleaved``.
        documents, shots: held-out documents, and in-context tasks for each number of shots.
        picture: PNG of some documents with predicted answers.

    Returns:
        ``grounding/right``, ``/shuffled``, ``/none``, ``/chance`` over colour and class questions;
        ``grounding/right_KIND`` and so on for every kind; ``grounding/in_context_K``.
    """
    tokenizer = DocumentTokenizer(data / "tokenizer")
    asked = held_out(data, tokenizer, documents)
    model = model.eval()
    results: dict[str, float] = {}
    counts: dict[str, list[float]] = defaultdict(list)
    for document in asked:
        for kind, _, choices in document.answers:
            counts[kind].append(1 / choices)
    main = sum(len(counts[kind]) for kind in MAIN_KINDS)
    if not main:
        raise ValueError(f"{data} asks no colour or class questions; make it with `interloom data demo`.")
    predictions = {}
    for condition in CONDITIONS:
        predictions[condition] = answer(model, processor.image_processor, asked, condition, batch_size)
        scores = score(asked, predictions[condition])
        results[f"grounding/{condition}"] = (
            sum(scores[k] * len(counts[k]) for k in MAIN_KINDS if k in scores) / main
        )
        results |= {f"grounding/{condition}_{kind}": value for kind, value in scores.items()}
    results["grounding/chance"] = sum(sum(counts[kind]) for kind in MAIN_KINDS) / main
    results |= {
        f"grounding/chance_{kind}": sum(values) / len(values) for kind, values in sorted(counts.items())
    }
    for number in SHOTS if shots else ():
        tasks = in_context(number, shots, tokenizer)
        scores = score(tasks, answer(model, processor.image_processor, tasks, "right", batch_size))
        results[f"grounding/in_context_{number}"] = scores["in_context"]
    if picture is not None:
        draw_answers(asked, predictions["right"], tokenizer, picture)
    return results


def draw_answers(
    documents: list[Asked],
    predicted: list[list[int]],
    tokenizer: DocumentTokenizer,
    path: Path,
    rows: int = 6,
) -> None:
    """Write a PNG: documents as read, each answer as the model gives it, green where right and red where wrong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(rows, len(documents))
    columns = max(len(document.images) for document in documents[:rows])
    figure = Figure(figsize=(3.3 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        document, place = documents[row], -1
        for axis in axes[row]:
            axis.axis("off")
        wrong = {
            position: token for (_, position, _), token in zip(document.answers, predicted[row], strict=True)
        }
        boundaries = [*document.starts, len(document.ids)]
        for place, image in enumerate(document.images):
            axis = axes[row][place]
            axis.imshow(image)
            lines, colours = [], []
            line = ""
            for position in range(boundaries[place] + 3, boundaries[place + 1]):
                token = document.ids[position]
                if token in (tokenizer.eos_id, tokenizer.around_id):
                    continue
                line += " " + tokenizer.decode([token])
                if position in wrong:
                    said = tokenizer.decode([wrong[position]])
                    right = wrong[position] == token
                    lines.append(line.strip() if right else f"{line.strip()} — says {said}")
                    colours.append("#1a7f37" if right else "#b42318")
                    line = ""
                elif line.strip() == ".":
                    line = ""
            for number, (text, colour) in enumerate(zip(lines, colours, strict=True)):
                axis.text(
                    0.0,
                    -0.06 - 0.11 * number,
                    text,
                    color=colour,
                    fontsize=8,
                    va="top",
                    transform=axis.transAxes,
                )
    with open_atomically(path) as file:
        figure.savefig(file, dpi=110, format="png")


def run(
    *,
    checkpoint: str,
    data: str,
    output_dir: Path,
    documents: int = 512,
    shots: int = 128,
    batch_size: int = 32,
) -> dict[str, float]:
    """Evaluate a checkpoint; writes ``grounding.png`` into ``output_dir``, and ``curves.png`` where a run is."""
    from ...checkpointing.load import load_pretrained

    model, processor = load_pretrained(checkpoint)
    folder = Path(data)
    if not (folder / "val").is_dir():
        raise FileNotFoundError(
            f"data={data} holds no val folder; make it with `interloom data demo --kind interleaved --out {data}`."
        )
    if (Path(output_dir) / METRICS_TABLE).exists():
        draw_curves(Path(output_dir))
    return evaluate_grounding(
        model,
        processor,
        folder,
        documents=documents,
        shots=shots,
        batch_size=batch_size,
        picture=Path(output_dir) / "grounding.png",
    )
