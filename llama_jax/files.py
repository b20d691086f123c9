"""Files and folders that are there whole or not at all, also where several processes write the same one."""

import tempfile
from pathlib import Path

COMMIT = "commit_success.txt"  # what Orbax writes last into the folder of a checkpoint


def write(path: Path, content: str | bytes) -> None:
    """A reader sees the content, or what was there before; the last of several writers stays."""
    content = content.encode() if isinstance(content, str) else content
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
        if path.name.isdigit() and (path / COMMIT).is_file()
    )
