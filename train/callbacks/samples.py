"""What the model writes, while it trains: continuations of fixed held-out documents, as text and as pictures.

Every ``every_steps`` steps, and after the last, the model continues the same documents by the likeliest tokens, from
the last image of each on. ``samples.jsonl`` of the run directory gets a line a document, ``samples/step-N.png`` shows
their images with what was written below, and loggers that take text or pictures get both. It writes with the weights of
the step, not with their average (``optim.ema_decay``).

T tokens, N images.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..files import open_atomically
from .loggers import guarded

SAMPLES = "samples"
COLUMNS = ["step", "document", "prompt", "written", "reference"]


@dataclass(frozen=True)
class Prompt:
    """A document up to its last image, and what it says there.

    Attributes:
        name: of the document.
        ids: int64 [1, T].
        pixels: float32 [1, N, 3, H, W].
        seen: bool [1, T, N].
        pictures: uint8 [N, H, W, 3], to show.
        reference: int64 [R], the document's own continuation.
    """

    name: str
    ids: Tensor
    pixels: Tensor
    seen: Tensor
    pictures: np.ndarray
    reference: Tensor


def prompts(batch: dict[str, Any], transformed: dict[str, Any], count: int, longest: int) -> list[Prompt]:
    """The first document of each of ``count`` rows of a batch, if it has an image.

    Args:
        batch: as the loader gives it; ``transformed``: with the pixels that the model takes.
        longest: tokens of the reference.
    """
    found = []
    for row in range(len(batch["input_ids"])):
        length = int((batch["document_ids"][row] == 0).sum())
        ids, seen = batch["input_ids"][row, :length], batch["image_attention_mask"][row, :length]
        images = seen.any(0).nonzero().flatten()
        if not len(images) or len(found) == count:
            continue
        seen = seen[:, images]
        # An image's own token is the first to look at it; the one after it closes the image.
        cut = int(seen[:, -1].nonzero()[0]) + 2
        if cut >= length:
            continue
        found.append(
            Prompt(
                batch["keys"][row].split(" ")[0],
                ids[None, :cut],
                transformed["pixel_values"][row, images][None],
                seen[None, :cut],
                batch["pixel_values"][row, images].permute(0, 2, 3, 1).numpy(),
                ids[cut : cut + longest],
            )
        )
    return found


class SamplesCallback(Callback):
    """Writes and logs continuations.

    Args:
        run_dir: where the files go.
        load: makes the prompts; called once, before the first step.
        tokenizer: with ``decode``.
        forbidden: ids that are not text: image tokens.
        every_steps: how often; ``max_new_tokens``: how much is written.
    """

    def __init__(
        self,
        run_dir: Path,
        load: Callable[[], list[Prompt]],
        tokenizer: Any,
        forbidden: list[int],
        *,
        every_steps: int,
        max_new_tokens: int,
    ) -> None:
        self.run_dir, self.load, self.tokenizer, self.forbidden = run_dir, load, tokenizer, forbidden
        self.every_steps, self.max_new_tokens = every_steps, max_new_tokens
        self._prompts: list[Prompt] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prompts = self.load() if trainer.is_global_zero else []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._prompts and (step % self.every_steps == 0 or step == trainer.max_steps):
            with trainer.precision_plugin.forward_context():  # frozen matrices may be kept in bfloat16
                self.write(pl_module.model, step, trainer.loggers)  # pyright: ignore[reportArgumentType]

    def write(self, model: Any, step: int, loggers: list[Any]) -> list[dict[str, Any]]:
        """Continue every prompt; returns the lines written to ``samples.jsonl``."""
        training = model.training
        model.eval()
        try:
            lines = [self._continue(model, prompt, step) for prompt in self._prompts]
        finally:
            model.train(training)
        with open(self.run_dir / f"{SAMPLES}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        picture = self.run_dir / SAMPLES / f"step-{step:08d}.png"
        picture.parent.mkdir(exist_ok=True)
        draw(self._prompts, lines, picture)
        rows = [[line[name] for name in COLUMNS] for line in lines]

        def log(logger: Any) -> None:
            if hasattr(logger, "log_text"):
                logger.log_text("samples", columns=COLUMNS, data=rows, step=step)
            if hasattr(logger, "log_image"):
                logger.log_image("samples/sheet", [str(picture)], step=step)

        guarded(loggers, log)
        return lines

    @torch.no_grad()
    def _continue(self, model: Any, prompt: Prompt, step: int) -> dict[str, Any]:
        device = next(model.parameters()).device
        ids = model.generate(
            prompt.ids.to(device),
            pixel_values=prompt.pixels.to(device),
            image_attention_mask=prompt.seen.to(device),
            max_new_tokens=self.max_new_tokens,
            bad_words_ids=[[token] for token in self.forbidden],
        )[0].cpu()

        def text(part: Tensor) -> str:
            return self.tokenizer.decode(part.tolist(), skip_special_tokens=True)

        return {
            "step": step,
            "document": prompt.name,
            "prompt": text(prompt.ids[0]),
            "written": text(ids[prompt.ids.shape[1] :]),
            "reference": text(prompt.reference),
        }


def draw(shown: list[Prompt], lines: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a row a document, its images, and below them what was written and what the document says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(prompt.pictures) for prompt in shown)
    width = max(2.0 * columns, 6.0)
    figure = Figure(figsize=(width, 2.8 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, prompt, line in zip(rows, shown, lines, strict=True):
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis, picture in zip(axes, prompt.pictures, strict=False):
            axis.imshow(picture)
        for axis in axes:
            axis.axis("off")
        text = "\n".join(
            textwrap.fill(
                f"{label}: {' '.join(line[name].split())}", int(15 * width), max_lines=3, placeholder=" …"
            )
            for label, name in (("writes", "written"), ("reads", "reference"))
        )
        # The dollar sign would begin a formula.
        part.suptitle(text.replace("$", r"\$"), fontsize=7, x=0.01, ha="left")
    with open_atomically(path) as file:
        figure.savefig(file, dpi=110, format="png")
