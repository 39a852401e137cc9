"""Classification by an IDEFICS: the class whose name it finds most likely after the picture.

The prompt, examples included, is read once for a picture; all class names are scored behind its cached keys
(:mod:`...models.idefics.scoring`). What is cached is exactly the tokens that all classes share, so scores are those of
the whole texts, each written out and read on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....models.idefics.generation.scoring import score_continuations
from ....models.idefics.processing import FAKE_TOKEN
from ...checkpointing.load import load_idefics
from ...data.report import SkipReport
from ..progress import track
from ..ranks import gathered_in_order, runs_on_ranks, share
from ..results import losses, require_some
from .few_shot import IMAGE, Prompts, Sample, Template, check_choice, clean, named, plans, shot_counts
from .model import embed_pictures, prefetched

if TYPE_CHECKING:
    from ....models.idefics import IdeficsForVisionText2Text, IdeficsProcessor

# Wording of the published evaluation on ImageNet.
EXAMPLE = "<image>a photo of a {class_name}."


class ClassScorer:
    """Log-probabilities of class names after prompts.

    Args:
        model, processor: of one checkpoint.
        template: its text after the picture, the rest of the line included, is what is scored.
        names: of the classes.
        image_attention: ``latest`` or ``all_previous``.
        tokens_at_once: of class names read together.
    """

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        processor: IdeficsProcessor,
        template: Template,
        names: Sequence[str],
        *,
        image_attention: str = "latest",
        tokens_at_once: int = 512,
    ) -> None:
        self.model, self.processor = model, processor
        self.image_attention, self.tokens_at_once = image_attention, tokens_at_once
        tail = template.example.partition(IMAGE)[2].strip()
        texts = [FAKE_TOKEN + tail.format(class_name=clean(name)) for name in names]
        # Tokenised behind the token that ends a picture, as they stand in the prompt.
        rows = [ids[1:] for ids in processor.tokenizer.rows(texts)]
        places = zip(*(ids[:-1] for ids in rows), strict=False)
        common = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, places)]
        self.shared = torch.tensor(common, dtype=torch.long)
        self.names = [ids[len(common) :] for ids in rows]

    def inputs(self, prompts: Sequence[list[Any]]) -> Any:
        """Model inputs of prompts up to where the class names part, still on the CPU."""
        cut = [prompt[: -1 if isinstance(prompt[-1], str) else None] for prompt in prompts]
        inputs = self.processor(
            cut,
            padding_side="left",
            image_attention=self.image_attention,
            add_end_of_utterance_token=False,
        )
        rows, more = len(cut), len(self.shared)
        inputs["input_ids"] = torch.cat((inputs["input_ids"], self.shared.expand(rows, -1)), 1)
        for name in ("attention_mask", "image_attention_mask"):
            value = inputs[name]
            last = value[:, -1:].expand(-1, more, *value.shape[2:])
            inputs[name] = torch.cat((value, last), 1)
        return inputs

    def __call__(self, inputs: Any) -> torch.Tensor:
        """Log-probabilities float64 [B, classes], up to what is the same for all classes."""
        given = dict(inputs.to(self.model.device).items())
        return score_continuations(self.model, self.names, tokens_at_once=self.tokens_at_once, **given).cpu()


def rank_classes(
    scorer: ClassScorer, prompts: Prompts, samples: Sequence[Sample], *, batch_size: int, report: SkipReport
) -> list[list[int] | None]:
    """The five most likely classes of every picture, the best first; None where it was not to be had."""
    batches = share(len(samples), batch_size)

    def prepare(rows: range) -> tuple[list[int], Any]:
        made = {row: prompts(row, samples[row], report) for row in rows}
        usable = {row: prompt for row, prompt in made.items() if prompt is not None}
        return list(usable), scorer.inputs(list(usable.values())) if usable else None

    found: dict[int, list[int] | None] = {row: None for rows in batches for row in rows}
    for rows, inputs in track(prefetched(batches, prepare), "classifying", len(batches)):
        if rows:
            order = scorer(inputs).sort(dim=1, descending=True, stable=True).indices[:, :5]
            found |= zip(rows, order.tolist(), strict=True)
    return gathered_in_order(found, len(samples))


@runs_on_ranks
def classify(
    *,
    checkpoint: str,
    images: Sequence[tuple[Path, int]],
    solved: Sequence[tuple[Path, int]],
    names: Sequence[str],
    shots: int | Sequence[int] = 0,
    choice: str = "random",
    support_limit: int | None = None,
    encoder: str | None = None,
    text_examples: int = 0,
    seed: int = 0,
    prompt: str | None = None,
    prefix: str = "",
    image_attention: str = "latest",
    batch_size: int = 8,
    dtype: str = "auto",
) -> dict[str, float]:
    """Scores of :mod:`.classification` by log-probability; its ``run`` says what the options are.

    Args:
        images: path and class of the pictures to classify.
        solved: of those that examples are chosen from.
        names: of the classes.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing or does not fit, or there are too few examples.
    """
    counts = shot_counts(shots)
    check_choice(choice)
    template = Template(prompt or EXAMPLE, prefix, ["class_name"])
    samples = [Sample(str(path), path, {}, [names[label]], names[label]) for path, label in images]
    examples = [Sample(str(path), path, {}, [names[label]], names[label]) for path, label in solved]
    if support_limit is not None:
        # Evenly spread, so that a limited support holds every class it can.
        examples = examples[:: max(len(examples) // support_limit, 1)][:support_limit]
    plans(template, examples, counts, choice="random", seed=seed, text_examples=text_examples)
    model, processor = load_idefics(checkpoint, dtype)
    report = SkipReport()
    embeddings = None
    if choice == "rices" and max(counts):
        embeddings = embed_pictures([*examples, *samples], encoder, model, processor, report)
    scorer = ClassScorer(model, processor, template, names, image_attention=image_attention)
    prompts = plans(
        template,
        examples,
        counts,
        choice=choice,
        seed=seed,
        text_examples=text_examples,
        embeddings=embeddings,
    )
    scores: dict[str, float] = {}
    for count, plan in prompts.items():
        ranked = rank_classes(scorer, plan, samples, batch_size=batch_size, report=report)
        judged = [(best, label) for best, (_, label) in zip(ranked, images, strict=True) if best is not None]
        require_some(len(judged), len(samples), report)
        part = {
            "classification/top1": sum(best[0] == label for best, label in judged) / len(judged),
            "classification/top5": sum(label in best for best, label in judged) / len(judged),
            "classification/images": float(len(judged)),
        }
        scores |= named(part, count, len(prompts) > 1)
    return {**scores, "classification/chance": 1.0 / len(names), **losses(report, "classification")}
