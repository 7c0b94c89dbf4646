"""Regenerates everything under gen/ from protos/: `make gen`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OURS = sorted(str(p.relative_to(PROTOS)) for p in (PROTOS / "beamwire").rglob("*.proto"))


def run(*argv: str) -> None:
    """Run a tool from the repository's root, and stop at the first that fails."""
    subprocess.run(argv, cwd=ROOT, check=True)


def python() -> None:
    """Messages, services and strict stubs for Python, and the descriptor set."""
    out = ROOT / "gen" / "python"
    shutil.rmtree(out / "beamwire", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    bin_dir = Path(sys.executable).parent
    run(
        sys.executable, "-m", "grpc_tools.protoc",
        "-Iprotos", "-Iprotos/vendor",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}", f"--grpc_python_out={out}",
        f"--mypy_out={out}", f"--mypy_grpc_out={out}",
        "--include_imports", "--include_source_info",
        "--descriptor_set_out=gen/beamwire.binpb",
        *OURS,
    )  # fmt: skip
    for package in sorted({Path(p).parent for p in OURS}):
        (out / package / "py.typed").touch()


if __name__ == "__main__":
    python()
