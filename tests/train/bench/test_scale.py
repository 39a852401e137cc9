"""The figures of ``interloom bench scale``, without timing anything that counts."""

import sys

import pytest
from interloom.train.bench.scale import command, guard_seconds, run_all, summarise
from interloom.train.cli import main


def test_rounds_are_summarised():
    speeds = {"one": [90.0, 100.0, 400.0], "ranks": [185.0, 1.0, 190.0], "apart": [195.0, 190.0, 200.0]}
    figures = summarise(speeds, {"one": 0.2, "ranks": 0.5}, guards=0.001, ranks=2, batch=10)
    assert figures["weak_scaling"] == pytest.approx(1.85)
    assert figures["machine_limit"] == pytest.approx(1.95)
    assert figures["step_seconds"] == pytest.approx(20 / 185)
    assert figures["guard_share"] == pytest.approx(0.001 * 185 / 20)
    interval = figures["checkpoint_interval_steps"]
    assert figures["checkpoint_share_one"] == pytest.approx(0.2 / (interval * 0.1))
    assert figures["checkpoint_share_ranks"] == pytest.approx(0.5 / (interval * 20 / 185))


def test_weak_scaling_gives_every_rank_the_same_share(tmp_path):
    one, several = (command(tmp_path, "x", ranks, 4, 10, []) for ranks in (1, 3))
    assert "data.batch_size=10" in one
    assert {"data.batch_size=30", "trainer=ddp", "trainer.devices=3"} <= set(several)


def test_a_run_that_fails_says_why(tmp_path):
    line = [sys.executable, "-c", "import sys; sys.exit('no room for it')"]
    with pytest.raises(ValueError, match="no room for it"):
        run_all(tmp_path, {"one": line})


def test_guards_are_timed_between_two_ranks():
    assert 0 < guard_seconds() < 1


def test_impossible_settings(capsys):
    assert main(["bench", "scale", "--steps", "1"]) == 2
    assert "at least" in capsys.readouterr().err
