"""The loss and the gates of an IDEFICS run as a picture.

Command: ``python -m interloom.train.evaluation.pictures.curves RUN``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ...files import open_atomically
from ...runs import METRICS_TABLE, MetricsTable

CURVES = "curves.png"
GATE = "train/gate/"


def draw_curves(run_dir: Path, path: Path | None = None) -> Path:
    """Write the PNG, by default ``curves.png`` in the run directory.

    Left the loss of the steps that ``metrics.csv`` has, right the size of every gate, |tanh(alpha)|.

    Raises:
        ValueError: there is no table, or it has no losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    rows = [row for row in MetricsTable(run_dir / METRICS_TABLE).rows() if row.get("train/loss")]
    if not rows:
        raise ValueError(f"{run_dir} has no losses in {METRICS_TABLE}; give the directory of a training run.")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, gates = figure.subplots(1, 2)
    loss.plot([int(row["step"]) for row in rows], [float(row["train/loss"]) for row in rows], linewidth=0.9)
    loss.set(xlabel="step", ylabel="loss, nats a token", yscale="log")
    for axis in (loss.yaxis.set_major_formatter, loss.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    for name in sorted({name for row in rows for name in row if name.startswith(GATE)}):
        part, layer = name.removeprefix(GATE).rsplit("_", 1)
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        style = "-" if part == "attention" else "--"
        label = f"{part}, layer {layer}"
        gates.plot(*zip(*points, strict=True), style, color=f"C{int(layer) % 10}", label=label, linewidth=1.2)
    gates.set(xlabel="step", ylabel="|tanh(alpha)|", ylim=(0, 1))
    if gates.get_legend_handles_labels()[0]:
        gates.legend(fontsize=7)
    path = path or run_dir / CURVES
    with open_atomically(path) as file:
        figure.savefig(file, dpi=110, format="png")
    return path


if __name__ == "__main__":
    print(draw_curves(Path(sys.argv[1])))
