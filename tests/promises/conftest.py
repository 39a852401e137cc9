"""Runs the command in a process of its own whose time and memory are limited, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

MEMORY = 2 * 2**30  # bytes that a case may take
SECONDS = 20  # of processor time
_PATIENCE = 150  # seconds on the wall, on a machine that others use too


@dataclass(frozen=True)
class Ending:
    """How a command ended: exit code (negative: a signal), its output, peak bytes, seconds of processor time."""

    code: int
    out: str
    err: str
    peak: int
    seconds: float

    @property
    def sentence(self) -> str:
        """The one line that says what was wrong."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line

    def check(self, code: int) -> None:
        """What holds for every case."""
        said = self.out + self.err
        assert self.code == code, f"{self.code}, {self.seconds:.1f} s, {self.peak:,} bytes: {said[-3000:]}"
        assert "Traceback" not in said, said[-3000:]
        assert "weights_only" not in said
        assert all(c in "\n\t" or c.isprintable() for c in said), "a control character reaches the terminal"
        assert self.peak < MEMORY, f"{self.peak:,} bytes"
        assert self.seconds < SECONDS, f"{self.seconds:.1f} s"
        if code == 2:
            assert self.sentence.endswith((".", "?", "`")) or len(self.sentence) > 20


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _family(process: int) -> list[int]:
    found = [process]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _family(int(child))
    return found


@pytest.fixture
def limited(tmp_path: Path) -> Callable[..., Ending]:
    """Runs ``call()``, which returns an exit code, in a forked process; everything heavy is imported already."""
    import datasets  # noqa: F401
    import h5py  # noqa: F401
    import interloom.train.checkpointing.load
    import interloom.train.cli
    import interloom.train.commands.convert
    import interloom.train.commands.hydra_run
    import interloom.train.commands.segment  # noqa: F401
    from interloom.models import GroupViTModel, GroupViTProcessor  # noqa: F401

    def run(call: Callable[[], int], cwd: Path | None = None) -> Ending:
        out, err = tmp_path / ".stdout", tmp_path / ".stderr"
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                for number, path in ((1, out), (2, err)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
                sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
                os.chdir(cwd or tmp_path)
                resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                code = call()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        peak, deadline = 0, time.monotonic() + _PATIENCE
        while True:
            done, status, usage = os.wait4(process, os.WNOHANG)
            if done:
                break
            peak = max(peak, sum(map(_resident, _family(process))))
            if peak > MEMORY or time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        return Ending(
            os.waitstatus_to_exitcode(status),
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
            max(peak, usage.ru_maxrss * 1024),
            usage.ru_utime + usage.ru_stime,
        )

    return run
