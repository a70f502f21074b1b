"""The lock on the output folder."""

import errno
import fcntl

import pytest
from filelock import FileLock

from common.errors import ConfigError
from training.config import TrainConfig
from training.run_folder import LOCK_FILE, clear_run, locked_folder


def config_in(folder):
    return TrainConfig(output_dir=str(folder))


def test_a_folder_in_use_is_refused(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    messages = []
    with (
        FileLock(folder / LOCK_FILE),
        pytest.raises(ConfigError, match="is in use by another run"),
        locked_folder(config_in(folder), 0.3, messages.append),
    ):
        pass
    assert "waiting up to 0 s" in messages[0]


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch):
    """A lock by the existence of a file would outlive a killed run."""

    def unsupported(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    messages = []
    for _ in range(2):
        with locked_folder(config_in(tmp_path / "out"), 0, messages.append):
            (tmp_path / "out" / "loss.json").write_text("{}")
    assert len(messages) == 2
    assert all("cannot be locked" in message for message in messages)


def test_a_folder_that_cannot_be_created_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"--output_dir .*: cannot be created"),
        locked_folder(config_in(tmp_path / "file" / "out"), 0, print),
    ):
        pass


def test_starting_again_removes_the_pictures_of_the_old_run(tmp_path):
    for name in ("preview.png", "loss.png", "loss.json", "lora.safetensors"):
        (tmp_path / name).write_text("old")
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
