"""The table of a sweep: one row a combination, mean and spread over seeds."""

import json
import statistics

import pytest
import yaml
from interloom.train.commands.sweep_table import main, sweep_table


def write_run(folder, name, seed, hard, groups, score):
    run = folder / name
    run.mkdir(parents=True)
    vision = {"assign_hard": hard, "num_group_tokens": [groups, 0], "num_output_groups": [groups, 0]}
    config = {"seed": seed, "model": {"config": {"vision_config": vision}}, "optim": {"lr": 0.001}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.json").write_text(json.dumps({"segmentation/miou": score, "train/loss": 1.0}))


def test_rows_are_combinations_and_seeds_are_averaged(tmp_path, capsys):
    scores = {}
    for i, (hard, groups, seed) in enumerate(
        (hard, groups, seed) for hard in (True, False) for groups in (4, 8) for seed in (0, 1, 2)
    ):
        score = 0.1 * i + 0.01 * seed * groups
        scores.setdefault((hard, groups), []).append(score)
        write_run(tmp_path / "sweep", f"run{i:02d}", seed, hard, groups, score)
    (tmp_path / "sweep" / "latest").symlink_to("run00")
    assert main([str(tmp_path / "sweep")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| assign_hard | num_group_tokens | segmentation/miou | seeds |"
    assert len(lines) == 2 + 4
    for (hard, groups), values in scores.items():
        cell = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        assert f"| {hard} | [{groups}, 0] | {cell} | 3 |" in lines


def test_errors_say_what_is_missing(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sweep_table(tmp_path / "none", ["segmentation/miou"])
    with pytest.raises(ValueError, match="no finished run"):
        sweep_table(tmp_path, ["segmentation/miou"])
    write_run(tmp_path, "run", 0, True, 4, 0.5)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--metric", "nothing"])
    assert "has no metric nothing" in capsys.readouterr().err
