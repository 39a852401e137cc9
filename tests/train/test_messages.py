"""What others named is shown to the user, never obeyed by the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from interloom.train.cli import fail
from interloom.train.messages import console, show, tell, visible, without_secrets

HOSTILE = "a\x1b[2J\x1b]52;c;eA==\x07\u202egpj.exe\x9b31m\r\x00\u2028b\ud800"


def harmless(text: str) -> bool:
    return all(c in "\n\t" or c.isprintable() for c in text)


def test_control_characters_are_escaped() -> None:
    shown = visible(HOSTILE)
    assert harmless(shown)
    assert shown.startswith(r"a\x1b[2J")
    assert visible("plain été 日本語 👩‍👩‍👧 नमस्ते\n\t") == "plain été 日本語 👩‍👩‍👧 नमस्ते\n\t"
    assert visible("a\nb", keep="") == r"a\nb"
    assert visible(shown) == shown


def test_every_way_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tell(HOSTILE)
    show(HOSTILE)
    show(HOSTILE, end="")
    assert fail(f"{HOSTILE} is\nnot a file.") == 2
    captured = capsys.readouterr()
    assert harmless(captured.out)
    assert harmless(captured.err)
    assert captured.err.splitlines()[-1].startswith("error: ")


def test_tables_are_escaped_too() -> None:
    from rich.table import Table

    stream = io.StringIO()
    table = Table("name")
    table.add_row(HOSTILE)
    printer = console(file=stream, force_terminal=False, width=200)
    printer.print(table)
    printer.print(HOSTILE, markup=False)
    assert harmless(stream.getvalue())


def test_an_ascii_terminal_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show("été")
    assert raw.getvalue() == b"\\xe9t\\xe9\n"


def test_secrets_of_addresses_are_neither_shown_nor_stored(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "data: ['http://user:SEC@RET@host/a.tar', 's3://b/c?X-Amz-Signature=SECRET&part=2', 'me@example.org']"
    )
    hidden = without_secrets(text)
    assert "SEC" not in hidden
    assert (
        hidden == "data: ['http://***@host/a.tar', 's3://b/c?X-Amz-Signature=***&part=2', 'me@example.org']"
    )
    tell(text)
    show(text)
    fail(text)
    captured = capsys.readouterr()
    assert "SEC" not in captured.out + captured.err


def test_a_sweep_stores_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interloom.train.commands.hydra_run import _environment
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {"overrides": ["data.train=[http://user:SECRET@host/a.tar]"], "seed": "${oc.env:X}"}
    )
    with _environment([], "train"):
        OmegaConf.save(config, tmp_path / "multirun.yaml")
    stored = (tmp_path / "multirun.yaml").read_text()
    assert "SECRET" not in stored
    assert OmegaConf.load(tmp_path / "multirun.yaml").overrides == ["data.train=[http://***@host/a.tar]"]
    OmegaConf.save(config, tmp_path / "plain.yaml")
    assert "SECRET" in (tmp_path / "plain.yaml").read_text()


def test_an_own_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    from interloom.train.commands.own_experiments import check_encoding

    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "mine.yaml"
    own.write_text("# @package _global_\nseed: 3\n", encoding="utf-16")
    arguments = ["--config-dir", str(tmp_path), "experiment=mine"]
    with pytest.raises(ValueError, match=r"mine\.yaml is not UTF-8 text"):
        check_encoding(arguments)
    own.write_text("# @package _global_\nseed: 3\n")
    check_encoding(arguments)


def test_no_address_of_memory_in_what_a_library_says() -> None:
    from interloom.models.pictures import PictureError, open_picture

    with pytest.raises(PictureError) as caught:
        open_picture(b"no picture", "a.png")
    assert "0x" not in str(caught.value)
