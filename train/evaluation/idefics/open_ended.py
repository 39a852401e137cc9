"""What tasks share in which a model writes freely after a few solved examples: questions, captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ...checkpointing.load import load_idefics
from ...data.report import SkipReport
from ..results import require_some
from .few_shot import Sample, Template, plans
from .model import Writer, embed_pictures, write_all


def write_with_shots(
    template: Template,
    samples: list[Sample],
    solved: list[Sample],
    counts: Sequence[int],
    report: SkipReport,
    *,
    checkpoint: str,
    dtype: str,
    choice: str,
    encoder: str | None,
    text_examples: int,
    seed: int,
    stops: Sequence[str],
    max_new_tokens: int,
    num_beams: int,
    image_attention: str,
    batch_size: int,
) -> Iterator[tuple[int, list[str | None]]]:
    """Have every sample answered with each number of examples.

    Args:
        samples: asked about.
        solved: examples are chosen from these, as ``choice`` says.
        counts: numbers of examples, one round each.
        report: takes what is skipped.

    Yields:
        A number of examples, and the texts in the order of ``samples``; None where a picture could not be read.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the examples do not fit, or no sample could be answered.
    """
    make = partial(plans, template, solved, counts, seed=seed, text_examples=text_examples)
    make(choice="random")  # too few examples are an error before the model is loaded
    model, processor = load_idefics(checkpoint, dtype)
    embeddings = None
    if choice == "rices" and max(counts):
        embeddings = embed_pictures([*solved, *samples], encoder, model, processor, report)
    writer = Writer(
        model,
        processor,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        stops=stops,
        image_attention=image_attention,
    )
    for count, plan in make(choice=choice, embeddings=embeddings).items():
        texts = write_all(writer, plan, samples, batch_size, report)
        require_some(sum(text is not None for text in texts), len(samples), report)
        yield count, texts
