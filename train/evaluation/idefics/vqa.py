"""``interloom eval task=vqa``: questions about pictures, answered in free text (VQAv2, OK-VQA, TextVQA, VizWiz)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ...data.report import SkipReport
from ..ranks import runs_on_ranks
from ..results import losses, write_predictions
from .few_shot import Sample, Template, check_choice, file_name, named, shot_counts
from .open_ended import write_with_shots
from .vqa_answers import normalise_answer, normalised_accuracy, official_accuracy
from .vqa_data import find_questions

# Wording and stop words of the published evaluation of IDEFICS.
EXAMPLE = "Image:<image>Question: {question} Answer: {answer}\n"
PREFIXES = {
    "vqa": "Instruction: provide an answer to the question. Use the image to answer.\n",
    "vizwiz": "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n",
}
STOPS = (
    "Question",
    "User",
    "Image",
    "task",
    "What",
    "Who",
    "When",
    "Where",
    "Why",
    "How",
    "<end_of_utterance>",
)


def vqa_scores(pairs: Sequence[tuple[str, Sample]]) -> dict[str, float]:
    """Mean accuracies of answers, over all questions and over those of each sort."""
    scores: dict[str, float] = {"vqa/questions": float(len(pairs))}
    if not pairs:
        return scores
    official = [official_accuracy(answer, sample.answers) for answer, sample in pairs]
    always = [normalised_accuracy(answer, sample.answers) for answer, sample in pairs]
    scores["vqa/accuracy"] = sum(official) / len(pairs)
    scores["vqa/accuracy_normalised"] = sum(always) / len(pairs)
    groups: dict[str, list[float]] = defaultdict(list)
    for (_, sample), value in zip(pairs, official, strict=True):
        if sample.group:
            groups[sample.group.replace("/", "_").replace(" ", "_")].append(value)
    return scores | {f"vqa/accuracy/{name}": sum(v) / len(v) for name, v in sorted(groups.items())}


@runs_on_ranks
def run(
    *,
    checkpoint: str,
    output_dir: str | Path,
    data: str | None = None,
    split: str = "val",
    questions: str | None = None,
    annotations: str | None = None,
    images: str | None = None,
    shots: int | Sequence[int] = 0,
    choice: str = "random",
    support: str | None = None,
    support_split: str = "train",
    support_questions: str | None = None,
    support_annotations: str | None = None,
    support_images: str | None = None,
    support_limit: int | None = None,
    encoder: str | None = None,
    text_examples: int = 2,
    seed: int = 0,
    prompt: str | None = None,
    prefix: str | None = None,
    max_new_tokens: int = 15,
    num_beams: int = 3,
    image_attention: str = "latest",
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "auto",
) -> dict[str, float]:
    """The task of ``conf/task/vqa.yaml``, whose comments say what the options are.

    Returns:
        ``vqa/accuracy`` (the data set's own code), ``vqa/accuracy_normalised`` (texts normalised always),
        ``vqa/accuracy/SORT``, ``vqa/questions`` that were scored, ``vqa/skipped`` losses of any kind. Answers go to
        ``predictions.json`` in the format that servers of the data sets take.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the data are missing or do not fit.
    """
    if data is None:
        raise ValueError(
            "data is not set; give data=FOLDER with the JSON files and pictures of the data set."
        )
    counts = shot_counts(shots)
    check_choice(choice)
    found = find_questions(data, split, questions, annotations, images)
    samples = found.samples[:limit]
    prefix = PREFIXES.get(found.kind, PREFIXES["vqa"]) if prefix is None else prefix
    template = Template(prompt or EXAMPLE, prefix, ["question", "answer"])
    solved: list[Sample] = []
    if max(counts) or support is not None or support_questions is not None:
        files = (support_questions, support_annotations, support_images or images)
        solved = find_questions(support or data, support_split, *files).samples
        solved = [sample for sample in solved if sample.answers][:support_limit]
    report = SkipReport()
    rounds = write_with_shots(
        template,
        samples,
        solved,
        counts,
        report,
        checkpoint=checkpoint,
        dtype=dtype,
        choice=choice,
        encoder=encoder,
        text_examples=text_examples,
        seed=seed,
        stops=STOPS,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        image_attention=image_attention,
        batch_size=batch_size,
    )
    scores: dict[str, float] = {}
    several = len(counts) > 1
    for count, answers in rounds:
        answered = [(a, sample) for a, sample in zip(answers, samples, strict=True) if a is not None]
        part = vqa_scores([(answer, sample) for answer, sample in answered if sample.answers])
        scores |= named(part, count, several)
        key = "image" if found.kind == "vizwiz" else "question_id"
        rows = [
            {key: name, "answer": normalise_answer(answer)}
            for name, answer in zip(found.ids, answers, strict=False)
            if answer is not None
        ]
        write_predictions(output_dir, file_name("predictions", count, several), rows)
    return scores | losses(report, "vqa")
