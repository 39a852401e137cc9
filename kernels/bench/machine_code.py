"""What compiled kernels are made of: registers, spills, shared memory, occupancy, kinds of instruction.

The figures come from the tools in the Triton wheel (``cuobjdump``) for NVIDIA and from the notes that LLVM
writes into the assembly for AMD; no device is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

MATRIX_INSTRUCTIONS = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCMMA",
    "sm_120": "HMMA",
    "gfx942": "MFMA",
}
"""The tensor-core instruction that a matrix kernel should use: mma.sync, wgmma, tcgen05, mfma."""

SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory (LDS) that one program may use; a kilobyte less than a multiprocessor of NVIDIA's has."""

_REGISTERS = 65536
# (warps, programs) that a multiprocessor holds at most: CUDA C++ Programming Guide, compute capabilities.
_RESIDENT = {"sm_86": (48, 16), "sm_89": (48, 24), "sm_120": (48, 24)}
_RESIDENT_OTHERWISE = (64, 32)

_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\s+([a-z][\w]*)", re.MULTILINE)
_WIDTHS = {"8": 8, "16": 16, "64": 64, "128": 128}
_AMD_WIDTHS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "short": 16,
    "ushort": 16,
    "ubyte": 8,
}


@dataclass(frozen=True)
class MachineCode:
    """Figures of one kernel compiled for one target.

    ``registers`` are per thread (AMD: vector and accumulation ones per lane), ``stack`` bytes per thread,
    ``spills`` instructions (NVIDIA) or registers (AMD) that go to memory, ``shared`` bytes per program,
    ``occupancy`` the share of a multiprocessor's warp slots that registers and shared memory let be filled,
    ``matrix`` the tensor-core instruction used most and ``matrix_count`` how often it stands in the code,
    ``wide`` the share of the widths of all global accesses that belongs to 128-bit or bulk ones, ``atomics``
    the atomic instructions.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    occupancy: float
    matrix: str
    matrix_count: int
    wide: float
    atomics: int


@cache
def read_machine_code(compiled: Any, target: str) -> MachineCode:
    """Read the figures from a ``triton.compiler.CompiledKernel`` made for ``target`` ("sm_80" … "gfx942")."""
    return _read_amd(compiled) if target.startswith("gfx") else _read_nvidia(compiled, target)


def _read_nvidia(compiled: Any, target: str) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        opcodes = _SASS.findall(_cuobjdump("-sass", cubin.name))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    names = Counter(opcode.split(".")[0] for opcode in opcodes)
    threads = re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"])
    warps = max(int(threads[1]) // 32 if threads else 0, compiled.metadata.num_warps)
    matrix, matrix_count = _matrix_nvidia(names)
    widths = Counter[int]()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name in {"LDG", "STG", "LDGSTS"}:
            widths[_sass_width(modifiers)] += 1
        elif name in {"UTMALDG", "UTMASTG", "UBLKCP"}:
            widths[128] += 1
    return MachineCode(
        registers=registers,
        stack=stack,
        spills=names["LDL"] + names["STL"],
        shared=compiled.metadata.shared,
        occupancy=_occupancy(registers, warps, compiled.metadata.shared, target),
        matrix=matrix,
        matrix_count=matrix_count,
        wide=_wide_share(widths),
        atomics=sum(names[name] for name in ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG")),
    )


def _matrix_nvidia(names: Counter[str]) -> tuple[str, int]:
    kinds = {
        "UTCMMA": sum(count for name, count in names.items() if re.fullmatch(r"UTC\w*MMA", name)),
        "HGMMA": names["HGMMA"] + names["QGMMA"],
        "HMMA": names["HMMA"],
    }
    best = max(kinds, key=lambda kind: kinds[kind])
    return (best, kinds[best]) if kinds[best] else ("", 0)


def _sass_width(modifiers: list[str]) -> int:
    for modifier in modifiers:
        bits = _WIDTHS.get(modifier.lstrip("US"))
        if bits is not None:
            return bits
    return 32


def _occupancy(registers: int, warps: int, shared: int, target: str) -> float:
    # A warp gets registers in units of 256; a resident program costs 1 KB of shared memory beside its own.
    by_registers = _REGISTERS // (warps * -(-registers * 32 // 256) * 256)
    by_shared = (SHARED_LIMIT[target] + 1024) // (shared + 1024)
    most_warps, most_programs = _RESIDENT.get(target, _RESIDENT_OTHERWISE)
    programs = min(by_registers, most_warps // warps, by_shared, most_programs)
    return programs * warps / most_warps


def _read_amd(compiled: Any) -> MachineCode:
    text = compiled.asm["amdgcn"]
    opcodes = _AMDGCN.findall(text)
    widths = Counter[int]()
    for opcode in opcodes:
        access = re.match(r"(?:global|buffer)_(?:load|store)_(?:lds_)?[us]?(\w+?)(?:_d16\w*)?$", opcode)
        if access:
            widths[_AMD_WIDTHS.get(access[1], 32)] += 1
    matrix_count = sum(opcode.startswith(("v_mfma", "v_smfmac")) for opcode in opcodes)
    return MachineCode(
        registers=_amd_note(text, "vgpr_count"),
        stack=_amd_note(text, "private_segment_fixed_size"),
        spills=_amd_note(text, "vgpr_spill_count"),
        shared=compiled.metadata.shared,
        occupancy=int(_search(r"; Occupancy: (\d+)", text)) / 8,
        matrix="MFMA" if matrix_count else "",
        matrix_count=matrix_count,
        wide=_wide_share(widths),
        atomics=sum("_atomic_" in opcode for opcode in opcodes),
    )


def _amd_note(text: str, key: str) -> int:
    return int(_search(rf"\.{key}:\s+(\d+)", text))


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembly has no {pattern!r}; this version of Triton writes other notes.")
    return found[1]


def _wide_share(widths: Counter[int]) -> float:
    total = sum(width * count for width, count in widths.items())
    return widths[128] * 128 / total if total else 1.0


def _cuobjdump(*arguments: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
