"""A new folder DIR is made as `DIR.unfinished`, by one process alone, and renamed when it is whole."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def check(to: Path, sources: Iterable[Path], is_ours: Callable[[Path], bool]) -> Path:
    """Where the folder `to` is made. ValueError if that would write over or remove what is not ours.

    sources: what is read meanwhile. is_ours(folder): whether an earlier call left it.
    """
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise ValueError(f"--to={to} is a link or a file; name a new folder")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"--to={to} is there already; name a new folder")
    place = to.with_name(to.name + ".unfinished")
    for file in sources:
        for written in (place, to):
            if file.resolve().is_relative_to(written.resolve()):
                raise ValueError(f"{file} lies in {written}, which is written; name another --to")
    if place.is_symlink() or (place.exists() and not is_ours(place)):
        raise ValueError(f"{place} is not an unfinished conversion; move it or name another --to")
    return place


@contextlib.contextmanager
def held(place: Path, to: Path) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone.

    The lock is on the folder itself: it goes along when the folder is renamed, and with the process.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"--to={to} cannot be written: {error.strerror}") from error
    try:
        if not _lock(descriptor) or not _is_at(descriptor, place):
            raise ValueError(
                f"another conversion is writing {place}; wait for its end or name another --to"
            )
        yield
    finally:
        os.close(descriptor)


def check_space(place: Path, need: float) -> None:
    """OSError unless there is room for `need` bytes."""
    free = shutil.disk_usage(place).free
    if need > free:
        raise OSError(
            f"{place} needs {need / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are free"
        )


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some of clusters are
        return True
    return True


def _is_at(descriptor: int, place: Path) -> bool:
    """Not so if another process has renamed the folder before it was locked here."""
    return place.exists() and os.path.samestat(os.fstat(descriptor), place.stat())
