"""``interloom bench model``: IDEFICS here and in Transformers, side by side on the same weights.

Each contestant lives in a process of its own, so that memory is its own too, and they take turns, so that a
machine that is busy for a while is busy for both. Decoding speed is read from the times at which tokens
arrive; the prompt and its images are not in it. Training speed is real tokens over the time of whole optimiser
steps (``training``). Memory is the process's peak meanwhile, and that peak less what it held before
(weights and libraries).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...kernels.bench.contest import environment_line, in_turn, say
from .contest import summarise
from .training import TrainCase

OURS, THEIRS = "interloom", "transformers"


@dataclass(frozen=True)
class DecodeCase:
    """One decoding measurement: a prompt of ``prompt`` tokens with ``images`` pictures, ``tokens`` generated."""

    images: int = 8
    prompt: int = 256
    tokens: int = 32
    threads: int = 2


def benchmark_config() -> Any:
    """75M parameters: resampler of 64 latents and QK norms, as released, and a gated block before every layer."""
    from ...models import IdeficsConfig, IdeficsPerceiverConfig, IdeficsVisionConfig

    return IdeficsConfig(
        vocab_size=12000,
        additional_vocab_size=2,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        alpha_initializer="ones",
        alpha_type="float",
        cross_layer_interval=1,
        qk_layer_norms=True,
        use_resampler=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config=IdeficsVisionConfig(
            embed_dim=640,
            image_size=112,
            patch_size=14,
            intermediate_size=1280,
            num_hidden_layers=2,
            num_attention_heads=10,
        ),
        perceiver_config=IdeficsPerceiverConfig(
            resampler_n_latents=64,
            resampler_depth=1,
            resampler_n_heads=6,
            resampler_head_dim=64,
            qk_layer_norms_perceiver=True,
        ),
    )


class Contestant:
    """One implementation in a process of its own, asked for one measurement at a time."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.model_worker", name, str(checkpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, kind: str, case: Any) -> dict[str, Any]:
        """Have one case run; its figures."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer below says it
            self.process.stdin.write(json.dumps({"kind": kind, **asdict(case)}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def wait(self) -> None:
        """Until it has loaded its model: loading beside a measurement would slow that down."""
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(
            f"The {self.name} side of the benchmark ended with code {self.process.wait()}; its messages are "
            "above. " + ("Install transformers to compare with it." if self.name == THEIRS else "")
        )

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.wait()


def take_turns(
    contestants: list[Contestant], kind: str, case: Any, rounds: int, report: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Measure a case ``rounds`` times with each contestant, one after the other."""
    sides = {contestant.name: partial(contestant.measure, kind, case) for contestant in contestants}
    return in_turn(sides, rounds, report=report)


@contextlib.contextmanager
def both_sides(config: Any) -> Iterator[tuple[list[Contestant], int]]:
    """Ours and theirs, with the same weights loaded, and the number of parameters."""
    import torch

    from ...models import IdeficsForVisionText2Text

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="interloom-bench-") as folder:
        model = IdeficsForVisionText2Text(config)
        parameters = model.num_parameters()
        model.save_pretrained(folder)
        del model
        contestants = [Contestant(name, Path(folder)) for name in (OURS, THEIRS)]
        try:
            for contestant in contestants:
                contestant.wait()
            yield contestants, parameters
        finally:
            for contestant in contestants:
                contestant.close()


def decode_benchmark(case: DecodeCase, rounds: int, report: Callable[[str], None]) -> dict[str, float]:
    """Compare decoding, and see what 1 and 16 images do to it; flat name to number."""
    with both_sides(benchmark_config()) as (contestants, parameters):
        both_rounds = take_turns(contestants, "decode", case, rounds, report)
        ours = contestants[0]
        cases = {f"{n} images": replace(case, images=n) for n in (1, 16)}
        sides = {name: partial(ours.measure, "decode", one_case) for name, one_case in cases.items()}
        of_images = in_turn(sides, rounds, report=report)
    same = {json.dumps(r["token_ids"]) for rounds_ in both_rounds.values() for r in rounds_}
    speed = "tokens_per_second"
    one, sixteen = (figures[speed] for figures in summarise(of_images).values())
    return {
        "parameters": parameters,
        "images": case.images,
        "prompt_tokens": case.prompt,
        "new_tokens": case.tokens,
        "threads": case.threads,
        "same_tokens": float(len(same) == 1),
        **compare(summarise(both_rounds)),
        f"{OURS}/{speed}_1_image": one,
        f"{OURS}/{speed}_16_images": sixteen,
        "images_1_over_16": one / sixteen,
    }


def training_benchmark(case: TrainCase, rounds: int, report: Callable[[str], None]) -> dict[str, float]:
    """Compare training on the same documents; flat name to number, all beginning with ``train/``."""
    # Transformers' loss fails wherever there is an additional vocabulary, so neither side has one here.
    config = replace(benchmark_config(), additional_vocab_size=0)
    with both_sides(config) as (contestants, parameters):
        results = take_turns(contestants, "train", case, rounds + 1, report)
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(results[OURS], results[THEIRS], strict=True)]
    # The first step makes optimiser states and touches code for the first time.
    figures = compare(summarise({name: rows[1:] for name, rows in results.items()}))
    figures |= {"parameters": parameters, "documents": case.documents, "threads": case.threads}
    figures |= {"max_loss_difference": max(apart)}
    return {f"train/{name}": value for name, value in figures.items()}


def compare(both: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each side's figures, and ours over theirs."""
    figures = {f"{name}/{key}": value for name, values in both.items() for key, value in values.items()}
    return {
        **figures,
        "speed_ratio": both[OURS]["tokens_per_second"] / both[THEIRS]["tokens_per_second"],
        "peak_ratio": both[OURS]["peak_mib"] / both[THEIRS]["peak_mib"],
        "working_peak_ratio": both[OURS]["working_peak_mib"] / max(both[THEIRS]["working_peak_mib"], 1.0),
    }


class Kind(StrEnum):
    """What ``interloom bench model`` compares."""

    decode = "decode"
    train = "train"
    both = "both"


def model(
    kind: Annotated[Kind, typer.Option(help="What to compare.")] = Kind.both,
    rounds: Annotated[int, typer.Option(help="Measurements of each case, taken in turns.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of each side.")] = 2,
    tokens: Annotated[int, typer.Option(help="Decoding: new tokens a measurement.")] = 32,
    images: Annotated[int, typer.Option(help="Decoding: images in the prompt, 64 latents each.")] = 8,
    prompt: Annotated[int, typer.Option(help="Decoding: tokens of the prompt.")] = 256,
    documents: Annotated[int, typer.Option(help="Training: documents a step.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Training: longest document, and length of a pack.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Decode and train with IDEFICS and with Transformers' IDEFICS, same weights: speed and memory compared."""
    if min(rounds, tokens - 1, threads, images, prompt, documents) < 1 or max_tokens < 64:
        raise ValueError(
            "rounds, threads, images, prompt and documents must be at least 1, tokens at least 2, max-tokens at "
            "least 64."
        )
    say(environment_line())
    figures: dict[str, float] = {}
    if kind != Kind.train:
        figures |= decode_benchmark(DecodeCase(images, prompt, tokens, threads), rounds, say)
    if kind != Kind.decode:
        figures |= training_benchmark(TrainCase(documents, max_tokens, threads=threads), rounds, say)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    if kind != Kind.train:
        print_decoding(figures)
    if kind != Kind.decode:
        print_training(figures)


def print_decoding(figures: dict[str, float]) -> None:
    """The figures of decoding for people."""
    title = f"IDEFICS, {figures['parameters'] / 1e6:.1f}M parameters, {figures['images']:.0f} images"
    rows = {
        "tokens_per_second": "decode, tokens/s",
        "prefill_seconds": "prompt and images, s",
        "peak_mib": "peak memory, MiB",
        "working_peak_mib": "peak less what was loaded, MiB",
    }
    print_table(title, rows, figures, "")
    print(
        f"tokens/s with 1 image {figures[f'{OURS}/tokens_per_second_1_image']:.2f}, with 16 images "
        f"{figures[f'{OURS}/tokens_per_second_16_images']:.2f}; "
        f"tokens equal: {'yes' if figures['same_tokens'] else 'no'}"
    )


def print_training(figures: dict[str, float]) -> None:
    """The figures of training for people."""
    title = (
        f"IDEFICS in training, {figures['train/parameters'] / 1e6:.1f}M parameters, "
        f"{figures['train/documents']:.0f} documents a step"
    )
    rows = {
        "tokens_per_second": "real tokens/s",
        "fill": "real tokens of all places",
        "image_fill": "real images of all places",
        "peak_mib": "peak memory, MiB",
        "working_peak_mib": "peak less what was loaded, MiB",
    }
    print_table(title, rows, figures, "train/")
    print(f"largest difference of the loss over the steps: {figures['train/max_loss_difference']:.1e}")


def print_table(title: str, rows: dict[str, str], figures: dict[str, float], prefix: str) -> None:
    """Figure names to labels, ours beside theirs."""
    from rich.table import Table

    from ..messages import console as new_console

    table = Table(title=title)
    for heading in ("", OURS, THEIRS, "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for key, label in rows.items():
        ours, theirs = figures[f"{prefix}{OURS}/{key}"], figures[f"{prefix}{THEIRS}/{key}"]
        table.add_row(label, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}" if theirs else "")
    new_console().print(table)
