"""What a checkpoint must hold for a run to go on from it: looked at before anything of the run is changed."""

from __future__ import annotations

from typing import Any

# Where Lightning keeps the number of optimiser steps; ``trainer.global_step`` of a resumed run is read from there.
_LOOP, _PROGRESS = "fit_loop", "epoch_loop.manual_optimization.optim_step_progress"


def check_resumed(checkpoint: dict[str, Any], saved: dict[str, Any], max_steps: int) -> None:
    """Check the step, the loops and the optimiser of a checkpoint against one another.

    Args:
        checkpoint: the whole of it, in Lightning's form.
        saved: this trainer's own part.
        max_steps: of the run.

    Raises:
        ValueError: a part is missing, empty or does not fit the others.
    """
    step = saved.get("step")
    if type(step) is not int or not 0 <= step <= max_steps:
        raise ValueError(
            f"ckpt_path holds a checkpoint of step {step!r}, expected 0 to trainer.max_steps={max_steps}; give another "
            "checkpoint, or raise trainer.max_steps."
        )
    loops = checkpoint.get("loops")
    progress = loops.get(_LOOP, {}).get(_PROGRESS) if isinstance(loops, dict) else None
    if not isinstance(progress, dict):
        raise ValueError(
            "ckpt_path has no state of the training loop (loops), so where it stopped is unknown; give another "
            "checkpoint, or start from its weights with model.init_checkpoint."
        )
    done = progress.get("total", {}).get("completed")
    if done != step or checkpoint.get("global_step") != step:
        raise ValueError(
            f"ckpt_path contradicts itself: its own step is {step}, its training loop's {done!r}, its global_step "
            f"{checkpoint.get('global_step')!r}; give another checkpoint."
        )
    counts = saved.get("counts", {})
    if not isinstance(counts, dict) or not all(type(n) is int and 0 <= n <= step for n in counts.values()):
        raise ValueError(f"ckpt_path counts steps it has not made ({counts!r}); give another checkpoint.")
    states = checkpoint.get("optimizer_states")
    if not isinstance(states, list) or not all(isinstance(state.get("state"), dict) for state in states):
        raise ValueError(
            "ckpt_path has no state of the optimiser (optimizer_states); give another checkpoint."
        )
    # Steps that were skipped, all of them perhaps, leave an optimiser without state.
    changed = step - counts.get("nonfinite_steps", 0) - counts.get("empty_steps", 0)
    if changed > 0 and not any(state["state"] for state in states):
        raise ValueError(
            f"ckpt_path has an empty optimiser after {step} steps, so its moments are lost; give another "
            "checkpoint, or start from its weights with model.init_checkpoint."
        )
