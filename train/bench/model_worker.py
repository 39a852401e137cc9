"""One side of ``interloom bench model``: loads a model and measures the cases it is sent, a JSON line each."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from ...kernels.bench.contest import peak_bytes, reset_peak, resident_bytes
from .training import TrainCase, Trainer

_MIB = 2**20


class Clock:
    """A streamer that notes when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def memory_mib() -> tuple[float, float]:
    """Resident memory (now, at its peak) in MiB."""
    return resident_bytes() / _MIB, peak_bytes() / _MIB


def load(name: str, checkpoint: str) -> Any:
    """The model of one side, in evaluation mode."""
    if name == "transformers":
        import transformers

        transformers.logging.set_verbosity_error()
        return transformers.IdeficsForVisionText2Text.from_pretrained(checkpoint, dtype=torch.float32).eval()
    from ...models import IdeficsForVisionText2Text

    return IdeficsForVisionText2Text.from_pretrained(checkpoint)


def decode(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily and time the tokens after the first."""
    torch.set_num_threads(case["threads"])
    generator = torch.Generator().manual_seed(0)
    images, prompt, size = case["images"], case["prompt"], model.config.vision_config.image_size
    seen = torch.zeros(1, prompt, images, dtype=torch.long)
    for index in range(images):  # each image is seen until the next one comes
        seen[0, index * prompt // images : (index + 1) * prompt // images, index] = 1
    inputs = {
        "input_ids": torch.randint(3, model.config.vocab_size, (1, prompt), generator=generator),
        "attention_mask": torch.ones(1, prompt, dtype=torch.long),
        "pixel_values": torch.randn(1, images, 3, size, size, generator=generator),
        "image_attention_mask": seen,
    }
    options = {"do_sample": False, "max_new_tokens": case["tokens"], "min_new_tokens": case["tokens"]}
    reset_peak()
    before, _ = memory_mib()
    clock = Clock()
    began = time.perf_counter()
    ids = model.generate(**inputs, **options, streamer=clock)
    first = clock.times[1]  # the call before it brings the prompt
    _, peak = memory_mib()
    gaps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    return {
        # Of the median token: what else the machine does for a moment does not count.
        "tokens_per_second": 1.0 / statistics.median(gaps),
        "mean_tokens_per_second": len(gaps) / sum(gaps),
        "prefill_seconds": first - began,
        "peak_mib": peak,
        "working_peak_mib": peak - before,
        "token_ids": ids[0, prompt:].tolist(),
    }


class Side:
    """The measurements a side knows, on the model it holds."""

    def __init__(self, model: Any, packed: bool) -> None:
        self.model, self.packed = model, packed
        self.trainer: Trainer | None = None

    def measure(self, kind: str, case: dict[str, Any]) -> dict[str, Any]:
        """Figures of one case of ``decode`` or ``train``; training goes on from step to step."""
        return decode(self.model, case) if kind == "decode" else self._train(case)

    def _train(self, case: dict[str, Any]) -> dict[str, Any]:
        if self.trainer is None:
            self.trainer = Trainer(self.model, self.packed)
        self.trainer.prepare(TrainCase(**case))
        reset_peak()
        before, _ = memory_mib()
        figures = self.trainer.step()
        _, peak = memory_mib()
        return {**figures, "peak_mib": peak, "working_peak_mib": peak - before}


def main(name: str, checkpoint: str) -> None:
    """Answer requests until the other side closes."""
    model = load(name, checkpoint)
    # Weights and code come into memory when they are first used: both must be there before anything is measured.
    for parameter in model.parameters():
        parameter.detach().sum()
    decode(model, {"images": 1, "prompt": 16, "tokens": 4, "threads": 1})
    print(json.dumps({"ready": True}), flush=True)
    side = Side(model, packed=name != "transformers")
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(side.measure(case.pop("kind"), case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
