"""Folders that appear whole or not at all.

A checkpoint is written into a hidden sibling of its destination and renamed at the end. Whatever ends the writing
early, Ctrl-C included, removes the sibling and leaves the destination as it was.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lowbit.errors import InputError
from lowbit.wording import size_text


def check_destination(out: Path, overwrite: bool, needed_bytes: int, source: Path | None = None) -> None:
    """Raise InputError unless a folder of needed_bytes can be written at `out`: before the long work, not after it."""
    if source is not None and out.exists() and out.samefile(source):
        raise InputError(f"{out} is the model itself; write to another folder")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; choose another folder, or replace it with --overwrite")
    if out.exists() and not _replaceable(out):
        raise InputError(
            f"{out} does not look like a checkpoint or a report, so it is not overwritten; remove it yourself"
        )
    if reason := why_not_writable(out):
        raise InputError(f"{out} can't be written, since {reason}; choose another folder")
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed_bytes:
        raise InputError(
            f"no space left for {out}: it needs about {size_text(needed_bytes)} and {size_text(free)} are free; "
            "free some space or choose another disk"
        )


def why_not_writable(path: Path) -> str | None:
    """Why nothing new can be made at `path`, or None."""
    parent = _existing_parent(path)
    if not parent.is_dir():
        return f"{parent} is not a folder"
    return None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} is read-only"


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _replaceable(out: Path) -> bool:
    """An empty folder, a model or a report; nothing that a slip of the finger should delete."""
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    return not names or "config.json" in names or "report.json" in names


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder to fill; renamed to `out` when the block ends well, removed when it does not.

    With overwrite, the old folder is removed only after the new one is complete. A full disk raises InputError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    replaced = out.parent / f".{out.name}.replaced-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if out.exists() and overwrite:
            os.rename(out, replaced)
        os.rename(partial, out)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise InputError(
                f"no space left while writing {out}; nothing was kept there: free some space and run again"
            ) from error
        raise
    finally:
        if replaced.exists() and not out.exists():
            os.rename(replaced, out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove everything inside `folder`."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether the disk is full; safetensors gives no errno, only the system's words for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return os.strerror(errno.ENOSPC) in str(error)
