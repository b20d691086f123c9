"""`python -m experiments` lists the commands: what runs as `python -m experiments.NAME`."""

import ast
from pathlib import Path


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        if "\n    cli.run(main" in text:
            first = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
            about = " ".join(first.partition(": `python")[0].split())
            print(f"python -m experiments.{path.stem:16} {about}")
    print("\nEach says more with --help.")


if __name__ == "__main__":
    main()
