"""``interloom segment``: name the segments of one image and draw them over it, with a legend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..messages import show


def segment(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    labels: Annotated[
        str,
        typer.Option(help='Names to look for: "cat,dog", a text file with one a line, or voc, context, …'),
    ],
    checkpoint: Annotated[
        str, typer.Option(help="Run directory, .ckpt, save_pretrained folder or hub id of a GroupViT.")
    ] = "runs/groupvit_demo/latest",
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("overlay.png"),
    threshold: Annotated[
        float, typer.Option(help="Score below which a pixel is background; 0 names every pixel.")
    ] = 0.95,
    background: Annotated[
        str | None,
        typer.Option(help='Names that compete with the labels and count as background: "sky,grass".'),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Short side in pixels; 448 for models of 224, else the model's own.")
    ] = None,
    template: Annotated[str, typer.Option(help="Prompt around a name.")] = "a photo of a {}.",
    opacity: Annotated[float, typer.Option(help="Of the colours, 0 to 1.")] = 0.55,
) -> None:
    """Zero-shot segmentation of one image by the published protocol."""
    from ..evaluation.groupvit.labels import split_labels

    names = split_labels(labels)
    others = [name for name in split_labels(background) if name not in names] if background else []
    pixels = read_image(image)
    check_output(out)
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity} is out of range; give a number from 0 to 1.")
    mask, best = segment_pixels(
        pixels, names + others, checkpoint, threshold=threshold or None, size=size, template=template
    )
    mask[mask > len(names)] = 0

    from ..evaluation.pictures.overlay import draw_overlay

    draw_overlay(pixels, mask, names, out, opacity=opacity)
    present = [name for index, name in enumerate(names) if (mask == index + 1).any()]
    share = {name: float((mask == names.index(name) + 1).mean()) for name in present}
    found = ", ".join(f"{name} {value:.0%}" for name, value in share.items())
    show(f"{out}: {found or nothing_found(names, best, threshold)}")


def nothing_found(names: list[str], best: list[float], threshold: float) -> str:
    """Why no pixel got a name, and the option that changes it; ``best`` is the highest score of each name."""
    highest = max(range(len(names)), key=lambda index: best[index])
    return (
        f"nothing above the threshold of {threshold:g}; the best score is {best[highest]:.2f} ({names[highest]}), "
        f"--threshold {max(best[highest] - 0.005, 0.0):.2f} shows it, --threshold 0 names every pixel"
    )


def segment_pixels(
    pixels: np.ndarray,
    names: list[str],
    checkpoint: str | tuple[Any, Any],
    *,
    threshold: float | None,
    size: int | None,
    template: str,
) -> tuple[np.ndarray, list[float]]:
    """Class of every pixel [H, W], 0 the background and names from 1, and the highest score of each name.

    ``checkpoint`` names one, or is a GroupViT and its processor.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing or no GroupViT, an option makes no sense, or the
            model's tokenizer knows no word of a name.
    """
    from dataclasses import replace

    from ..checkpointing.load import load_groupvit
    from ..data.pairs.vocabulary import unknown_names
    from ..evaluation.groupvit.embeddings import class_embeddings, templates_named
    from ..evaluation.groupvit.segmentation import default_protocol, pixel_statistics
    from ..evaluation.groupvit.sliding import score_image

    templates = templates_named(template)
    model, processor = checkpoint if isinstance(checkpoint, tuple) else load_groupvit(checkpoint)
    source = "this model" if isinstance(checkpoint, tuple) else checkpoint
    if unknown := unknown_names(processor.tokenizer, names):
        raise ValueError(
            f"the tokenizer of {source} does not know {', '.join(map(repr, unknown))}: to the model all such names "
            "are the same; give names that its captions had, or a model trained with a larger vocabulary."
        )
    protocol = default_protocol(model.config.vision_config.image_hw[0], threshold)
    if size is not None:
        protocol = replace(protocol, short_side=size, window=size, stride=max(size // 2, 1))
    classes = class_embeddings(model, processor, names, templates)
    scores = score_image(model, pixels, classes, protocol, *pixel_statistics(processor)).cpu()
    best = scores[-len(names) :].amax((1, 2)).tolist()
    mask = scores.argmax(0).numpy()
    return (mask if threshold is not None else mask + 1), best


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image.
    """
    from ...models.pictures import FORMAT_NAMES
    from ..data.decode import decode_file
    from ..data.report import BadSample

    if not path.exists():
        raise FileNotFoundError(f"the image {path} does not exist; check the path.")
    try:
        return decode_file(path)
    except BadSample as error:
        raise ValueError(f"the image {error}; give a {FORMAT_NAMES} file that opens.") from error


def check_output(path: Path) -> None:
    """Raise before the work is done if ``path`` cannot become a picture."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"out={path} has no image suffix; write to a .png or .jpg file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of out={path} does not exist; make it first.")
