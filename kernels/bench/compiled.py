"""The committed table of compiled-code figures, and the gate that fails when one gets worse.

``python -m interloom.kernels.bench.compiled`` compiles every kernel at the model shapes for every target and
compares the figures with ``compiled.csv``; ``--write`` accepts them as the new table. The table belongs to
one version of Triton, which its first column states.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ..common.arch import ARCHITECTURES
from .ahead_of_time import CompiledLaunch, compile_launches
from .machine_code import MATRIX_INSTRUCTIONS, SHARED_LIMIT, read_machine_code
from .operation import Maker, Operation, Sizes, gradients_of, output_gradients, outputs_of
from .operations import select_cases

TABLE = Path(__file__).with_name("compiled.csv")


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one target at one model's shapes; figures as in ``MachineCode``."""

    triton: str
    operation: str
    model: str
    dtype: str
    kernel: str
    target: str
    programs: int
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    occupancy: float
    matrix: str
    matrix_count: int
    wide: float
    atomics: int

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What identifies a row from one run to the next."""
        return self.operation, self.model, self.dtype, self.kernel, self.target

    @property
    def instruction(self) -> str:
        """The tensor-core instruction that a matrix kernel should use here.

        Products of float32 are three of tf32 on NVIDIA, with operands in registers; the tiles that fit them are too
        small for wgmma and tcgen05, which leaves mma.sync on every generation.
        """
        exact = self.dtype == "float32" and self.target.startswith("sm_")
        return "HMMA" if exact else MATRIX_INSTRUCTIONS[self.target]


class Case(NamedTuple):
    """What is compiled: an operation at the shapes of a model, or at others that it must also serve."""

    operation: Operation
    model: str
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16


# Beside the models' shapes in bfloat16: other head dims and lengths, float16, float32.
_FURTHER: dict[str, list[tuple[str, Sizes, torch.dtype]]] = {
    "gated_cross_attention": [
        ("IDEFICS-9B", {}, torch.float32),
        ("head dim 96", {"D": 96}, torch.float16),
        ("head dim 80, 257 keys", {"D": 80, "L": 257}, torch.bfloat16),
    ],
    "gated_cross_attention/words": [
        ("IDEFICS-9B", {}, torch.float32),
        ("head dim 96", {"D": 96}, torch.float16),
    ],
    "contrastive_loss": [("batch 4,096", {}, torch.float32), ("batch 4,096", {}, torch.float16)],
    "multi_label_contrastive_loss": [("GroupViT-S", {}, torch.float32)],
    "group_assign": [("GroupViT-S stage 1", {}, torch.float32), ("GroupViT-S stage 1", {}, torch.float16)],
    "gated_residual_rms_norm": [("IDEFICS-9B", {}, torch.float32)],
}


def cases(operation: str = "", model: str = "") -> Iterator[Case]:
    """What is compiled for the operation and model of these names, "" standing for all.

    Raises:
        ValueError: no case has that name.
    """
    for chosen, label in select_cases(operation, model):
        yield Case(chosen, label, chosen.models[label])
        if label == next(iter(chosen.models)):
            for name, change, dtype in _FURTHER.get(chosen.name, []):
                yield Case(chosen, name, {**chosen.models.get(name, chosen.models[label]), **change}, dtype)


# Cards whose launches are those of another column: each operation at its first shapes in bfloat16 shows that they fit.
_BRIEFLY = {"sm_86", "sm_89", "sm_120"}


def _wanted(case: Case, target: str) -> bool:
    first = next(iter(case.operation.models))
    return target not in _BRIEFLY or (case.model == first and case.dtype == torch.bfloat16)


def compile_rows(case: Case, target: str) -> Iterator[Row]:
    """Compile forward and backward of an operation; one row a distinct kernel."""
    operation = case.operation
    inputs = operation.make(case.sizes, Maker(case.dtype, blank=True))
    with compile_launches(target) as launches:
        outputs = outputs_of(operation.call(inputs, "triton")())
        gradients_of(operation, inputs, outputs, output_gradients(outputs, blank=True))
    seen: dict[str, int] = {}
    for launch in launches:
        # The same kernel compiled another way in the same pass (the other side, another merge) is a row too.
        seen[launch.name] = seen.get(launch.name, 0) + 1
        variant = launch.name if seen[launch.name] == 1 else f"{launch.name}#{seen[launch.name]}"
        yield _row(case, variant, target, launch)


def _row(case: Case, kernel: str, target: str, launch: CompiledLaunch) -> Row:
    code = asdict(read_machine_code(launch.compiled, target))
    x, y, z = launch.grid
    return Row(
        triton=triton.__version__,
        operation=case.operation.name,
        model=case.model,
        dtype=str(case.dtype).removeprefix("torch."),
        kernel=kernel,
        target=target,
        programs=x * y * z,
        num_warps=launch.compiled.metadata.num_warps,
        num_stages=launch.compiled.metadata.num_stages,
        **code | {"occupancy": round(code["occupancy"], 4), "wide": round(code["wide"], 3)},
    )


def is_matrix_kernel(row: Row, rows: Iterable[Row]) -> bool:
    """Whether the kernel multiplies matrices on any target, so that it should on all."""
    return any(other.matrix_count for other in rows if other.key[:4] == row.key[:4])


def faults(rows: list[Row]) -> list[str]:
    """What no kernel may do, whatever the committed table says."""
    found = []
    for row in rows:
        name = f"{row.kernel} ({row.model}, {row.dtype}, {row.target})"
        if row.shared > SHARED_LIMIT[row.target]:
            found.append(f"{name} needs {row.shared} bytes of shared memory, over {SHARED_LIMIT[row.target]}")
        if row.atomics:
            found.append(f"{name} uses {row.atomics} atomic instructions")
        if not is_matrix_kernel(row, rows):
            continue
        if row.spills or row.stack:
            found.append(f"{name} spills: {row.spills} spills, {row.stack} bytes of stack")
        if row.matrix != row.instruction:
            found.append(f"{name} multiplies with {row.matrix or 'no tensor core'}, not {row.instruction}")
    return found


def regressions(committed: list[Row], fresh: list[Row]) -> list[str]:
    """Figures of ``fresh`` that are worse than in ``committed``, and kernels that only one of them has."""
    before = {row.key: row for row in committed}
    after = {row.key: row for row in fresh}
    found = [f"{' '.join(key)} is not in the table" for key in after if key not in before]
    found += [f"{' '.join(key)} is in the table but was not compiled" for key in before if key not in after]
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        for figure in ("registers", "stack", "spills", "shared", "atomics"):
            was, now = getattr(old, figure), getattr(new, figure)
            if now > was:
                found.append(f"{' '.join(key)}: {figure} rose from {was} to {now}")
        for figure in ("occupancy", "wide"):
            was, now = getattr(old, figure), getattr(new, figure)
            if now < was:
                found.append(f"{' '.join(key)}: {figure} fell from {was} to {now}")
        if new.matrix != old.matrix:
            found.append(f"{' '.join(key)}: tensor-core instruction {old.matrix!r} became {new.matrix!r}")
    return sorted(found)


def read_table(path: Path = TABLE) -> list[Row]:
    """Read rows from a CSV file that ``write_table`` wrote."""
    kinds = {field.name: field.type for field in fields(Row)}
    convert = {"str": str, "int": int, "float": float}

    def row(line: dict[str, str]) -> Row:
        return Row(**{name: convert[str(kinds[name])](text) for name, text in line.items()})

    with path.open(newline="") as file:
        return [row(line) for line in csv.DictReader(file)]


def write_table(rows: list[Row], path: Path = TABLE) -> None:
    """Write rows, sorted, as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.key))


def main(arguments: list[str] | None = None) -> None:
    """Compile the kernels for devices that are not here and compare with the committed table.

    ``argparse`` reads the flags: this is run where nothing but PyTorch and Triton is installed, too.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}", description=(main.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--op", default="", help="one operation; all without it")
    parser.add_argument("--model", default="", help="one model's shapes; all without it")
    parser.add_argument("--target", default="", choices=["", *ARCHITECTURES], help="all without it")
    parser.add_argument("--write", action="store_true", help="accept the figures as the committed table")
    parser.add_argument("--out", type=Path, help="also write the rows to this CSV file")
    parser.add_argument("--jobs", type=int, default=2, help="targets compiled at a time")
    given = parser.parse_args(arguments)
    operation, model, target, write, out, jobs = (
        given.op, given.model, given.target, given.write, given.out, given.jobs,
    )  # fmt: skip
    try:
        chosen = list(cases(operation, model))
    except ValueError as error:
        parser.error(str(error))
    if target or jobs == 1:
        rows = _compile(chosen, [target] if target else list(ARCHITECTURES))
    else:
        rows = _compile_side_by_side(operation, model, jobs)
    if out is not None:
        write_table(rows, out)
    keys = {row.key for row in rows}
    whole = not (operation or model or target)
    if write:
        fresh = {(*row.key[:3], row.target) for row in rows}
        before = [] if whole or not TABLE.exists() else read_table()
        others = [row for row in before if (*row.key[:3], row.target) not in fresh]
        write_table(others + rows)
    complaints = faults(rows)
    if not write and TABLE.exists():
        committed = read_table()
        if any(row.triton != triton.__version__ for row in committed):
            print(
                f"The table is not of Triton {triton.__version__}: compared with the absolute limits alone."
            )
        else:
            complaints += regressions([row for row in committed if whole or row.key in keys], rows)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if complaints:
        raise SystemExit(1)
    print(f"{len(rows)} kernels, none at fault" + ("" if write else " and none worse than in the table"))


def _compile(chosen: list[Case], targets: list[str]) -> list[Row]:
    rows = []
    for case in chosen:
        for name in (target for target in targets if _wanted(case, target)):
            for row in compile_rows(case, name):
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _compile_side_by_side(operation: str, model: str, jobs: int) -> list[Row]:
    """A process a target, ``jobs`` at a time: the compilers hold Python's lock."""

    def run(target: str, path: Path) -> list[Row]:
        command = [sys.executable, "-m", __spec__.name, "--op", operation, "--model", model]
        # Their complaints would be repeated below; without rows they failed otherwise.
        process = subprocess.run(
            [*command, "--target", target, "--out", str(path)], stderr=subprocess.PIPE, text=True
        )
        if not path.exists():
            raise RuntimeError(process.stderr)
        return read_table(path)

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(jobs) as pool:
        paths = [Path(directory) / f"{target}.csv" for target in ARCHITECTURES]
        return [row for rows in pool.map(run, ARCHITECTURES, paths) for row in rows]


def _line(row: Row) -> str:
    return (
        f"{row.kernel:48} {row.model:22} {row.dtype:8} {row.target:6} registers {row.registers:3} stack {row.stack:3} "
        f"spills {row.spills:3} shared {row.shared:6} occupancy {row.occupancy:5.3f} {row.matrix or '-':6} "
        f"{row.matrix_count:4} wide {row.wide:5.3f} warps {row.num_warps} programs {row.programs}"
    )


if __name__ == "__main__":
    main()
