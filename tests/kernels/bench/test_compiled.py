"""Reading compiled code, the gate on its figures, and the committed table."""

import csv
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from interloom.kernels.bench.ahead_of_time import compile_environment, compile_launches
from interloom.kernels.bench.compiled import TABLE, Row, faults, read_table, regressions, write_table
from interloom.kernels.common.arch import ARCHITECTURES

ROW = Row(
    triton="3.7.1",
    operation="group_assign",
    model="GroupViT-S stage 1",
    dtype="bfloat16",
    kernel="group_assign_forward_kernel",
    target="sm_90",
    programs=256,
    num_warps=4,
    num_stages=2,
    registers=168,
    stack=0,
    spills=0,
    shared=65536,
    occupancy=0.125,
    matrix="HGMMA",
    matrix_count=16,
    wide=0.97,
    atomics=0,
)

# A kernel that multiplies matrices well, the same with too few registers, and one that uses atomics.
TOY = """
import torch, triton, triton.language as tl
from interloom.kernels.bench.ahead_of_time import compile_launches
from interloom.kernels.bench.machine_code import MATRIX_INSTRUCTIONS, read_machine_code

@triton.jit
def product_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK):
        left = tl.load(a + rows[:, None] * K + k + inner[None, :])
        right = tl.load(b + (k + inner)[:, None] * N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty))

@triton.jit
def counting_kernel(source, target, N: tl.constexpr):
    tl.atomic_add(target, tl.sum(tl.load(source + tl.arange(0, N)), axis=0))

a, b, c = (torch.empty(128, 128, dtype=torch.bfloat16) for _ in range(3))
x, y = torch.empty(1024), torch.empty(1)
for target in MATRIX_INSTRUCTIONS:
    with compile_launches(target) as launches:
        product_kernel[(1,)](a, b, c, 128, M=128, N=128, BLOCK=64, num_warps=8)
        product_kernel[(1,)](a, b, c, 128, M=128, N=128, BLOCK=64, num_warps=8)
        if target == "sm_80":
            product_kernel[(1,)](a, b, c, 128, M=128, N=128, BLOCK=64, num_warps=8, maxnreg=40)
        counting_kernel[lambda meta: (meta["N"] // 64,)](x, y, N=1024)
    assert [launch.grid for launch in launches] == [(1, 1, 1)] * (len(launches) - 1) + [(16, 1, 1)]
    good, *crowded, counting = [read_machine_code(launch.compiled, target) for launch in launches]
    assert good.matrix == MATRIX_INSTRUCTIONS[target] and good.matrix_count > 0, good
    assert good.spills == good.stack == good.atomics == 0, good
    assert good.wide > (0.5 if target == "gfx942" else 0.9), good
    assert 0 < good.occupancy <= 1 and good.shared > 0, good
    assert all(code.spills > 0 and code.stack > 0 for code in crowded), crowded
    assert len(crowded) == (target == "sm_80")
    assert counting.atomics > 0 and counting.matrix == "", counting
print("read", len(MATRIX_INSTRUCTIONS))
"""


def test_machine_code_of_all_targets_without_a_device(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(textwrap.dedent(TOY))
    run = subprocess.run([sys.executable, script], env=compile_environment(), capture_output=True, text=True)
    assert run.stdout == "read 7\n", run.stderr


def test_compiling_refuses_where_kernels_are_interpreted():
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set"), compile_launches("sm_90"):
        pass
    with pytest.raises(ValueError, match="sm_70"), compile_launches("sm_70"):
        pass


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 169}, "registers rose from 168 to 169"),
        ({"spills": 2}, "spills rose from 0 to 2"),
        ({"stack": 8}, "stack rose"),
        ({"shared": 65552}, "shared rose"),
        ({"atomics": 1}, "atomics rose"),
        ({"occupancy": 0.0625}, "occupancy fell from 0.125 to 0.0625"),
        ({"wide": 0.9}, "wide fell"),
        ({"matrix": "HMMA"}, "'HGMMA' became 'HMMA'"),
        ({"kernel": "other_kernel"}, "in the table"),
    ],
)
def test_a_worse_figure_is_a_complaint(change, complaint):
    assert any(complaint in line for line in regressions([ROW], [replace(ROW, **change)]))


def test_equal_or_better_figures_pass():
    better = replace(ROW, registers=128, occupancy=0.25, shared=49152, wide=1.0, matrix_count=8)
    assert regressions([ROW], [ROW]) == []
    assert regressions([ROW], [better]) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 1}, "spills"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"matrix": "HMMA"}, "multiplies with HMMA, not HGMMA"),
        ({"shared": 240 * 1024}, "shared memory"),
        ({"atomics": 1}, "atomic"),
    ],
)
def test_absolute_limits(change, complaint):
    assert faults([ROW]) == []
    (found,) = faults([replace(ROW, **change)])
    assert complaint in found


def test_a_kernel_without_products_may_do_without_tensor_cores():
    plain = replace(ROW, matrix="", matrix_count=0)
    assert faults([plain]) == []
    # … but not if it multiplies on another target.
    (found,) = faults([plain, replace(ROW, target="sm_100", matrix="UTCMMA")])
    assert "no tensor core" in found


def test_float32_multiplies_by_mma_sync_on_every_nvidia_target():
    exact = replace(ROW, dtype="float32", matrix="HMMA")
    assert faults([exact]) == []
    assert "not HMMA" in faults([replace(exact, matrix=""), replace(exact, target="sm_80")])[0]
    assert "not MFMA" in faults([replace(exact, target="gfx942")])[0]


def test_table_survives_writing_and_reading(tmp_path):
    path = tmp_path / "table.csv"
    write_table([ROW, replace(ROW, target="gfx942", matrix="MFMA")], path)
    assert sorted(read_table(path), key=lambda row: row.target)[1] == ROW
    with path.open(newline="") as file:
        assert len(list(csv.reader(file))) == 3


def test_committed_table_is_whole_and_without_fault():
    rows = read_table(TABLE)
    assert faults(rows) == []
    assert {row.target for row in rows} == set(ARCHITECTURES)
    assert {row.dtype for row in rows} == {"float32", "float16", "bfloat16"}
    for target in ARCHITECTURES:
        kernels = {row.kernel for row in rows if row.target == target}
        assert {
            "gated_cross_attention_one_forward_kernel",
            "gated_cross_attention_one_backward_kernel",
            "gated_cross_attention_forward_kernel",
            "gated_cross_attention_backward_query_kernel",
            "gated_cross_attention_backward_key_value_kernel",
            "gated_residual_forward_kernel",
            "gated_residual_rms_norm_backward_kernel",
            "group_assign_forward_kernel",
            "group_assign_backward_kernel",
            "contrastive_forward_kernel",
            "contrastive_backward_gradient_kernel",
        } <= kernels
