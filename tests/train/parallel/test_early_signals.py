"""Signals that come before, or after, there is anything to save; and what a rank says that lost another."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from interloom.train.parallel.ranks import rank_lost

WAIT = """
import sys, time
from interloom.train.parallel.early_signals import fail_from_now_on, heed_early_signals
heed_early_signals()
if len(sys.argv) > 1:
    fail_from_now_on()
print("ready", flush=True)
time.sleep(3 if len(sys.argv) > 1 else 300)
sys.exit(1)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("arguments", "code"), [([], 143), (["failing"], 1)])
def test_a_signal_during_imports_is_a_stop(number: signal.Signals, arguments: list[str], code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert ("stopped on request" in said) == (code == 143)


def test_a_lost_rank_is_one_sentence() -> None:
    gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5017\n"
        "Exception raised from …\nframe #0: …"
    )
    said = str(rank_lost(gloo))
    assert said.startswith("rank 0 lost another rank")
    assert "gloo" not in said
    assert rank_lost(RuntimeError("shapes do not fit")) is None
    assert rank_lost(KeyError("closed by peer")) is None
