"""``interloom eval task=caption``: captions of pictures, scored by CIDEr (COCO, Flickr30k)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.report import SkipReport
from ..ranks import runs_on_ranks
from ..results import losses, write_predictions
from .caption_data import find_captions
from .cider import cider, require_packages
from .few_shot import Sample, Template, check_choice, file_name, named, shot_counts
from .open_ended import write_with_shots

# Wording and stop words of the published evaluation of IDEFICS.
EXAMPLE = "Image:<image>Caption: {caption}\n"
STOPS = ("Caption", "Description", "User", "Image", "task", "<end_of_utterance>")


@runs_on_ranks
def run(
    *,
    checkpoint: str,
    output_dir: str | Path,
    data: str | None = None,
    split: str = "test",
    annotations: str | None = None,
    images: str | None = None,
    shots: int | Sequence[int] = 0,
    choice: str = "random",
    support: str | None = None,
    support_split: str = "train",
    support_annotations: str | None = None,
    support_images: str | None = None,
    support_limit: int | None = None,
    encoder: str | None = None,
    text_examples: int = 2,
    seed: int = 0,
    prompt: str | None = None,
    prefix: str = "",
    max_new_tokens: int = 15,
    num_beams: int = 3,
    image_attention: str = "latest",
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "auto",
) -> dict[str, float]:
    """The task of ``conf/task/caption.yaml``, whose comments say what the options are.

    Returns:
        ``caption/cider`` in points (times 100, as it is published), ``caption/images`` that were scored and
        ``caption/skipped`` losses of any kind. Captions go to ``captions.json`` in COCO's results format.

    Raises:
        FileNotFoundError, ValueError: a package, the checkpoint or the data are missing or do not fit.
    """
    if data is None:
        raise ValueError("data is not set; give data=FOLDER with a file of captions and the pictures.")
    require_packages()
    counts = shot_counts(shots)
    check_choice(choice)
    found = find_captions(data, split, annotations, images, seed)
    samples = found.samples[:limit]
    template = Template(prompt or EXAMPLE, prefix, ["caption"])
    solved: list[Sample] = []
    if max(counts) or support is not None or support_annotations is not None:
        where = (support_annotations or (annotations if support is None else None), support_images or images)
        solved = find_captions(support or data, support_split, *where, seed).samples
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
    for count, written in rounds:
        said = [(text, sample) for text, sample in zip(written, samples, strict=True) if text is not None]
        judged = [(text, sample.answers) for text, sample in said if sample.answers]
        part = {"caption/images": float(len(judged))}
        if judged:
            part["caption/cider"] = 100 * cider(*zip(*judged, strict=True))[0]
        scores |= named(part, count, several)
        rows = [
            {"image_id": name, "caption": text}
            for name, text in zip(found.ids, written, strict=False)
            if text is not None
        ]
        write_predictions(output_dir, file_name("captions", count, several), rows)
    return scores | losses(report, "caption")
