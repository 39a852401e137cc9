"""``interloom eval task=caption``: captions of pictures, scored by CIDEr (COCO, Flickr30k)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..data.report import SkipReport
from .caption_data import find_captions
from .cider import cider, require_packages
from .few_shot import Sample, Template, check_choice, file_name, named, plans, shot_counts
from .idefics_model import Writer, embed_pictures, load_idefics, write_all
from .ranks import runs_on_ranks
from .results import losses, require_some, write_predictions

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
    make = partial(plans, template, solved, counts, seed=seed, text_examples=text_examples)
    make(choice="random")
    model, processor = load_idefics(checkpoint, dtype)
    report = SkipReport()
    embeddings = None
    if choice == "rices" and max(counts):
        embeddings = embed_pictures([*solved, *samples], encoder, model, processor, report)
    writer = Writer(
        model,
        processor,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        stops=STOPS,
        image_attention=image_attention,
    )
    scores: dict[str, float] = {}
    prompts = make(choice=choice, embeddings=embeddings)
    for count, plan in prompts.items():
        written = write_all(writer, plan, samples, batch_size, report)
        said = [(text, sample) for text, sample in zip(written, samples, strict=True) if text is not None]
        require_some(len(said), len(samples), report)
        judged = [(text, sample.answers) for text, sample in said if sample.answers]
        part = {"caption/images": float(len(judged))}
        if judged:
            part["caption/cider"] = 100 * cider(*zip(*judged, strict=True))[0]
        scores |= named(part, count, len(prompts) > 1)
        rows = [
            {"image_id": name, "caption": text}
            for name, text in zip(found.ids, written, strict=False)
            if text is not None
        ]
        write_predictions(output_dir, file_name("captions", count, len(prompts) > 1), rows)
    return scores | losses(report, "caption")
