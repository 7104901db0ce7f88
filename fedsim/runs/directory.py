"""Where runs live and what a run directory holds. Imports no torch: refusals ask here before anything heavy is loaded.

    runs/NAME/run.db               rounds, clients, metrics, events and the clients' own state (SQLite)
              experiment.toml      the resolved experiment;  manifest.json  versions, machine, execution
              checkpoints/         round-000012.safetensors, the two newest
              report.html  export/ made from the above
              lock                 held while a process writes here

``run.db`` is created first and whole, so a directory is a run from the moment it appears; the two text files are copies
for people (and for quick refusals) of what it holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from clients.errors import RequestError

DATABASE = "run.db"
EXPERIMENT = "experiment.toml"
FIRST = "first.safetensors"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
LOCK = "lock"
REPORT = "report.html"

_CHECKPOINT = re.compile(r"round-\d{6,}\.safetensors")
_TEMPORARY = ".writing"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def holds_run(path: Path) -> bool:
    """Whether there is a run in ``path``, finished or not (a damaged one too: it must not be written over)."""
    return (path / DATABASE).exists() or any(checkpoint_files(path))


def first_free(root: Path, name: str) -> Path:
    """Makes and returns the first free of ``root/name``, ``root/name-2``, ... Two processes never get the same one.

    Raises:
        RequestError: for a name that is not a plain file name, or a ``root`` in which nothing can be made.
    """
    check_name(name)
    for candidate in _candidates(root, name):
        try:
            root.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
        except FileExistsError as error:
            if root.is_dir():
                continue
            raise RequestError(f"{root} is not a directory; give --out DIR") from error
        except OSError as error:
            raise RequestError(f"{candidate} cannot be made: {error.strerror}; give --out DIR") from error
        return candidate
    raise AssertionError("unreachable: the candidates do not end")


def check_name(name: str) -> None:
    """Refuses what is not a plain file name.

    Raises:
        RequestError: with what a name may be.
    """
    plain = name.strip() == name != "" and name.isprintable() and not set(name) & set('/\\:*?"<>|')
    if not plain or name.startswith((".", "-", "~")) or len(name.encode()) > 200:
        raise RequestError(
            f"name: {name!r} cannot name a directory; use letters, digits, spaces, '.', '_' and '-', "
            "not beginning with '.', '-' or '~'"
        )


def no_run(path: Path) -> str:
    """One line that says that ``path`` holds no run, and what is there instead."""
    if not path.exists():
        return f"{path}: there is no such directory; give a run's directory, such as runs/digits"
    return f"{path} holds no run (no {DATABASE} in it); give a run's directory, such as runs/digits"


def checkpoint_name(round: int) -> str:
    """``checkpoints/round-000012.safetensors``, relative to the run's directory."""
    return f"{CHECKPOINTS}/round-{round:06d}.safetensors"


def checkpoint_files(path: Path) -> Iterator[Path]:
    """The checkpoint files in a run's directory, committed or not."""
    try:
        found = list((path / CHECKPOINTS).iterdir())
    except OSError:
        return iter(())
    return (file for file in found if _CHECKPOINT.fullmatch(file.name))


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that its name never stands for half of it: a temporary name first, then a rename.

    Raises:
        OSError: and leaves nothing of the new content.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(directory: Path) -> None:
    """Removes what a killed :func:`write_whole` left in a directory."""
    for file in directory.glob("*" + _TEMPORARY):
        file.unlink(missing_ok=True)


def disk_full(error: OSError) -> bool:
    """Whether an error means that no more could be written (disk, quota or file-size limit)."""
    return error.errno in _FULL


class Lock:
    """An advisory lock on a run's directory; the kernel drops it when the process dies, however it dies.

    Raises:
        RequestError: if another holder, in this process or another, has it.
    """

    def __init__(self, directory: Path):
        self._held = True
        self._descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            who = f"process {holder}" if holder else "another process"
            raise RequestError(f"{directory}: {who} is using this run; wait for it, or give another --out") from None
        except OSError:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Gives the directory free. May be called twice."""
        if self._held:
            os.close(self._descriptor)
        self._held = False


def _candidates(root: Path, name: str) -> Iterator[Path]:
    yield root / name
    number = 2
    while True:
        yield root / f"{name}-{number}"
        number += 1
