"""Folders that appear whole or not at all. Oracle: the listing of the parent folder before and after."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lowbit.errors import InputError
from lowbit.io.folder import atomic_folder, check_destination


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A folder with a neighbour and an old model in it."""
    for name, content in (("neighbour.txt", "mine"), ("old/config.json", "{}"), ("old/model.safetensors", "1234")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def write(folder: Path) -> None:
    (folder / "config.json").write_text('{"new": 1}')
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(b"\0\1")


NEW = {"new/config.json": b'{"new": 1}', "new/sub/file": b"\0\1", "new/sub": None, "new": None}


def test_the_folder_is_there_after_the_block_and_not_before(parent: Path) -> None:
    before = tree(parent)
    with atomic_folder(parent / "new") as folder:
        write(folder)
        assert not (parent / "new").exists()
        assert folder.parent == parent  # on the same disk, so that renaming is one step
    assert tree(parent) == before | NEW


def test_folders_above_it_are_made(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "b" / "c") as folder:
        write(folder)
    assert (tmp_path / "a" / "b" / "c" / "config.json").is_file()


def test_an_old_folder_is_replaced_whole(parent: Path) -> None:
    with atomic_folder(parent / "old", overwrite=True) as folder:
        write(folder)
        assert (parent / "old" / "model.safetensors").is_file()
    assert sorted(tree(parent)) == ["neighbour.txt", "old", "old/config.json", "old/sub", "old/sub/file"]


ENDINGS = [
    KeyboardInterrupt(),
    SystemExit(1),
    ValueError("no"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EACCES, "Permission denied"),
    # what safetensors says on a full disk, without an errno
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
@pytest.mark.parametrize("name", ["new", "old"])
def test_whatever_ends_the_block_early_leaves_everything_as_it_was(
    ending: BaseException, name: str, parent: Path
) -> None:
    before = tree(parent)
    with pytest.raises((type(ending), InputError)), atomic_folder(parent / name, overwrite=True) as folder:  # noqa: PT012
        write(folder)
        raise ending
    assert tree(parent) == before


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if "No space" in str(ending)], ids=repr)
def test_a_full_disk_is_said_in_a_sentence(ending: BaseException, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"no space left while writing .*new; nothing was kept"),
        atomic_folder(tmp_path / "new"),
    ):
        raise ending


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=repr)
def test_an_end_between_the_two_renames_brings_the_old_folder_back(
    ending: BaseException, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = tree(parent), os.rename

    def fail_at_the_second(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise ending
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(type(ending)), atomic_folder(parent / "old", overwrite=True) as folder:
        write(folder)
    assert tree(parent) == before


def test_an_existing_folder_is_refused_without_overwrite(parent: Path) -> None:
    with pytest.raises(InputError, match="exists already; choose another folder, or replace it with --overwrite"):
        check_destination(parent / "old", overwrite=False, needed_bytes=1)
    check_destination(parent / "old", overwrite=True, needed_bytes=1)
    check_destination(parent / "new", overwrite=False, needed_bytes=1)


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, None], ids=["a folder of something else", "a file"])
def test_what_is_no_model_is_never_overwritten(content: dict[str, str] | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if content is None:
        out.write_text("mine")
    else:
        out.mkdir()
        for name, text in content.items():
            (out / name).write_text(text)
    with pytest.raises(InputError, match="does not look like a checkpoint"):
        check_destination(out, overwrite=True, needed_bytes=1)


@pytest.mark.parametrize("name", [None, "config.json", "report.json"])
def test_an_empty_folder_a_model_and_a_report_may_be_overwritten(name: str | None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if name is not None:
        (tmp_path / "out" / name).write_text("{}")
    check_destination(tmp_path / "out", overwrite=True, needed_bytes=1)


def test_the_model_itself_is_not_the_destination(parent: Path) -> None:
    (parent / "link").symlink_to(parent / "old")
    for out in (parent / "old", parent / "link", parent / "old" / ".." / "old"):
        with pytest.raises(InputError, match="is the model itself"):
            check_destination(out, overwrite=True, needed_bytes=1, source=parent / "old")


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(Path(path))
        return shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_destination(tmp_path / "a" / "b", overwrite=False, needed_bytes=5_000_000)
    with pytest.raises(InputError, match=r"no space left for .*b: it needs about 5\.0\d? MB and 5\.00? MB are free"):
        check_destination(tmp_path / "a" / "b", overwrite=False, needed_bytes=5_040_000)
    assert asked == [tmp_path, tmp_path]  # the parents that exist
