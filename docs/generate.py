"""Writes docs/modules.md, one sentence per module, from the modules themselves: `make gen`. `--check` only compares."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORTIONS = ("mesh", "services", "clients/python")
HEAD = """\
# Every module, in its own words

Made by `make gen` from the first sentence of each module. ARCHITECTURE.md says how they belong together.
"""


def main() -> int:
    """Write the page, or say whether it is as it should be."""
    page = ROOT / "docs" / "modules.md"
    text = HEAD + "".join(sections())
    if "--check" not in sys.argv:
        page.write_text(text)
    elif page.read_text() != text:
        print("docs/modules.md is not what the modules say; run: make gen", file=sys.stderr)
        return 1
    return 0


def sections() -> Iterator[str]:
    """Yield one table per package."""
    for portion in PORTIONS:
        base = ROOT / portion
        for package in sorted({path.parent for path in base.rglob("*.py")}):
            rows = [row(path, base) for path in sorted(package.glob("*.py"))]
            name = ".".join(package.relative_to(base).parts)
            yield f"\n## {name}\n\n| module | owns |\n| --- | --- |\n" + "".join(rows)


def row(path: Path, base: Path) -> str:
    """Return one module's row."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence = " ".join(docstring.split("\n\n")[0].split())
    name = path.parent.name if path.name == "__init__.py" else path.stem
    return f"| `{name}` | {sentence.replace('|', chr(92) + '|')} |\n"


if __name__ == "__main__":
    sys.exit(main())
