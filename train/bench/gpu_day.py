"""What to run first on a machine with a GPU: ``python train/bench/gpu_day.py``, from a bare checkout, 8 minutes.

In order: versions and the two ceilings (bandwidth, bfloat16 products), every operation checked, the kernels timed
beside their rivals, then whole training steps of GroupViT-S and of an IDEFICS of 1B parameters on eight different
batches. One JSON object a line goes to the screen and to ``--out`` as soon as it is known, so a run that is ended
early keeps what it found; what fails gives a line with the reason and the rest goes on. PyTorch, Triton and NumPy are
all it needs.

``--dry-run`` does the same with tiny shapes on a CPU through Triton's interpreter; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

# Published peaks: bytes a second, dense bfloat16 FLOP a second.
_PEAKS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.039e12, 312e12),
    "B200": (8.0e12, 2250e12),
    "L40S": (0.864e12, 362e12),
    "MI300X": (5.3e12, 1307e12),
}
_BATCHES = 8
# Minutes from the start by which each part must have ended, of 8; what is left of it then is a line that says so.
_PARTS = {"ceilings": 0.6, "checks": 2.6, "times": 5.0, "steps": 7.7}


def map_checkout() -> None:
    """Make this checkout's folders importable as ``interloom.kernels`` and ``interloom.models``, nothing installed."""
    package = ModuleType("interloom")
    package.__path__ = [str(ROOT)]
    sys.modules["interloom"] = package
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if str(Path(place or ".").resolve()) != here]


class Lines:
    """Writes rows as JSON lines, to the screen and a file, whole and at once."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if path is None else path.open("w")
        self._lock = threading.Lock()
        self.begun = time.monotonic()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.begun) / 60

    def write(self, part: str, row: Row) -> None:
        row = {"part": part, "at_s": round(self.minutes * 60, 1), **{k: _plain(v) for k, v in row.items()}}
        with self._lock:
            for file in filter(None, (sys.stdout, self._file)):
                print(json.dumps(row), file=file, flush=True)


def _plain(value: Any) -> Any:
    """JSON knows no infinity and no NaN."""
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return str(value)
    return value


def environment(machine: Any) -> Iterator[Row]:
    import numpy
    import torch
    import triton
    from interloom.kernels.bench import contest

    properties = machine.cuda.get_device_properties(machine.device)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    yield {
        "device": machine.name,
        "devices": len(machine.devices),
        "capability": list(machine.cuda.get_device_capability(machine.device)),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        **contest.environment(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "dry_run": machine.dry,
    }


def ceilings(machine: Any) -> Iterator[Row]:
    """What the device reaches when a library asks it for one thing."""
    import torch

    published = next((peak for name, peak in _PEAKS.items() if name in machine.name), (None, None))
    size = 1 << (10 if machine.dry else 30)
    source, target = (torch.empty(size, dtype=torch.int8, device=machine.device) for _ in range(2))
    median, low, high = machine.measure([lambda: target.copy_(source)], 200)
    yield {"ceiling": "bandwidth", "value": 2 * size / median / 1e9, "unit": "TB/s", "ms": [low, median, high],
           "published": published[0] and published[0] / 1e12}  # fmt: skip
    side = 64 if machine.dry else 8192
    a, b = (torch.randn(side, side, device=machine.device).bfloat16() for _ in range(2))
    median, low, high = machine.measure([lambda: a @ b], 200)
    yield {"ceiling": "bfloat16 products", "value": 2 * side**3 / median / 1e9, "unit": "TFLOP/s",
           "ms": [low, median, high], "published": published[1] and published[1] / 1e12}  # fmt: skip


def checks(machine: Any) -> Iterator[Row]:
    from interloom.kernels.bench.device_checks import checked_rows
    from interloom.kernels.bench.operations import OPERATIONS

    for operation in OPERATIONS:
        yield from checked_rows(operation, next(iter(operation.models)), machine)


def times(machine: Any) -> Iterator[Row]:
    """Each operation at its first shapes, then, while there is time, at the others."""
    from interloom.kernels.bench.device_time import timed_rows
    from interloom.kernels.bench.operations import OPERATIONS

    cases = [(i, op, model) for op in OPERATIONS for i, model in enumerate(op.models)]
    for i, operation, model in sorted(cases, key=lambda case: case[0]):
        if machine.dry and i:
            return
        for row in timed_rows(operation, model, machine, budget_ms=60):
            yield asdict(row)


# Training steps


def _sizes(width: int, inner: int, layers: int, heads: int, named: str = "hidden_size") -> Row:
    return {
        named: width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads
    }  # fmt: skip


def groupvit(machine: Any) -> tuple[Any, Callable[[int], tuple[Any, ...]]]:
    """GroupViT-S, and what makes batch ``i``: 256 pairs, captions of different lengths."""
    import torch
    from interloom.models import GroupViTConfig, GroupViTModel

    batch, size = (2, 32) if machine.dry else (256, 224)
    config = GroupViTConfig()
    if machine.dry:
        config = GroupViTConfig.from_dict(
            {
                "text_config": _sizes(32, 64, 1, 2),
                "vision_config": {**_sizes(32, 64, 3, 2), "depths": [1, 1, 1], "image_size": size,
                                  "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
                "projection_dim": 16, "projection_intermediate_dim": 32,
            }
        )  # fmt: skip
    model = GroupViTModel(config)

    def make(i: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.full((batch, 77), config.text_config.eos_token_id)
        for row in ids:
            length = int(torch.randint(5, 40, (), generator=generator))
            row[:length] = torch.randint(2, 40000, (length,), generator=generator)
        pixels = torch.randn(batch, 3, size, size, generator=generator)
        ids, pixels = ids.to(machine.device), pixels.to(machine.device)
        return (lambda: model(input_ids=ids, pixel_values=pixels, return_loss=True).loss), batch

    return model, make


def idefics(machine: Any) -> tuple[Any, Callable[[int], tuple[Any, ...]]]:
    """An IDEFICS of 1.2B parameters, and what makes batch ``i``: rows of packed documents with images."""
    import torch
    from interloom.models import IdeficsConfig, IdeficsForVisionText2Text
    from interloom.models.idefics import image_attention_mask

    rows, tokens, images, size = (1, 32, 2, 28) if machine.dry else (4, 2048, 8, 224)
    wide, tower, resampler = (
        _sizes(2048, 5504, 16, 16),
        _sizes(768, 3072, 12, 12, "embed_dim"),
        (64, 3, 12, 64),
    )
    if machine.dry:
        wide, tower, resampler = _sizes(32, 48, 2, 2), _sizes(32, 48, 1, 2, "embed_dim"), (4, 1, 2, 8)
    latents = dict(zip(("n_latents", "depth", "n_heads", "head_dim"), resampler, strict=True))
    config = IdeficsConfig(
        vocab_size=200 if machine.dry else 32000, additional_vocab_size=2, cross_layer_interval=2 if machine.dry else 4,
        alpha_initializer="ones", qk_layer_norms=True, use_resampler=True, freeze_text_layers=False,
        vision_config={**tower, "image_size": size, "patch_size": 14},
        perceiver_config={f"resampler_{name}": value for name, value in latents.items()}, **wide,
    )  # fmt: skip
    image_token = config.vocab_size
    with torch.device(machine.device):
        model = IdeficsForVisionText2Text(config)

    def make(i: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(i)

        def draw(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator)

        ids, documents = draw(3, config.vocab_size, rows, tokens), torch.zeros(rows, tokens, dtype=torch.long)
        for row in range(rows):
            edges = draw(1, tokens, int(draw(1, 8))).unique()
            documents[row] = torch.bucketize(torch.arange(tokens), edges, right=True)
            places = draw(0, tokens, int(draw(images // 2, images + 1))).unique()
            ids[row, places] = image_token
        seen = image_attention_mask(ids, image_token, None, images, document_ids=documents)
        pixels = torch.randn(rows, images, 3, size, size, generator=generator)
        given = {"input_ids": ids, "labels": ids.clone(), "document_ids": documents, "pixel_values": pixels,
                 "image_attention_mask": seen}  # fmt: skip
        given = {name: value.to(machine.device) for name, value in given.items()}
        return (lambda: model(**given).loss), rows * tokens

    return model, make


def steps(machine: Any) -> Iterator[Row]:
    """Whole steps in bfloat16, on batches that all differ: kernels against PyTorch, with and without checkpointing."""
    for name, build in (("GroupViT-S", groupvit), ("IDEFICS-1B", idefics)):
        try:
            model, make = build(machine)
            model.to(machine.device).train()
            batches = [make(i) for i in range(2 if machine.dry else _BATCHES)]
        except Exception as failure:
            yield {"model": name, "reason": f"{type(failure).__name__}: {failure}"[:300]}
            continue
        size = sum(parameter.numel() for parameter in model.parameters())
        checkpoints = [False, True] if hasattr(model, "gradient_checkpointing_enable") else [False]
        for checkpointing in checkpoints:
            for backend in ("triton", "torch"):
                row = {"model": name, "parameters": size, "kernels": backend, "checkpointing": checkpointing}
                try:
                    if checkpointing:
                        model.gradient_checkpointing_enable()
                    with _kernels(backend):
                        row |= _steps(model, batches, machine)
                except Exception as failure:
                    machine.cuda.empty_cache()
                    row["reason"] = f"{type(failure).__name__}: {failure}"[:300]
                yield row
        del model, make, batches
        machine.cuda.empty_cache()


@contextmanager
def _kernels(backend: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["INTERLOOM_KERNELS"] = backend
    try:
        yield
    finally:
        os.environ.pop("INTERLOOM_KERNELS")
        os.environ.update(before)


def _steps(model: Any, batches: list[tuple[Any, ...]], machine: Any) -> Row:
    """Milliseconds of each of the batches after the first, and what one step asks of host and device."""
    import torch
    from interloom.kernels.bench.synchronisations import Synchronisations
    from torch.utils.flop_counter import FlopCounterMode

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=not machine.dry)

    def step(run: Callable[[], Any]) -> Any:
        with torch.autocast(machine.device.type, torch.bfloat16):
            loss = run()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with _compilations() as compiled:
        begun = time.perf_counter()
        step(batches[0][0])
        machine.cuda.synchronize()
        first_ms, first_compiled = (time.perf_counter() - begun) * 1e3, compiled[0]
        peak, spans, losses = 0, [], []
        for run, _ in batches[1:]:
            begin, end = (machine.cuda.Event(enable_timing=True) for _ in range(2))
            machine.cuda.reset_peak_memory_stats()
            begin.record()
            losses.append(step(run))
            end.record()
            machine.cuda.synchronize()
            spans.append(begin.elapsed_time(end))
            peak = max(peak, machine.cuda.max_memory_allocated())
    with Synchronisations(imagined=machine.dry) as waits:
        step(batches[-1][0])
    counts = _host_calls(lambda: step(batches[-1][0]), machine)
    with FlopCounterMode(display=False) as flops:
        step(batches[-1][0])
    spans.sort()
    median = spans[len(spans) // 2]
    peak_flops = next((peak[1] for name, peak in _PEAKS.items() if name in machine.name), None)
    return {
        "ms": median,
        "ms_least": spans[0],
        "ms_most": spans[-1],
        "first_step_ms": first_ms,
        "per_second": batches[-1][1] / median * 1e3,
        "loss": float(sum(losses) / len(losses)),
        # Products of PyTorch's own operators, recomputed ones too; those inside kernels and variable-length attention
        # are left out.
        "tflop": flops.get_total_flops() / 1e12,
        "mfu": peak_flops and flops.get_total_flops() / median / 1e-3 / peak_flops,
        "peak_gb": peak / 1e9,
        "synchronisations": waits.count,
        "synchronising_operators": waits.seen,
        **counts,
        "compilations_first": first_compiled,
        "compilations_after": compiled[0] - first_compiled,
    }


@contextmanager
def _compilations() -> Iterator[list[int]]:
    """Count Triton's compilations within the block, in the one element of the list."""
    from triton import knobs

    count = [0]
    before = knobs.runtime.jit_post_compile_hook

    def hook(*args: Any, **kwargs: Any) -> bool:
        count[0] += 1
        return False

    knobs.runtime.jit_post_compile_hook = hook
    try:
        yield count
    finally:
        knobs.runtime.jit_post_compile_hook = before


def _host_calls(function: Callable[[], Any], machine: Any) -> Row:
    """Kernel launches and waits of one call, as the driver's interface saw them; zeros without a GPU."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if machine.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        function()
        machine.cuda.synchronize()
    launches = synchronised = 0
    for event in profiler.key_averages():
        launches += event.count * event.key.startswith(
            ("cudaLaunch", "cuLaunch", "hipLaunch", "hipExtLaunch", "hipModuleLaunch")
        )
        synchronised += event.count * (
            event.key.startswith(("cuda", "hip")) and event.key.endswith("Synchronize")
        )
    return {"launches": launches, "driver_waits": synchronised}


_SOURCES: dict[str, Callable[[Any], Iterator[Row]]] = {
    "environment": environment,
    "ceilings": ceilings,
    "checks": checks,
    "times": times,
    "steps": steps,
}


def run(machine: Any, lines: Lines, minutes: float) -> int:
    """Write the rows of every part; the number of those that tell of a failure."""
    failures = 0
    for part, source in _SOURCES.items():
        limit = _PARTS.get(part, minutes) * minutes / 8
        try:
            for row in source(machine):
                failures += row.get("ok") is False or ("reason" in row and row.get("ok", False) is not None)
                lines.write(part, row)
                if lines.minutes > limit:
                    lines.write(part, {"stopped": f"{limit:.1f} minutes had passed"})
                    break
        except Exception as failure:
            failures += 1
            lines.write(part, {"reason": f"{type(failure).__name__}: {failure}"[:300]})
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], prog="python train/bench/gpu_day.py"
    )
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines; docs/performance/DEVICE.jsonl without it"
    )
    parser.add_argument(
        "--minutes", type=float, help="end by then: 8, or 60 in a dry run, which has no parts to cut"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU; nothing is kept unless --out"
    )
    given = parser.parse_args(arguments)
    minutes = given.minutes or (60.0 if given.dry_run else 8.0)
    # Read where kernels are defined, so before they are imported.
    os.environ["TRITON_INTERPRET"] = "1" if given.dry_run else "0"
    map_checkout()
    import torch
    from interloom.kernels.bench.interpreter import patched_interpreter
    from interloom.kernels.bench.machine import Machine

    if not given.dry_run and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU here; --dry-run runs every line without one.", file=sys.stderr)
        return 2
    machine = Machine(dry=given.dry_run)
    out = given.out
    if out is None and not given.dry_run:
        name = "".join(c if c.isalnum() else "-" for c in machine.name.lower()).strip("-")
        out = ROOT / "docs" / "performance" / f"{name}.jsonl"
    lines = Lines(out)

    def stop() -> None:
        lines.write("end", {"stopped": f"{minutes:g} minutes had passed, within a measurement"})
        os._exit(3)

    watch = threading.Timer(minutes * 60, stop)
    watch.daemon = True
    watch.start()
    with ExitStack() as stack:
        if given.dry_run:
            stack.enter_context(patched_interpreter())
            torch.compiler.set_stance("force_eager")  # compiling for the CPU would take most of the time
        failures = run(machine, lines, minutes)
    watch.cancel()
    lines.write("end", {"failures": failures, "minutes": round(lines.minutes, 2), "out": out and str(out)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
