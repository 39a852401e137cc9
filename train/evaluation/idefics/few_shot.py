"""Prompts with solved examples before the question, and how the examples are chosen.

A template is a text with ``<image>`` where the picture stands and a field in braces for what a sample says, the last
of which is the answer: ``"Image:<image>Question: {question} Answer: {answer}\\n"``. Each example is the template filled
in; the question is the template up to its answer. Templates, order of examples, and zero shots being two examples
*without* their images are those of the published evaluation (Laurençon et al., "OBELICS", NeurIPS 2023, appendix, and
Alayrac et al., "Flamingo", NeurIPS 2022).

Examples are drawn at random for each question, drawn once for all (``fixed``), or those whose images are most like the
question's (``rices``: Yang et al., AAAI 2022), the most similar last. A question's own picture is never an example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from ...data.decode import decode_file
from ...data.report import BadSample, SkipReport

IMAGE = "<image>"
CHOICES = ("random", "fixed", "rices")
SHOTS = (0, 4, 8, 16, 32)
_SPECIAL = re.compile(r"<image>|<fake_token_around_image>|<end_of_utterance>|</?s>|<unk>|<pad>")
_OPENED = 64


@dataclass(frozen=True)
class Sample:
    """One picture with what is said about it.

    Attributes:
        name: for messages.
        image: file of the picture; None where it could not be found.
        fields: what a template's fields stand for, the answer left out.
        answers: every answer there is; empty where none is known.
        shown: the answer that is given where the sample is an example.
        group: sort of question, for scores of its own; "" for none.
    """

    name: str
    image: Path | None
    fields: Mapping[str, str] = field(default_factory=dict)
    answers: Sequence[str] = ()
    shown: str = ""
    group: str = ""


class Template:
    """A prompt's wording.

    Args:
        example: see the module; ``\\n`` written out means a line break.
        prefix: before everything.
        fields: names it may use; the last is the answer.

    Raises:
        ValueError: there is not exactly one image, the answer is missing, or a field is not known.
    """

    def __init__(self, example: str, prefix: str, fields: Sequence[str]) -> None:
        self.example, self.prefix = (text.replace("\\n", "\n") for text in (example, prefix))
        self.fields, self.answer = list(fields), fields[-1]
        given = f"prompt={example!r}"
        try:
            used = [name for _, name, _, _ in Formatter().parse(self.example) if name is not None]
        except ValueError as error:
            raise ValueError(
                f"{given} is not a template ({error}); write braces as {{{{ and }}}}."
            ) from error
        if self.example.count(IMAGE) != 1 or used.count(self.answer) != 1 or not set(used) <= set(fields):
            raise ValueError(
                f"{given} does not fit; write {IMAGE} once, {{{self.answer}}} once, and of fields only "
                f"{', '.join(f'{{{name}}}' for name in fields)}."
            )
        before, _, self.suffix = self.example.partition(f"{{{self.answer}}}")
        if IMAGE not in before:
            raise ValueError(f"{given} has {IMAGE} after the answer; put it before.")
        self.question = before.rstrip()

    def parts(self, sample: Sample, picture: Any, answer: str | None) -> list[Any]:
        """A sample as texts and its picture.

        Args:
            sample: what is said.
            picture: anything the processor takes; None leaves it out.
            answer: None asks for it.
        """
        values = {name: clean(sample.fields.get(name, "")) for name in self.fields[:-1]}
        text = self.question if answer is None else self.example
        before, after = text.split(IMAGE)
        values[self.answer] = clean(answer or "")
        before, after = before.format(**values), after.format(**values)
        return [before + after] if picture is None else [before, picture, after]


def clean(text: str) -> str:
    """A data set's text without what would pass for a special token."""
    return " ".join(_SPECIAL.sub("", text).split())


def join(items: Sequence[Any]) -> list[Any]:
    """Texts and pictures with neighbouring texts made one and empty ones left out."""
    joined: list[Any] = []
    for item in items:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        elif not isinstance(item, str) or item:
            joined.append(item)
    return joined


@dataclass
class Support:
    """Where examples come from.

    Args:
        samples: solved ones.
        choice: one of :data:`CHOICES`.
        seed: of the draws.
        embeddings: file to unit vector [P], for ``rices``; pictures it lacks are no examples.

    Raises:
        ValueError: the choice is not known.
    """

    samples: Sequence[Sample]
    choice: str = "random"
    seed: int = 0
    embeddings: Mapping[Path, np.ndarray] | None = None

    def __post_init__(self) -> None:
        check_choice(self.choice)
        if self.choice == "rices":
            found = self.embeddings or {}
            self._rows = [i for i, sample in enumerate(self.samples) if sample.image in found]
            vectors = [
                found[sample.image] for i in self._rows if (sample := self.samples[i]).image is not None
            ]
            self._matrix = np.stack(vectors) if vectors else np.zeros((0, 1), np.float32)

    def candidates(self, number: int, query: Sample) -> Iterator[Sample]:
        """Examples for question ``number``, the preferred first."""
        for index in self._order(number, query):
            sample = self.samples[index]
            if sample.image is None or sample.image != query.image:
                yield sample

    def _order(self, number: int, query: Sample) -> Iterator[int]:
        if self.choice == "rices":
            own = None if query.image is None else (self.embeddings or {}).get(query.image)
            if own is None:
                return
            for row in _descending(self._matrix @ own):
                yield self._rows[row]
            return
        # Counted from the question, not from a generator's state: the same whatever the ranks and batches.
        key = [self.seed] if self.choice == "fixed" else [self.seed, number]
        generator, count = np.random.default_rng(key), len(self.samples)
        drawn: set[int] = set()
        while len(drawn) < min(count, 1000):
            index = int(generator.integers(count))
            if index not in drawn:
                drawn.add(index)
                yield index


def _descending(values: np.ndarray, first: int = 256) -> Iterator[int]:
    """Places of [N] values, the largest first; the rest is sorted only if it is asked for."""
    if len(values) > first:
        best = np.argpartition(-values, first)[:first]
        yield from best[np.lexsort((best, -values[best]))].tolist()
        values = values.copy()
        values[best] = np.inf
    for place in np.argsort(-values, kind="stable")[first if len(values) > first else 0 :]:
        yield int(place)


class Prompts:
    """Questions with their examples, as the processor takes them.

    Args:
        template: the wording.
        support: None where there is none.
        shots: examples before each question.
        text_examples: examples without images where ``shots`` is 0.

    Raises:
        ValueError: there are too few examples.
    """

    def __init__(self, template: Template, support: Support | None, shots: int, text_examples: int) -> None:
        self.template, self.support, self.shots = template, support, shots
        self.texts = text_examples if shots == 0 and support is not None else 0
        have = 0 if support is None else len(support.samples)
        if shots < 0 or text_examples < 0:
            raise ValueError(f"shots={shots} and text_examples={text_examples} must be 0 or more.")
        if max(shots, self.texts) > have:
            raise ValueError(
                f"shots={shots} needs {max(shots, self.texts)} examples but the support has {have}; give support=… "
                "with more, or fewer shots."
            )

    def __call__(self, number: int, query: Sample, report: SkipReport) -> list[Any] | None:
        """Texts and pictures of one question, or None, reported, where its picture or its examples are not to be
        had.
        """
        template = self.template
        picture = open_picture(query, report)
        if picture is None:
            return None
        examples: list[list[Any]] = []
        for sample in self._text_examples(query):
            examples.append(template.parts(sample, None, sample.shown))
        for sample in self.support.candidates(number, query) if self.support and self.shots else ():
            seen = open_picture(sample, report, what="example")
            if seen is not None:
                examples.append(template.parts(sample, seen, sample.shown))
            if len(examples) == self.shots:
                break
        if self.shots and len(examples) < self.shots:
            report.add("too few usable examples", query.name)
            return None
        if self.support is not None and self.support.choice == "rices":
            examples.reverse()
        question = template.parts(query, picture, None)
        return join([template.prefix, *(part for example in examples for part in example), *question])

    def _text_examples(self, query: Sample) -> list[Sample]:
        """The first of the support, for every question alike, but of another picture."""
        found: list[Sample] = []
        for sample in self.support.samples if self.support is not None and self.texts else ():
            if len(found) == self.texts:
                break
            if sample.image is None or sample.image != query.image:
                found.append(sample)
        return found


def plans(
    template: Template,
    solved: Sequence[Sample],
    counts: Sequence[int],
    *,
    choice: str,
    seed: int,
    text_examples: int,
    embeddings: Mapping[Path, np.ndarray] | None = None,
) -> dict[int, Prompts]:
    """:class:`Prompts` of every number of shots.

    Raises:
        ValueError: there are too few examples for one of them.
    """
    support = Support(solved, choice, seed, embeddings) if solved else None
    return {count: Prompts(template, support, count, text_examples) for count in counts}


def open_picture(sample: Sample, report: SkipReport, what: str = "question") -> np.ndarray | None:
    """Pixels uint8 [H, W, 3], or None after a line in the report; ``what`` says whose picture was lost."""
    if sample.image is None:
        report.add(f"{what} without its image", sample.name)
        return None
    try:
        return _decoded(sample.image, sample.image.stat().st_mtime_ns)
    except (BadSample, OSError) as error:
        reason = error.reason if isinstance(error, BadSample) else "unreadable file"
        report.add(f"{what} with a broken image", str(sample.image), reason)
        return None


@lru_cache(_OPENED)
def _decoded(path: Path, changed: int) -> np.ndarray:
    return decode_file(path)


def check_choice(choice: str) -> None:
    """
    Raises:
        ValueError: there is no such way to choose examples.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice={choice!r} is not known; use {', '.join(CHOICES)}.")


def shot_counts(shots: int | Sequence[int]) -> list[int]:
    """``shots`` as a list, each number once.

    Raises:
        ValueError: it holds something that is no number of examples, or nothing.
    """
    counts = [shots] if isinstance(shots, int) else list(shots)
    if not counts or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"shots={shots} given; give a number such as 4, or a list such as {list(SHOTS)}.")
    return list(dict.fromkeys(counts))


def named(scores: Mapping[str, float], shots: int, several: bool) -> dict[str, float]:
    """Scores under names that tell numbers of shots apart where there are several."""
    return {f"{name}_{shots}_shots" if several else name: value for name, value in scores.items()}


def file_name(name: str, shots: int, several: bool) -> str:
    """As :func:`named`, of a file."""
    return f"{name}_{shots}_shots" if several else name
