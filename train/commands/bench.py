"""``interloom bench``: kernels, model or data, each imported only when it is called."""

from __future__ import annotations

from importlib import import_module

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Time kernels, models and data reading.")

_COMMANDS = {
    "kernels": ("interloom.kernels.bench.cli", "Bytes, compiled code and, on a GPU, times of the kernels."),
    "model": ("interloom.train.bench.model", "Decoding with IDEFICS beside Transformers."),
    "data": ("interloom.train.bench.data", "Reading of pairs and documents beside other readers."),
    "scale": ("interloom.train.bench.scale", "Weak scaling over ranks; what guards and checkpoints cost."),
}


def _register(name: str, module: str, summary: str) -> None:
    def run(context: typer.Context) -> object:
        whole = typer.Typer(add_completion=False)
        whole.command(name)(getattr(import_module(module), name))
        command = typer.main.get_command(whole)
        return command.main(args=context.args, prog_name=f"interloom bench {name}", standalone_mode=False)

    # Flags, --help among them, belong to the command that is yet to be imported.
    passing = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=summary, context_settings=passing)(run)


for _name, (_module, _summary) in _COMMANDS.items():
    _register(_name, _module, _summary)
