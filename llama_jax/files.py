"""Files that are there whole or not at all, also where several processes write the same one."""

import tempfile
from pathlib import Path


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
