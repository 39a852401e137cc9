"""The check before a speed-up, on the CPU through the interpreter; and every operation on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from interloom.kernels.bench.device_time import (
    OURS,
    Failure,
    Timing,
    check,
    distinct_sizes,
    error_ratio,
    timed_rows,
    with_speedups,
)
from interloom.kernels.bench.machine import Machine, StandIn
from interloom.kernels.bench.operation import Maker, outputs_of
from interloom.kernels.bench.operations import OPERATIONS, select_cases

TINY = {
    "gated_cross_attention": {"B": 1, "H": 2, "T": 96, "N": 3, "L": 16, "D": 64},
    "gated_residual": {"B": 1, "T": 128, "C": 64, "A": 1},
    "group_assign": {"B": 2, "G": 8, "N": 24, "C": 32},
    "contrastive_loss": {"M": 48, "K": 1, "D": 32},
}
OURS_ROW = Timing("op", "model", "forward", OURS, 1.0, 0.9, 1.1, 1.0, 1.0, 0, 0.5, None, "GPU")


@pytest.mark.parametrize("name", TINY)
def test_kernels_pass_the_check_and_a_broken_one_fails(name):
    operation = next(operation for operation in OPERATIONS if operation.name == name)
    inputs = operation.make(TINY[name], Maker(torch.float32))
    run = operation.call(inputs, "triton")
    assert check(operation, inputs, run) <= 1.0

    def broken():
        return tuple(output * 1.01 for output in outputs_of(run()))

    assert check(operation, inputs, broken) > 1.0


def test_eager_forms_are_the_operations():
    # Grouping draws its noise otherwise in eager PyTorch, so it has no equal there.
    for operation in OPERATIONS:
        if operation.name == "group_assign":
            continue
        sizes = {
            **operation.models[next(iter(operation.models))],
            "M": 40,
            "T": 128,
            "C": 64,
            "B": 1,
            "H": 2,
            "D": 16,
        }
        inputs = operation.make({**sizes, "A": 1}, Maker(torch.float64))
        for ours, theirs in zip(
            outputs_of(operation.reference(inputs)()), outputs_of(operation.eager(inputs)()), strict=True
        ):
            # Some eager forms take their softmax or norm in float32, as models do.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_error_ratio_allows_twice_the_plain_error_plus_rounding():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.0, 2.01])
    assert error_ratio(torch.tensor([1.0, 2.02]), plain, exact) == pytest.approx(1.0, rel=1e-4)
    assert error_ratio(torch.tensor([1.0, 2.05]), plain, exact) > 1.0
    assert error_ratio(torch.tensor([1.0, float("nan")]), plain, exact) == float("inf")


def test_a_number_that_pytorch_met_by_luck_is_no_yardstick():
    exact = torch.tensor([33.86245729816435], dtype=torch.float64)
    off = exact + 2 * 3.8e-6  # two units in the last place, as another order of summation gives
    assert error_ratio(off.float(), exact.float(), exact) <= 1.0
    assert error_ratio((exact * (1 + 1e-5)).float(), exact.float(), exact) > 1.0


def test_no_speed_up_while_the_check_fails():
    eager = replace(OURS_ROW, implementation="eager", median_ms=3.0)
    assert [row.ours_faster for row in with_speedups([OURS_ROW, eager])] == [None, 3.0]
    for error in (1.2, float("inf"), float("nan")):
        wrong = [replace(row, error=error) for row in (OURS_ROW, eager)]
        assert [row.ours_faster for row in with_speedups(wrong)] == [None, None]


def test_shapes_that_differ_in_what_is_cut_are_checked_once():
    for operation in OPERATIONS:
        found = distinct_sizes(operation)
        assert len({tuple(sizes.items()) for sizes in found}) == len(found)
    contrastive = next(operation for operation in OPERATIONS if operation.name == "contrastive_loss")
    assert len(contrastive.models) == 5
    assert len(distinct_sizes(contrastive)) == 1


def test_rows_come_one_by_one_and_survive_a_rival():
    operation = next(operation for operation in OPERATIONS if operation.name == "gated_residual")
    built = []

    def lost(inputs):
        built.append("lost")
        raise RuntimeError("no such kernel\nand a long story")

    def failing(inputs):
        def run():
            raise torch.OutOfMemoryError("out of memory")

        return run

    operation = replace(operation, rivals={"lost": lost, "failing": failing})
    torch.compiler.set_stance("force_eager")
    try:
        rows = timed_rows(operation, "IDEFICS-9B", Machine(dry=True))
        first = next(rows)
        assert (first.implementation, first.pass_, first.mode) == (OURS, "forward", "calls")
        assert not built  # our own figures are there before any rival is built
        rest = list(rows)
    finally:
        torch.compiler.set_stance("default")
    failed = [row for row in rest if isinstance(row, Failure)]
    assert {(row.implementation, row.mode) for row in failed} == {
        (name, mode) for name in ("lost", "failing") for mode in ("calls", "graph")
    }
    assert failed[0].reason == "RuntimeError: no such kernel"
    timed = [row for row in rest if isinstance(row, Timing)]
    assert {row.implementation for row in timed} == {OURS, "eager", "torch.compile"}
    assert all(row.ours_faster is not None for row in timed if row.implementation != OURS)
    assert {(row.pass_, row.mode) for row in timed if row.implementation == "eager"} == {
        ("forward", "calls"), ("backward", "calls"), ("forward", "graph"), ("both", "graph"),
    }  # fmt: skip


def test_the_stand_in_has_names_of_torch_cuda_alone():
    for name in vars(StandIn):
        assert name.startswith("_") or hasattr(torch.cuda, name), name


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="operation 'flash'"):
        list(select_cases("flash"))
    with pytest.raises(ValueError, match="model 'GPT'"):
        list(select_cases("group_assign", "GPT"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_kernels_are_right_on_the_gpu(operation, dtype):
    torch.set_float32_matmul_precision("highest")
    for sizes in distinct_sizes(operation):
        inputs = operation.make(sizes, Maker(dtype, "cuda"))
        run = operation.call(inputs, "triton")
        assert check(operation, inputs, run) <= 1.0
        first, second = outputs_of(run()), outputs_of(run())
        assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_is_timed_on_the_gpu(operation):
    from interloom.kernels.bench.device_time import time_case

    rows = time_case(operation, next(iter(operation.models)), budget_ms=20)
    assert {row.pass_ for row in rows if row.implementation == OURS} == {"forward", "backward"}
    assert all(row.error <= 1.0 and 0 < row.low_ms <= row.median_ms <= row.high_ms for row in rows)
