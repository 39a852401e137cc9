"""How benchmarks compare: turns, medians, spread, and the machine that a figure was taken on."""

import mmap

import torch
from interloom.kernels.bench.contest import environment_line, in_turn, peak_bytes, reset_peak, resident_bytes
from interloom.train.bench.contest import ratio_of_rounds, summarise


def test_sides_take_turns_and_warming_up_does_not_count():
    calls, lines = [], []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    figures = in_turn(sides, 2, warm_up=1, report=lines.append)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [3, 5], "b": [4, 6]}
    assert lines == ["round 1, a: 3", "round 1, b: 4", "round 2, a: 5", "round 2, b: 6"]


def test_a_round_that_is_slow_for_both_changes_no_ratio():
    ratio = ratio_of_rounds([20.0, 2.0, 21.0], [10.0, 1.0, 10.0])
    assert (ratio.median, ratio.least, ratio.most) == (2.0, 2.0, 2.1)
    assert str(ratio) == "2.00 × (2.00 to 2.10)"


def test_rounds_are_summarised():
    rounds = [{"tokens_per_second": s, "peak_mib": p, "token_ids": []} for s, p in ((1, 5), (9, 7), (2, 6))]
    assert summarise({"x": rounds}) == {"x": {"tokens_per_second": 2, "peak_mib": 7}}


def test_the_peak_holds_what_was_freed():
    reset_peak()
    before = resident_bytes()
    block = mmap.mmap(
        -1, 32 << 20
    )  # of the system, not of memory that an earlier test freed and this process kept
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    block.close()
    assert peak_bytes() >= before + (24 << 20)


def test_the_machine_is_named():
    assert f"torch {torch.__version__}" in environment_line()
