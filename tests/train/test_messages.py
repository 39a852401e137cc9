"""What others named is shown to the user, never obeyed by the terminal."""

from __future__ import annotations

import io

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
