"""The ``interloom`` command: one verb a line, each imported only when it is called.

Exit codes: 0 done, 2 the user gave something that cannot work (one line on stderr says what), 1 a fault of
ours (with its traceback) or of the world around (one line), 143 asked to stop and stopped at a checkpoint.
``INTERLOOM_TRACEBACK=1`` shows the traceback of the others too.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .exit_codes import FAULT, USER_ERROR
from .messages import OutsideFault, tell, visible, warn_visibly
from .parallel.early_signals import fail_from_now_on, heed_early_signals
from .runs import product_version


@dataclass(frozen=True)
class Verb:
    """A verb: what it says of itself, where it lives (``module:attribute`` below ``interloom``), its style."""

    help: str
    target: str
    style: str = "typer"  # "hydra" verbs take key=value, "typer" ones flags


VERBS: dict[str, Verb] = {
    "train": Verb(
        "fit a model: experiment=… [overrides], ckpt_path=last resumes", "train.commands.train:train", "hydra"
    ),
    "eval": Verb(
        "score a checkpoint: task=… checkpoint=… data=…", "train.commands.evaluate:evaluate", "hydra"
    ),
    "compose": Verb(
        "an IDEFICS from a language model and an image tower: --text SRC --vision SRC OUT",
        "train.commands.compose:compose",
    ),
    "data": Verb(
        "build, index and check shards: demo, pairs, obelics, plan, verify", "train.commands.data:app"
    ),
    "bench": Verb("time kernels, models, data reading and ranks", "train.commands.bench:app"),
    "segment": Verb(
        'zero-shot segmentation: IMAGE --labels "cat,dog" --out overlay.png', "train.commands.segment:segment"
    ),
    "generate": Verb(
        'interleaved prompt to text: --image a.jpg --prompt "…"', "train.commands.generate:generate"
    ),
    "convert": Verb(
        "any supported checkpoint to safetensors + config.json: SRC DST", "train.commands.convert:convert"
    ),
}


def usage() -> str:
    """The text of ``interloom --help``."""
    lines = ["usage: interloom <verb> …", "", "Train GroupViT and IDEFICS with PyTorch and Triton.", ""]
    lines += [f"  {name:<9} {verb.help}" for name, verb in VERBS.items()]
    lines += [
        "",
        "train and eval are configured by Hydra: key=value, -m for sweeps, --cfg job --resolve to see the result.",
        "The other verbs take flags. `interloom <verb> --help` says more.",
        "",
        "start here:  interloom data demo --out data/demo && interloom train experiment=groupvit_demo",
        "several GPUs: interloom train experiment=… trainer=ddp trainer.devices=8   (or torchrun, srun)",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run ``interloom <verb> …`` and return its exit code."""
    warn_visibly()
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal that is not of UTF-8 shows escapes instead of failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0
    if arguments[0] in {"-V", "--version"}:
        print(f"interloom {product_version()}")
        return 0
    name, *rest = arguments
    verb = VERBS.get(name)
    if verb is None:
        near = difflib.get_close_matches(name, VERBS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the verbs are {', '.join(VERBS)}."
        return fail(f"interloom has no verb {name!r}; {hint}")
    if argv is None and name == "train":
        heed_early_signals()
    run = run_hydra if verb.style == "hydra" else run_typer
    return run(name, verb, rest)


def run_hydra(name: str, verb: Verb, arguments: list[str]) -> int:
    """Call a Hydra verb: a function of the argument list that returns an exit code."""
    return _guard(lambda: load(verb.target)(arguments))


def run_typer(name: str, verb: Verb, arguments: list[str]) -> int:
    """Call a Typer verb: an app, or a plain function with Typer annotations."""

    def call() -> int:
        import typer

        target = load(verb.target)
        if not isinstance(target, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(name)(target)
            target = app
        command = typer.main.get_command(target)
        try:
            # Without standalone mode Typer returns what the command returned and raises what it raised.
            result = command.main(args=arguments, prog_name=f"interloom {name}", standalone_mode=False)
        except typer.Exit as stop:
            return int(stop.exit_code)
        except typer.Abort:
            return 130
        except Exception as error:
            # Wrong flags: Typer keeps its own copy of click, so the class is known by its methods alone.
            format_message = getattr(error, "format_message", None)
            if format_message is None:
                raise
            message = str(format_message()).strip().rstrip(".")
            if not message:  # a command group without a command: its help has been printed
                return USER_ERROR
            return fail(f"{message}; see `interloom {name} --help`.")
        return result if isinstance(result, int) else 0

    return _guard(call)


def load(target: str) -> Any:
    """Import ``package.module:attribute`` below ``interloom``."""
    module, attribute = target.split(":")
    return getattr(import_module(f"interloom.{module}"), attribute)


def fail(message: str) -> int:
    """Print one line for the user and return the exit code of user errors."""
    tell(f"error: {visible(' '.join(message.split()), keep='')}")
    return USER_ERROR


def _said(error: Exception) -> str:
    """An error's own sentence; of a place that the system refused, what is wrong there and what to do."""
    if not isinstance(error, OSError) or error.errno is None or not error.filename:
        return str(error) or type(error).__name__
    if isinstance(error, IsADirectoryError):
        return f"{error.filename} is a folder, where a file is expected; give another path."
    if isinstance(error, FileExistsError | NotADirectoryError):
        return (
            f"{error.filename} is a file or leads through one, where a folder is expected; give another path."
        )
    return f"{error.filename} is not there and cannot be made there; check the path."


def _guard(call: Callable[[], int]) -> int:
    try:
        return call()
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        if os.environ.get("INTERLOOM_TRACEBACK", "0") not in {"", "0"}:
            raise
        return fail(_said(error))
    except OutsideFault as fault:
        fail_from_now_on()
        if os.environ.get("INTERLOOM_TRACEBACK", "0") not in {"", "0"}:
            raise
        fail(str(fault))
        return FAULT
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from ..models.files import refusal

        if refusal(error) is None or os.environ.get("INTERLOOM_TRACEBACK", "0") not in {"", "0"}:
            raise
        return fail(f"{error}; free some space, mend its rights or give another place.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        fail_from_now_on()
        raise
