"""Folders that the tools read and write: with links, with other programs' weights, and when a rename fails."""

import os
from pathlib import Path

import pytest

from training.files import WriteError, new_folder


def filled(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(name)
    return folder


def replace(path: Path) -> None:
    with new_folder(path) as beside:
        (beside / "new").write_text("new")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    path, rename = filled(tmp_path / "out", "old"), Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match="out could not be written: no"):
        replace(path)
    assert names(path) == {"old"}
    assert names(tmp_path) == {"out"}


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    filled(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "real"
    assert names(tmp_path / "real") == {"new"}
    assert names(tmp_path) == {"real", "link"}


def test_the_folder_one_is_in_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(filled(tmp_path / "here", "old"))
    replace(Path("."))
    assert names(tmp_path / "here") == {"new"}
    assert names(tmp_path) == {"here"}
