"""A sweep as a table: runs that differ in their seed alone are averaged.

    python -m interloom.train.sweep_table runs/groupvit_ablation [--metric segmentation/miou]

reads ``config.yaml`` and ``metrics.json`` of every run below the folder, finds the settings that differ between
runs, and prints a Markdown table: one row for each combination, mean, standard deviation and number of seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.received_config import read_config
from ..runs import CONFIG, METRICS, read_metrics

# Settings that tell runs apart without being what a sweep varies.
_IGNORED = ("seed", "run_id", "ckpt_path")


def sweep_table(folder: str | Path, metrics: Sequence[str]) -> str:
    """Markdown table of the finished runs directly below ``folder``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no finished run, or a metric that a run lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of an experiment's runs.")
    runs = [
        (_flat(read_config(run / CONFIG)), read_metrics(run))
        for run in sorted(folder.iterdir())
        if not run.is_symlink() and (run / CONFIG).is_file() and (run / METRICS).is_file()
    ]
    if not runs:
        raise ValueError(f"{folder} holds no finished run; start one with `interloom train -m experiment=…`.")
    varied = _varied([settings for settings, _ in runs])
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for settings, scores in runs:
        missing = [metric for metric in metrics if metric not in scores]
        if missing:
            raise ValueError(
                f"a run of {folder} has no metric {missing[0]}; it has {', '.join(sorted(scores))}."
            )
        rows.setdefault(tuple(str(settings.get(key)) for key in varied), []).append(scores)
    header = [key.rpartition(".")[2] for key in varied] + [*metrics, "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for values, scores in rows.items():  # in the order of the sweep
        cells = [*values, *(_mean_and_spread([s[metric] for s in scores]) for metric in metrics)]
        lines.append("| " + " | ".join([*cells, str(len(scores))]) + " |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _varied(settings: list[dict[str, Any]]) -> list[str]:
    """Settings that differ between runs; of those that always change together, the first."""
    found: dict[tuple[str, ...], str] = {}
    for key in sorted({key for own in settings for key in own}):
        if key.rpartition(".")[2] in _IGNORED:
            continue
        values = [str(own.get(key)) for own in settings]
        if len(set(values)) > 1:
            order = list(dict.fromkeys(values))
            found.setdefault(tuple(str(order.index(value)) for value in values), key)
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m interloom.train.sweep_table", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metric", action="append", help="may be given several times")
    given = parser.parse_args(arguments)
    try:
        print(sweep_table(given.folder, given.metric or ["segmentation/miou"]))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
