"""Links and pipes in a folder that somebody sent are not followed and do not block."""

import os
from pathlib import Path

import pytest

from normlab.core.files import locked, write_atomic
from normlab.core.places import MOST_TEXT, check_regular, make_folder, read_text
from normlab.errors import DataError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to("folder")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("name", ["link", "folder", "to folder", "pipe"])
def test_only_a_regular_file_is_read(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match="put the file itself in its place"):
        read_text(folder / name)
    assert read_text(folder / "file") == "content"


def test_a_link_that_the_user_names_is_what_it_leads_to(folder: Path) -> None:
    check_regular(folder / "link", follow=True)
    with pytest.raises(DataError, match="a folder"):
        check_regular(folder / "to folder", follow=True)


def test_text_is_read_up_to_a_bound(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as f:
        f.truncate(MOST_TEXT + 1)
    with pytest.raises(DataError, match="larger than 16 MiB"):
        read_text(tmp_path / "large")


@pytest.mark.parametrize("name", ["link", "file", "to folder", "pipe"])
def test_only_a_real_folder_is_written_to(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="remove it"):
        make_folder(folder / name)
    make_folder(folder / "folder")
    make_folder(folder / "new")
    assert (folder / "new").is_dir()


def test_neither_a_temporary_file_nor_a_lock_is_written_through_a_link(folder: Path) -> None:
    (folder / f".new.{os.getpid()}.tmp").symlink_to("file")
    write_atomic(folder / "new", b"other")
    assert (folder / "new").read_bytes() == b"other"
    (folder / ".lock").symlink_to("file")
    with pytest.raises(DataError, match="link"), locked(folder):
        pass
    assert (folder / "file").read_text() == "content"
