"""``interloom bench kernels``: what the kernels move, compile to and, on a GPU, take."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from ..common.arch import ARCHITECTURES
from .ahead_of_time import compile_environment
from .compiled import TABLE, Row, read_table
from .contest import environment_line, say
from .count import Count, counting_environment
from .device_time import OURS, Failure, Timing, timed_rows
from .devices import DEVICES, modelled_seconds
from .machine import Machine
from .operation import Operation
from .operations import select_cases
from .report import Line, Table, show, write

_CPU_CASES = ("attention_speed", "contrastive_speed", "contrastive_memory")


def kernels(
    operation: Annotated[
        str, typer.Option("--op", help="One operation, e.g. group_assign; all without it.")
    ] = "",
    model: Annotated[str, typer.Option(help="One model's shapes, e.g. IDEFICS-9B; all without it.")] = "",
    target: Annotated[
        str, typer.Option(help=f"Tiles to count bytes with: {', '.join(ARCHITECTURES)}.")
    ] = "sm_90",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One model an operation, compiled figures from the committed table."),
    ] = False,
    times_only: Annotated[
        bool,
        typer.Option("--times-only", help="Time the kernels at once, each row as it comes (needs a GPU)."),
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Measure the PyTorch paths on the CPU instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write CSV, Markdown and PNG into this directory.")
    ] = None,
) -> None:
    """Show what the kernels cost: bytes counted, code compiled, time modelled; on a GPU also measured."""
    if target not in ARCHITECTURES:
        raise ValueError(f"--target {target!r} is not known; use one of {', '.join(ARCHITECTURES)}.")
    cases = _one_model_each(select_cases(operation, model)) if quick else list(select_cases(operation, model))
    say(environment_line())
    if times_only:
        if not torch.cuda.is_available():
            raise ValueError(
                "--times-only was given but PyTorch finds no GPU here; leave it out to count and compile."
            )
        tables = [_times_table(cases)]
    elif cpu:
        tables = [_cpu_table()]
    else:
        counts = []
        for case, label in cases:
            say(f"counting {case.name}, {label}")
            counts += _count(case, label, target)
        if not quick:
            say("compiling for " + ", ".join(ARCHITECTURES))
        rows = _table_rows(cases) if quick else _compiled_rows(operation, model)
        tables = [_bytes_table(counts, target), _code_table(rows)]
        if torch.cuda.is_available():
            tables.append(_times_table(cases))
    if out is not None:
        write(tables, out, "interloom " + shlex.join(sys.argv[1:]))
    if as_json:
        print(json.dumps({table.name: table.lines for table in tables}, indent=1))
    else:
        show(tables)


def _one_model_each(cases: Iterable[tuple[Operation, str]]) -> list[tuple[Operation, str]]:
    first = {}
    for operation, model in cases:
        first.setdefault(operation.name, (operation, model))
    return list(first.values())


def _count(operation: Operation, model: str, target: str) -> list[Count]:
    command = [sys.executable, "-m", f"{__package__}.count", operation.name, model, target]
    run = subprocess.run(command, env=counting_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return [Count(**json.loads(line)) for line in run.stdout.splitlines()]


def _table_rows(cases: list[tuple[Operation, str]]) -> list[Row]:
    """The committed rows of the cases, if the table is of this Triton."""
    if not TABLE.exists():
        return []
    wanted = {(operation.name, model) for operation, model in cases}
    return [row for row in read_table() if row.triton == triton.__version__ and row.key[:2] in wanted]


def _compiled_rows(operation: str, model: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.csv"
        command = [sys.executable, "-m", f"{__package__}.compiled", "--op", operation, "--model", model]
        # A complaint about a figure is the gate's business; here the figures are shown.
        run = subprocess.run(
            [*command, "--out", str(path)], env=compile_environment(), capture_output=True, text=True
        )
        if not path.exists():
            raise RuntimeError(f"{shlex.join(command)} failed:\n{run.stderr}")
        return read_table(path)


def _bytes_table(counts: list[Count], target: str) -> Table:
    lines: list[Line] = [
        {
            "operation": count.operation,
            "model": count.model,
            "pass": count.pass_,
            "moved MB": count.moved / 1e6,
            "floor MB": count.floor / 1e6,
            "eager MB": count.eager / 1e6,
            "moved / floor": round(count.moved / count.floor, 4),
            "eager / floor": round(count.eager / count.floor, 4),
            "GFLOP": count.flops / 1e9,
            "eager GFLOP": count.dense / 1e9,
            "modelled ms": modelled_seconds(target, count.moved, count.flops) * 1e3,
            "modelled eager ms": modelled_seconds(target, count.eager, count.dense) * 1e3,
        }
        for count in counts
    ]
    device = DEVICES[target]
    note = (
        "bfloat16, tiles of the table for " + target + ". Bytes and FLOPs are counted while the kernels are "
        "interpreted; eager's from the operators it calls. Modelled times are no measurements: the longer of "
        f"bytes at {device.bandwidth / 1e12:.3g} TB/s and FLOPs at {device.flops / 1e12:.0f} TFLOP/s ({device.name})."
    )
    screen = ("operation", "model", "pass", "moved MB", "moved / floor", "eager / floor", "modelled ms")
    return Table("bytes", "Bytes moved, counted", note, lines, (*screen, "modelled eager ms"))


def _code_table(rows: list[Row]) -> Table:
    lines: list[Line] = [
        {name.replace("_", " "): value for name, value in asdict(row).items() if name != "triton"}
        for row in rows
    ]
    note = (
        f"Triton {triton.__version__}, nothing launched. Registers and stack bytes a thread, spill "
        "instructions, shared bytes a program, occupancy as the share of warp slots, how often the tensor-core "
        "instruction stands in the code, share of global access widths in 128-bit or bulk accesses."
    )
    screen = (
        "kernel",
        "model",
        "dtype",
        "target",
        "registers",
        "stack",
        "spills",
        "shared",
        "occupancy",
        "matrix",
        "wide",
    )
    return Table("compiled", "Compiled code", note, lines, screen)


def _times_table(cases: list[tuple[Operation, str]]) -> Table:
    lines: list[Line] = []
    machine = Machine()
    for operation, model in cases:
        say(f"timing {operation.name}, {model}")
        for row in timed_rows(operation, model, machine):
            lines.append(_time_line(row))
            say(json.dumps(lines[-1]))
    note = (
        "Measured: median and quantiles of single calls, and of calls in a CUDA graph, where the host is left out. A "
        "speed-up stands only where outputs and gradients passed the check against float64."
    )
    screen = (
        "operation",
        "model",
        "pass",
        "mode",
        "implementation",
        "median ms",
        "TFLOP/s",
        "GB/s",
        "peak MB",
    )
    return Table("times", "Times on this GPU", note, lines, (*screen, "interloom is × faster", "check"))


def _time_line(row: Timing | Failure) -> Line:
    """One line of the table; of what failed, with the reason where else the check stands."""
    head: Line = {"operation": row.operation, "model": row.model}
    if isinstance(row, Failure):
        figures = ("median ms", "20% ms", "80% ms", "TFLOP/s", "GB/s", "peak MB", "interloom is × faster")
        return (
            head
            | {"pass": "–", "mode": row.mode, "implementation": row.implementation}
            | dict.fromkeys(figures)
            | {"check": row.reason, "device": row.device}
        )
    wrong = row.implementation == OURS and not row.error <= 1.0
    return head | {
        "pass": row.pass_,
        "mode": row.mode,
        "implementation": row.implementation,
        "median ms": row.median_ms,
        "20% ms": row.low_ms,
        "80% ms": row.high_ms,
        "TFLOP/s": row.tflops,
        "GB/s": row.gbytes,
        "peak MB": row.peak_bytes / 1e6,
        "interloom is × faster": row.ours_faster,
        "check": f"FAILED, error {row.error:.2g} × allowed" if wrong else "ok",
        "device": row.device,
    }


def _cpu_table() -> Table:
    lines: list[Line] = []
    for name in _CPU_CASES:
        say(f"measuring {name.replace('_', ' ')}")
        command = [sys.executable, "-m", f"{__package__}.cpu", name]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(run.stdout)
        extra = result.get("extra_bytes")
        lines.append(
            {
                "case": result["case"],
                "seconds": result["seconds"],
                "dense seconds": result.get("dense_seconds"),
                "× faster": result.get("ratio"),
                "extra memory MB": None if extra is None else extra / 1e6,
                "threads": result["threads"],
            }
        )
    note = (
        "Measured on this CPU, float32, forward and backward: medians of runs in turn; memory is the peak "
        "resident size beyond the inputs."
    )
    return Table("cpu", "PyTorch paths on the CPU", note, lines)
