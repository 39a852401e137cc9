"""Tables on the screen and in files, and the command's flags."""

import csv
import json

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs it, the kernels do not")
from interloom.kernels.bench import cli
from interloom.kernels.bench.compiled import read_table
from interloom.kernels.bench.count import Count
from interloom.kernels.bench.count import main as count_main
from interloom.kernels.bench.devices import modelled_seconds
from interloom.kernels.bench.report import Table, markdown, show, write
from interloom.train.cli import main

COUNT = Count("group_assign", "GroupViT-S stage 1", "forward", "sm_90", 105, 100, 400, 10, 10, 12, "")
TIMES = {
    "operation": "group_assign",
    "model": "GroupViT-S stage 1",
    "pass": "forward",
    "implementation": "interloom",
    "median ms": 1.0,
    "20% ms": 0.9,
    "80% ms": 1.3,
    "interloom is × faster": None,
    "device": "GPU",
}


def test_modelled_time_is_the_longer_of_bytes_and_flops():
    assert modelled_seconds("sm_90", int(3.35e12), 1) == pytest.approx(1.0)
    assert modelled_seconds("sm_90", 1, int(2 * 989e12)) == pytest.approx(2.0)


def test_files_hold_the_tables(tmp_path):
    tables = [cli._bytes_table([COUNT], "sm_90"), Table("times", "Times", "Measured.", [TIMES])]
    write(tables, tmp_path, "interloom bench kernels")
    assert {path.name for path in tmp_path.iterdir()} == {
        "bytes.csv", "times.csv", "report.md", "bytes.png", "times.png",
    }  # fmt: skip
    with (tmp_path / "bytes.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["moved / floor"] == "1.05"
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "Made by `interloom bench kernels`." in text
    assert "Modelled times are no measurements" in text
    assert markdown(tables, "x").count("| group_assign |") == 2


def test_no_cell_is_cut_on_a_narrow_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    show([cli._code_table(read_table())])
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert all(row.kernel in printed for row in read_table())


def test_a_form_of_an_operation_is_counted_once(monkeypatch, capsys):
    monkeypatch.setattr("interloom.kernels.bench.count.count", lambda operation, model, target: [COUNT])
    count_main(["gated_cross_attention", "IDEFICS-9B", "sm_90"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_quick_json_of_one_operation(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_count", lambda operation, model, target: [COUNT])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--op", "group_assign", "--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"][0]["eager / floor"] == 4.0
    assert {line["operation"] for line in printed["compiled"]} <= {"group_assign"}
    assert "times" not in printed


def test_unknown_names_are_user_errors(capsys):
    assert main(["bench", "kernels", "--op", "flash"]) == 2
    assert "operation 'flash' is not known" in capsys.readouterr().err
    assert main(["bench", "kernels", "--target", "sm_70"]) == 2
    assert "sm_70" in capsys.readouterr().err
