"""What evaluations ask of an IDEFICS: load it, have it continue prompts, and embed pictures to find similar ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...data.report import SkipReport
from ..progress import track
from ..ranks import gathered_in_order, share
from .few_shot import Prompts, Sample, open_picture

if TYPE_CHECKING:
    from ....models.idefics import IdeficsForVisionText2Text, IdeficsProcessor

Item = TypeVar("Item")
Made = TypeVar("Made")


class Writer:
    """Continues prompts, as the published evaluation does: beams, and neither line breaks nor images written.

    Args:
        model, processor: of one checkpoint.
        max_new_tokens, num_beams: of ``generate``.
        stops: a continuation ends before the first of these texts.
        image_attention: ``latest`` or ``all_previous``.
    """

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        processor: IdeficsProcessor,
        *,
        max_new_tokens: int,
        num_beams: int,
        stops: Sequence[str],
        image_attention: str = "latest",
    ) -> None:
        self.model, self.processor, self.stops = model, processor, list(stops)
        self.image_attention = image_attention
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "early_stopping": True,
        }
        tokenizer = processor.tokenizer
        names = ("<image>", "<fake_token_around_image>", "\n", "<0x0A>")
        banned = {tokenizer.find(name) for name in names}
        line_break = tokenizer.rows(["\n"])[0]
        if line_break and "\n" in tokenizer.decode(line_break[-1:]):
            banned.add(line_break[-1])
        # What ends a text: the end token of the configuration, the tokenizer's, and that of a turn in a dialogue.
        turn = tokenizer.find("<end_of_utterance>")
        own = model.generation_config.eos_token_id
        told = model.config.eos_token_ids if own is None else [own] if isinstance(own, int) else own
        ends = {*told, tokenizer.eos_token_id, *([] if turn is None else [turn])}
        self.options["eos_token_id"] = sorted(ends)
        self.banned = [[token] for token in sorted(token for token in banned if token is not None)]

    def inputs(self, prompts: Sequence[list[Any]]) -> Any:
        """Model inputs of prompts, padded on the left, still on the CPU."""
        return self.processor(
            [list(prompt) for prompt in prompts],
            padding_side="left",
            image_attention=self.image_attention,
            add_end_of_utterance_token=False,
        )

    @torch.no_grad()
    def __call__(self, inputs: Any) -> list[str]:
        """The continuation of each prompt."""
        ids = self.model.generate(**inputs.to(self.model.device), bad_words_ids=self.banned, **self.options)
        assert isinstance(ids, Tensor)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [self._cut(text) for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _cut(self, text: str) -> str:
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))].strip()


def prefetched(items: Iterable[Item], make: Callable[[Item], Made], ahead: int = 2) -> Iterator[Made]:
    """``make`` of each item in order, made in a thread while the ones before are used."""
    with ThreadPoolExecutor(1, thread_name_prefix="prompts") as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_all(
    writer: Writer, prompts: Prompts, samples: Sequence[Sample], batch_size: int, report: SkipReport
) -> list[str | None]:
    """What the model writes about every sample, on every rank; None where a picture was not to be had.

    Args:
        writer: the model.
        prompts: wording and examples.
        samples: shared out over ranks in batches of ``batch_size``.
        report: takes what is left out.
    """
    batches = share(len(samples), batch_size)

    def prepare(rows: range) -> tuple[list[int], Any]:
        made = {row: prompts(row, samples[row], report) for row in rows}
        usable = {row: prompt for row, prompt in made.items() if prompt is not None}
        return list(usable), writer.inputs(list(usable.values())) if usable else None

    texts: dict[int, str | None] = {row: None for rows in batches for row in rows}
    for rows, inputs in track(prefetched(batches, prepare), "writing", len(batches)):
        if rows:
            texts |= zip(rows, writer(inputs), strict=True)
    return gathered_in_order(texts, len(samples))


def embed_pictures(
    samples: Sequence[Sample],
    encoder: str | None,
    model: IdeficsForVisionText2Text,
    processor: IdeficsProcessor,
    report: SkipReport,
    batch_size: int = 64,
) -> dict[Path, np.ndarray]:
    """Unit vector [P] of every picture that can be read, each encoded once, shared out over ranks.

    Args:
        samples: whose pictures.
        encoder: checkpoint of a GroupViT; None for the IDEFICS's own image encoder.
        report: takes what cannot be read.

    Raises:
        FileNotFoundError, ValueError: ``encoder`` is no GroupViT.
    """
    encode = _own_encoder(model, processor) if encoder is None else _groupvit_encoder(encoder)
    distinct = list({sample.image: sample for sample in samples if sample.image is not None}.values())
    vectors: dict[int, np.ndarray | None] = {}
    batches = share(len(distinct), batch_size)
    for rows in track(batches, "embedding pictures", len(batches)):
        opened = {row: open_picture(distinct[row], report, "picture to compare") for row in rows}
        pictures = [picture for picture in opened.values() if picture is not None]
        found = iter(encode(pictures).float().cpu().numpy() if pictures else ())
        vectors |= {row: None if picture is None else next(found) for row, picture in opened.items()}
    return {
        sample.image: vector
        for sample, vector in zip(distinct, gathered_in_order(vectors, len(distinct)), strict=True)
        if vector is not None and sample.image is not None
    }


def _own_encoder(model: Any, processor: Any) -> Callable[[list[np.ndarray]], Tensor]:
    @torch.no_grad()
    def encode(pictures: list[np.ndarray]) -> Tensor:
        tower = model.model.vision_model
        pixels = processor.image_processor(pictures).to(model.device, tower.dtype)
        return torch.nn.functional.normalize(tower(pixels).pooler_output.float(), dim=-1)

    return encode


def _groupvit_encoder(checkpoint: str) -> Callable[[list[np.ndarray]], Tensor]:
    from ...checkpointing.load import load_groupvit

    model, processor = load_groupvit(checkpoint)

    @torch.no_grad()
    def encode(pictures: list[np.ndarray]) -> Tensor:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.device)
        return torch.nn.functional.normalize(model.visual_projection(model.encode_image(pixels)), dim=-1)

    return encode
