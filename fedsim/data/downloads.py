"""Where the files of torchvision's data sets lie, and fetching those that are missing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.errors import RequestError, RunError


@dataclass(frozen=True)
class Files:
    """The files of a data set and where they lie.

    Attributes:
        torchvision: the name of torchvision's class.
        folder: where that class keeps them, below ``root``.
        train: their names, of the training split.
        test: of the test split.
        address: where torchvision fetches them from.
        packed: whether each may be there as ``.gz`` instead.
        archive: what torchvision fetches and unpacks, below ``root``.
        calls: what the class is called with, once for each download.
    """

    torchvision: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    address: str
    packed: bool = False
    archive: str | None = None
    calls: tuple[Mapping[str, Any], ...] = ({},)

    def places(self, top: Path) -> list[Path]:
        """Torchvision's folder below ``top``; then as if ``top`` were ``.../MNIST`` or ``.../MNIST/raw`` itself."""
        parts = Path(self.folder).parts
        places = [top.joinpath(*parts[skipped:]) for skipped in range(len(parts) + 1)]
        return [places[0], *(place for place in places[1:] if not self._of_another(place))]

    def missing(self, folder: Path) -> list[str]:
        """The names of those that are not there."""
        return [name for name in (*self.train, *self.test) if present(folder / name, self.packed) is None]

    def _of_another(self, folder: Path) -> bool:
        """Whether a folder is said to be that of a data set whose files have the same names."""
        alike = {"mnist", "fashionmnist", "kmnist", "qmnist", "emnist"} - {self.torchvision.lower()}
        place = folder.resolve()
        return self.packed and not alike.isdisjoint({place.name.lower(), place.parent.name.lower()})


def present(path: Path, packed: bool) -> Path | None:
    """The file itself, or packed where that may be, or None."""
    candidates = (path, path.with_name(f"{path.name}.gz")) if packed else (path,)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def found(files: Files, root: str, download: bool) -> Path:
    """The folder that holds all files, downloaded where they may be.

    Raises:
        RequestError: which files are missing in which folder.
        RunError: where they cannot be fetched.
    """
    top = Path(root).expanduser()

    def fullest() -> Path:
        return min(files.places(top), key=lambda place: len(files.missing(place)))

    if os.path.exists(top) and not os.path.isdir(top):
        raise RequestError(
            f"data.source.root: {top} is no folder; give the one that holds {files.folder or files.train[0]}"
        )
    if download and files.missing(fullest()):
        _download(files, top)
    folder = fullest()
    missing = files.missing(folder)
    if not missing:
        return folder
    lacks = f"{folder} lacks {', '.join(missing)}" if os.path.isdir(folder) else f"there is no folder {folder}"
    mend = f"give the folder that holds {files.folder or 'them'}, or download = true"
    if files.archive and os.path.isfile(top / files.archive):
        mend = f"{files.archive} is there: unpack it, or set download = true, which does"
    raise RequestError(
        f"data.source.root: {lacks}{' (or .gz)' if files.packed and os.path.isdir(folder) else ''}; {mend}"
    )


def _download(files: Files, top: Path) -> None:
    """Fetches a data set into a folder of its own inside ``top`` and moves it into place when it is whole."""
    made = [folder for folder in (top, *top.parents) if not folder.exists()]
    work = top / ".downloading"
    try:
        top.mkdir(parents=True, exist_ok=True)
        with _alone_in(top):
            if not files.missing(top / files.folder):  # another process has just fetched it
                return
            shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
            try:
                _fetch(files, top, work)
                _move(work, top)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(
            f"data.source.download: {files.torchvision} could not be fetched from {files.address} ({said}); put "
            f"{', '.join(files.missing(top / files.folder))} into {top / files.folder} and leave download out"
        ) from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _fetch(files: Files, top: Path, work: Path) -> None:
    from torchvision import datasets

    work.mkdir()
    if files.archive and (top / files.archive).is_file():
        (work / files.archive).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(top / files.archive, work / files.archive)  # torchvision fetches it anew if its checksum is wrong
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # torchvision sets none: a silent server would be waited for without end
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for arguments in files.calls:
                getattr(datasets, files.torchvision)(str(work), download=True, **arguments)
    finally:
        socket.setdefaulttimeout(patience)
    if missing := files.missing(work / files.folder):
        raise RuntimeError(f"it came without {', '.join(missing)}")


def _move(work: Path, top: Path) -> None:
    """Files that are there already stay as they are: they may be the user's own."""
    for file in sorted(path for path in work.rglob("*") if path.is_file()):
        place = top / file.relative_to(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            file.replace(place)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process downloads into the folder. The lock is on the folder and goes with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
