"""Whether a SLURM can schedule what a sweep asks of it, before anything is submitted.

A job that fits no node is refused by some clusters with SLURM's own words and left to wait for ever by others.
"""

from __future__ import annotations

import subprocess

# What fast GPUs want of decoding; fewer where no node has as many for each of its tasks.
CPUS_PER_TASK = 12
_CPUS, _GPUS = "hydra.launcher.cpus_per_task", "hydra.launcher.gpus_per_node"


def nodes() -> list[tuple[int, bool]]:
    """CPUs of every kind of node and whether it has GPUs; empty where SLURM does not say."""
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%c %G"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        count, _, resources = line.strip().partition(" ")
        if count.rstrip("+").isdigit():
            found.append((int(count.rstrip("+")), "gpu" in resources))
    return found


def fitted(arguments: list[str]) -> list[str]:
    """The arguments of a sweep with CPUs and GPUs that a node has, where they do not name any themselves.

    Raises:
        ValueError: no node of this cluster can run the job.
    """
    if "hydra/launcher=submitit_slurm" not in arguments or not (known := nodes()):
        return arguments
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    devices = _number(given.get("trainer.devices"), 1)
    cpus = max(count for count, _ in known)
    each = _number(given.get(_CPUS), 0)
    if devices * max(1, each) > cpus:
        asks = f"{devices} tasks" + (f" of {each} CPUs" if each else "")
        raise ValueError(
            f"no node of this cluster has CPUs for {asks}, the largest has {cpus}; lower trainer.devices or {_CPUS}, "
            "or use more nodes (trainer.num_nodes)."
        )
    added = [] if _CPUS in given else [f"{_CPUS}={max(1, min(CPUS_PER_TASK, cpus // devices))}"]
    if not any(gpus for _, gpus in known) and _GPUS not in given:
        if given.get("trainer.accelerator") in {"gpu", "cuda"} or given.get("trainer") == "gpu":
            raise ValueError(
                f"no node of this cluster has GPUs that SLURM knows of; use trainer.accelerator=cpu, or {_GPUS}=null "
                "where they are not SLURM's to give."
            )
        added.append(f"{_GPUS}=null")
    return [*arguments, *added]


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() else otherwise
