"""Each backend's own files, read back without the network, hold what ``metrics.csv`` holds, a resumed run included."""

import csv
import importlib.util
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import pytest
from interloom.train.callbacks import loggers
from interloom.train.callbacks.loggers import TRACKERS, Tracker, flat, guarded
from interloom.train.cli import main
from PIL import Image

INSTALLED = [name for name, tracker in TRACKERS.items() if importlib.util.find_spec(tracker.package)]
STEPS = 4


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """A run of all installed loggers that stopped at step 2 and went on, with a picture at its end."""
    root = tmp_path_factory.mktemp("logged")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRACKIO_DIR", str(root / "trackio"))
    patch.setenv("INTERLOOM_RUN_ID", "the-run")
    whole = loggers.log_results

    def with_a_picture(config, trackers, run_dir, *rest):
        Image.new("RGB", (8, 4), (9, 8, 7)).save(run_dir / "shown.png")
        whole(config, trackers, run_dir, *rest)

    patch.setattr("interloom.train.fitting.log_results", with_a_picture)
    command = [
        "train", *tiny_world.overrides, "name=run", f"runs_dir={root}", f"trainer.max_steps={STEPS}",
        "callbacks.checkpoint.every_steps=2", "logger.artifacts=true", *(f"logger.{name}=true" for name in INSTALLED),
    ]  # fmt: skip
    from interloom.train.callbacks.metrics import MetricsCallback

    after = MetricsCallback.on_train_batch_end

    def stops(self, trainer, *rest):
        after(self, trainer, *rest)
        if trainer.global_step == 3:  # logged, and in no checkpoint: the step is done, and logged, again
            raise RuntimeError("the machine is gone")

    with pytest.MonkeyPatch.context() as dying:
        dying.setattr(MetricsCallback, "on_train_batch_end", stops)
        with pytest.raises(RuntimeError, match="is gone"):
            main(command)
    assert main([*command, "ckpt_path=last"]) == 0
    yield root
    patch.undo()


def leveldb_records(data):
    """The records of a log in LevelDB's format: blocks of 32 KiB, in them parts with checksum, length and kind."""
    place, parts = 7, []  # after the header of the file
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def wandb_records(root):
    from wandb.proto import wandb_internal_pb2

    for file in sorted(root.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield file, record


def read_wandb(root):
    rows, settings, pictures = defaultdict(dict), {}, 0
    names = set()
    for _, record in wandb_records(root):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            names.add(record.run.run_id)
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            step = record.history.step.num
            # An image's entry is a mapping, or its parts one by one.
            kinds = [
                v.get("_type") if isinstance(v, dict) else v if k.endswith("/_type") else ""
                for k, v in items.items()
            ]
            pictures += sum("image" in str(kind) for kind in kinds)
            rows[step] |= {
                k: v for k, v in items.items() if isinstance(v, int | float) and not k.startswith("_")
            }
    assert names == {"the-run"}
    return rows, flat(settings), pictures


def read_tensorboard(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "run" / "the-run" / "tensorboard"))
    events.Reload()
    rows = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        found = [event.step for event in events.Scalars(name)]
        assert len(set(found)) == len(found) or name in read_scores(root), (name, found)
        for event in events.Scalars(name):
            rows[event.step][name] = event.value
    import yaml

    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return (
        rows,
        flat(yaml.safe_load("\n".join(line[4:] for line in text.splitlines()))),
        len(events.Tags()["images"]),
    )


def read_mlflow(root):
    from mlflow.tracking import MlflowClient

    client = MlflowClient((root / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("interloom")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    rows = defaultdict(dict)
    for name in found.data.metrics:
        for entry in client.get_metric_history(found.info.run_id, name):
            rows[entry.step][name] = entry.value
    pictures = client.list_artifacts(found.info.run_id, "pictures/shown")
    assert {Path(file.path).name for file in client.list_artifacts(found.info.run_id, "model")} >= {
        "config.json"
    }
    return rows, found.data.params, len(pictures)


def read_trackio(root):
    import sqlite3

    (file,) = (root / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        values = base.execute("select step, metrics from metrics order by id").fetchall()
        ((settings,),) = base.execute("select config from configs").fetchall()
    rows, pictures = defaultdict(dict), 0
    for step, text in values:
        found = json.loads(text)
        pictures += sum(isinstance(value, dict) for value in found.values())
        rows[step] |= {name: value for name, value in found.items() if not isinstance(value, dict)}
    return rows, json.loads(settings), pictures


def read_scores(root):
    return json.loads((root / "run" / "the-run" / "metrics.json").read_text())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_backend_holds_what_the_table_holds(run, name):
    if name not in INSTALLED:
        pytest.skip(f"the extra {name} is not installed")
    rows, settings, pictures = globals()[f"read_{name}"](run)
    with open(run / "run" / "the-run" / "metrics.csv", newline="") as file:
        table = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert sorted(table) == sorted(rows) == [1, 2, 3, 4]
    for step, row in table.items():
        for column, cell in row.items():
            if cell and not (
                step == STEPS and column in read_scores(run)
            ):  # the scores of the whole run stand there
                assert math.isclose(float(rows[step][column]), float(cell), rel_tol=1e-6), (step, column)
    assert rows[STEPS]["train/steps"] == STEPS
    assert str(settings["model.config.text_config.vocab_size"]) == "64"
    assert str(settings["data.batch_size"]) == "8"
    assert pictures == 1


def test_a_logger_that_fails_is_left_out(capsys):
    class Broken(Tracker):
        def open(self, *_): ...
        def log_image(self, *_): ...
        def log_text(self, *_): ...
        def log_model(self, *_): ...
        def close(self): ...
        def log_metrics(self, *_, **__):
            raise ConnectionError("no route")

    from types import SimpleNamespace

    broken = Broken(SimpleNamespace(name="x"), Path("y"))
    for _ in range(2):
        guarded([broken], lambda tracker: tracker.log_metrics({}))
    assert capsys.readouterr().err.count("no route") == 1


def test_a_missing_extra_is_named(tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loggers.TrackioTracker, "package", "no_such_package")
    assert main(["train", *tiny_world.overrides, f"runs_dir={tmp_path}", "logger.trackio=true"]) == 2
    assert "interloom[trackio]" in capsys.readouterr().err
