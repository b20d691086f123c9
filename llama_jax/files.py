"""Files and folders that are there whole or not at all, also where several processes write the same one."""

import tempfile
from pathlib import Path

COMMIT = "commit_success.txt"  # what Orbax writes last into the folder of a checkpoint


def write(path: Path, content: str | bytes) -> None:
    """A reader sees the content, or what was there before; the last of several writers stays.

    OSError with the file's name, which that of a full disk does not have.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        _write(path, content)
    except OSError as error:
        error.filename = str(path)
        raise


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def committed(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder `checkpoints`, rising."""
    return sorted(
        int(path.name)
        for path in folder.glob("*")
        if path.name.isdecimal() and (path / COMMIT).is_file()
    )


def why_not_local(path: str) -> str:
    """What to do with the address of a bucket where a path is wanted; "" for a path.

    `gs://b/x` would become a folder `gs:` here, and what is written there is lost to whoever looks into b.
    """
    scheme, mark, rest = path.partition("://")
    if not mark:
        return ""
    if scheme != "gs":
        return "must be a path on this machine; mount what it names, or copy it"
    bucket, _, inside = rest.partition("/")
    mounted = f"~/bucket/{inside}" if inside else "~/bucket/NAME"
    return (
        f"must be a path on this machine; mount the bucket with `mkdir -p ~/bucket && gcsfuse "
        f"--implicit-dirs {bucket} ~/bucket` and give {mounted}"
    )
