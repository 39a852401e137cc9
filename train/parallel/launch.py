"""Where ranks come from: a launcher that already ran (torchrun, srun, submitit), or one started here.

Whoever launched, every process ends up with the five variables of torchrun (``RANK``, ``LOCAL_RANK``,
``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), so the rest of the code reads only those.

Plain ``interloom train … trainer.devices=8`` replaces itself by this module's :func:`main`: the agent of torchrun,
which listens on loopback alone (:mod:`.loopback`), forwards SIGUSR1 too, gives the ranks two minutes to save, and ends
with their exit code instead of 1: 143 where they stopped on request, 2 where the user gave something that cannot work.
(Lightning's own launcher would run ``sys.argv`` again, without the verb, each process with a run directory of its own.)
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib.util import find_spec
from shutil import which
from typing import NoReturn

from ..exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from .early_signals import heed_early_signals
from .loopback import ADDRESS, AGENT, BACKEND, end_with_agent, listen_on_loopback, register_rendezvous

# torchrun kills after 30 s; the save of a large model to a slow disk may take longer.
GRACE_SECONDS = 120
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def adopt_launcher() -> int:
    """Give this process torchrun's variables where another launcher started it; the number of processes.

    Raises:
        ValueError: a launcher's variables are incomplete.
    """
    end_with_agent()
    if "WORLD_SIZE" in os.environ:
        _check_complete()
    elif "SUBMITIT_EXECUTOR" in os.environ:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        if JobEnvironment().num_tasks > 1:
            # Devices are chosen by local rank, as under torchrun: every process sees all of them.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Set by srun for its tasks; a batch script's own shell has the job's SLURM_NTASKS but no step of several.
        _adopt_srun()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_complete() -> None:
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    missing = [
        n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n, "").strip()
    ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {', '.join(missing)} is not; start the processes with "
            "torchrun or srun, or unset WORLD_SIZE."
        )


def _adopt_srun() -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    environment = os.environ
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    # Steps of one job must not meet at one port, jobs on one machine neither.
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    environment.setdefault("MASTER_PORT", str(15000 + (job * 37 + step) % 20000))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["GROUP_RANK"] = environment.get("SLURM_NODEID", "0")
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]


def scheduled_run_id() -> str | None:
    """A name that a SLURM job keeps when it is requeued, or None outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_STEP_ID" not in os.environ:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}" if array else job
    step = os.environ["SLURM_STEP_ID"]
    return f"slurm-{name}" if step == "0" else f"slurm-{name}-{step}"


def check_launcher(arguments: list[str]) -> None:
    """Say what a launcher named on the command line lacks, before anything is composed or written.

    Raises:
        ValueError: the package or the cluster is not there.
    """
    chosen = [a.removeprefix("hydra/launcher=") for a in arguments if a.startswith("hydra/launcher=submitit")]
    if not chosen:
        return
    if find_spec("submitit") is None:
        raise ValueError(
            f"hydra/launcher={chosen[0]} needs hydra-submitit-launcher; install interloom[slurm]."
        )
    composing = {"-c", "--cfg", "-i", "--info", "-h", "--help"} & set(arguments)
    if chosen[0] == "submitit_slurm" and not composing and which("srun") is None:
        raise ValueError(
            "hydra/launcher=submitit_slurm finds no srun here; run it on a machine of the cluster, or use "
            "hydra/launcher=submitit_local."
        )


def in_submitit_job() -> bool:
    """Whether this process was started by ``hydra/launcher=submitit_…`` to run one setting of a sweep."""
    return "SUBMITIT_EXECUTOR" in os.environ


def leave_submitit_job(*, requeue: bool) -> NoReturn:
    """End a submitit job that stopped on request and is saved; where asked, rank 0 puts it into the queue again."""
    handler = signal.getsignal(signal.SIGUSR2)
    if requeue and callable(handler):
        handler(signal.SIGUSR2, None)  # submitit's own: it counts timeouts, requeues and exits
    sys.exit(STOPPED)


def become_torchrun(devices: int, arguments: list[str], module: str = "interloom.train") -> None:
    """Replace this process by torchrun's agent over ``devices`` processes of ``python -m module arguments``."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", __name__, str(devices), module, *arguments])


def main(arguments: list[str]) -> int:
    """Run a module in several processes and return the exit code that fits theirs.

    Args:
        arguments: the number of processes, the module, then what it is given.
    """
    devices, module, *rest = arguments
    # Every rank its share of the cores; torchrun would say in a banner that it chose 1.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(devices))))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Ranks say themselves what is wrong; the agent would add a page about exit codes.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    listen_on_loopback(os.environ)
    register_rendezvous()
    os.environ[AGENT] = str(os.getpid())
    options = [f"--rdzv_backend={BACKEND}", f"--rdzv_endpoint={ADDRESS}:0", f"--nproc_per_node={devices}"]
    options += [f"--signals_to_handle={FORWARDED}", f"--shutdown_timeout={GRACE_SECONDS}"]
    try:
        run(parse_args([*options, "-m", module, *rest]))
    except ChildFailedError as error:
        return exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, module)
    except SignalException as stop:
        return STOPPED if stop.sigval in {signal.SIGTERM, signal.SIGUSR1} else 128 + int(stop.sigval)
    return 0


def exit_code(codes: dict[int, int], module: str = "interloom.train") -> int:
    """What the ranks that failed first (rank to exit code) make of the whole run."""
    for stopped in (STOPPED, INTERRUPTED):  # ranks leave together once all is saved
        if stopped in codes.values():
            return stopped
    if USER_ERROR in codes.values():  # that rank has said why; without it the others could not go on
        return USER_ERROR
    for rank, code in sorted(codes.items()):
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"rank {rank} {how}", file=sys.stderr)
    if module == "interloom.train":
        print("ckpt_path=last continues from the last checkpoint", file=sys.stderr)
    return 1


if __name__ == "__main__":
    heed_early_signals()
    sys.exit(main(sys.argv[1:]))
