"""What counts as inside a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from interloom.models.inside import Outside, inside, is_inside


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    (tmp_path / "secret.txt").write_text("s")
    (tmp_path / "data-two").mkdir()
    (folder / "link").symlink_to("sub/a.txt")
    (folder / "out").symlink_to("../secret.txt")
    (folder / "up").symlink_to("..")
    return folder


@pytest.mark.parametrize(
    "name", ["sub/a.txt", "sub/../sub/a.txt", "link", "not there", "ünï cödé", "./sub/a.txt"]
)
def test_names_inside(place: Path, name: str) -> None:
    assert inside(place, name) == place / name


def test_an_absolute_name_inside(place: Path) -> None:
    assert inside(place, str(place / "sub" / "a.txt")) == place / "sub" / "a.txt"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "sub/../../secret.txt",
        "/etc/hostname",
        "../data-two/x",
        "out",
        "up/secret.txt",
        "",
        ".",
        "sub/..",
        "a\0b",
        "..\\secret.txt",
        "\ud800",
    ],
)
def test_names_outside(place: Path, name: str) -> None:
    with pytest.raises(Outside, match=r"folder|file name"):
        inside(place, name)
    assert not is_inside(place, name)


def test_followed_links_lead_anywhere_but_names_do_not(place: Path) -> None:
    assert is_inside(place, "out", follow_links=True)
    assert is_inside(place, "up/secret.txt", follow_links=True)
    assert not is_inside(place, "../secret.txt", follow_links=True)


def test_the_folder_may_be_a_link(place: Path, tmp_path: Path) -> None:
    os.symlink(place, tmp_path / "latest")
    assert is_inside(tmp_path / "latest", "sub/a.txt")


def test_a_hub_snapshot_links_to_its_own_store(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "other.json").symlink_to("../../../elsewhere")
    assert is_inside(snapshot, "config.json")
    assert not is_inside(snapshot, "other.json")
