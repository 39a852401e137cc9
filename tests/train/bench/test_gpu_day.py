"""The first run on a GPU, run dry: every line of it, on a CPU, from a checkout that nothing was installed from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "train" / "bench" / "gpu_day.py"

# Stands before the script: what a bare machine lacks cannot be imported.
BARE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lightning", "hydra", "typer", "safetensors", "tokenizers", "PIL",
                                      "huggingface_hub", "webdataset", "omegaconf", "rich"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_dry_run_measures_everything_and_writes_the_same_lines(tmp_path):
    out = tmp_path / "day.jsonl"
    command = [sys.executable, "-c", BARE, str(SCRIPT), "--dry-run", "--out", str(out)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = _rows(out)
    # The profiler of some versions of PyTorch speaks up in between.
    assert rows == [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("checks", "times", "steps")}
    assert rows[0]["part"] == "environment"
    assert {row["ceiling"] for row in rows if row["part"] == "ceilings"} == {"bandwidth", "bfloat16 products"}
    assert all(row["ok"] for row in parts["checks"]), [row for row in parts["checks"] if not row["ok"]]
    assert {row["check"] for row in parts["checks"]} == {
        "accuracy", "model layouts", "poisoned memory", "20 runs", "side stream", "second device", "graph capture",
    }  # fmt: skip
    assert len({row["operation"] for row in parts["checks"]}) == 7
    # FlexAttention has no backward pass on a CPU: a rival that raises leaves the reason, and the rest goes on.
    lost = {row["implementation"] for row in parts["times"] if "reason" in row}
    assert "flex_attention" in lost
    assert lost <= {"flex_attention", "varlen_attn"}
    timed = {row["operation"] for row in parts["times"] if row.get("implementation") == "interloom"}
    assert len(timed) == 7
    assert {(row["model"], row["kernels"], row["checkpointing"]) for row in parts["steps"]} == {
        (model, kernels, checkpointing)
        for model in ("GroupViT-S", "IDEFICS-1B")
        for kernels in ("triton", "torch")
        for checkpointing in (False, True)
        if not checkpointing or any(row["model"] == model and row["checkpointing"] for row in parts["steps"])
    }
    assert {"ms", "mfu", "peak_gb", "synchronisations", "launches", "compilations_after"} <= parts["steps"][
        0
    ].keys()
    assert not [row for row in parts["steps"] if "reason" in row]
    assert rows[-1]["part"] == "end"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "day.jsonl"
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 2
    assert run.stderr.strip().startswith("error: PyTorch finds no GPU here")
    assert not out.exists()


@pytest.mark.faults
def test_what_was_measured_is_in_the_file_when_it_is_killed(tmp_path):
    out = tmp_path / "day.jsonl"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        seen = [json.loads(next(run.stdout)) for _ in range(4)]
        run.kill()
    assert _rows(out)[:4] == seen


@pytest.mark.faults
def test_it_ends_in_time_within_a_measurement(tmp_path):
    out = tmp_path / "day.jsonl"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--minutes", "0.05", "--out", str(out)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode in (0, 3)
    assert "stopped" in out.read_text()
