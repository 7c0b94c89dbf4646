"""Regenerates everything under gen/ from protos/, or says what is no longer as generated.

    python gen/generate.py                   every language whose toolchain is here
    python gen/generate.py --all             every language; fails if a toolchain is missing
    python gen/generate.py python go         these languages
    python gen/generate.py --check […]       writes nothing; prints the files that differ and exits with 1

Code is generated into a temporary directory and only what changed is carried over, so a failing plugin
leaves the tree as it was. Versions: grpcio-tools and mypy-protobuf are pinned by pyproject's extra `gen`,
protoc-gen-es by gen/typescript/package-lock.json, the Go plugins here.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GEN = ROOT / "gen"
PROTOS = ROOT / "protos"
GO_CACHE = ROOT / ".cache" / "go"
GO_MODULE = "github.com/beamwire/beamwire/gen/go"
GO_PLUGINS = {
    "protoc-gen-go": ("google.golang.org/protobuf/cmd/protoc-gen-go", "v1.36.12"),
    "protoc-gen-go-grpc": ("google.golang.org/grpc/cmd/protoc-gen-go-grpc", "v1.6.2"),
}


@dataclass(frozen=True)
class Language:
    """How one language is generated.

    `tools` must be on PATH. `generate` writes the `outputs`, each a file or a whole directory, below the
    directory it is given, which stands for gen/.
    """

    tools: tuple[str, ...]
    outputs: tuple[str, ...]
    generate: Callable[[Path], None]

    def missing(self) -> list[str]:
        """The tools that are not on this machine."""
        return [tool for tool in self.tools if shutil.which(tool) is None]


def ours(suffix: str = ".proto") -> list[str]:
    """Our files of one kind, relative to protos/, in a fixed order."""
    return sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "beamwire").rglob(f"*{suffix}"))


def vendored() -> list[str]:
    """The files of googleapis that are kept beside ours, relative to protos/vendor, in a fixed order."""
    return sorted(str(path.relative_to(PROTOS / "vendor")) for path in (PROTOS / "vendor").rglob("*.proto"))


def run(*argv: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Run a tool, and stop at the first that fails."""
    subprocess.run(argv, cwd=cwd, env={**os.environ, **(env or {})}, check=True)


def protoc(*argv: str) -> None:
    """Run the protoc that comes with grpcio-tools over our import roots."""
    run(sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", "-Iprotos/vendor", *argv)


def python(out: Path) -> None:
    """Messages, services, strict stubs for Python, and the descriptor set."""
    protoc(
        "--include_imports",
        "--include_source_info",
        f"--descriptor_set_out={out / 'beamwire.binpb'}",
        *ours(),
        "google/rpc/error_details.proto",
    )
    target = out / "python"
    target.mkdir()
    beside = Path(sys.executable).parent
    protoc(
        *(f"--plugin=protoc-gen-{name}={beside / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")),
        *(f"--{name}_opt=quiet" for name in ("mypy", "mypy_grpc")),
        *(f"--{name}_out={target}" for name in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *ours(),
    )
    for package in {path.parent for path in target.rglob("*_pb2.py")}:
        (package / "py.typed").touch()


def typescript(out: Path) -> None:
    """Messages and services for JavaScript and TypeScript, with the google/ messages they mention."""
    package = GEN / "typescript"
    modules = package / "node_modules"
    wanted = json.loads((package / "package.json").read_text())["devDependencies"]["@bufbuild/protoc-gen-es"]
    installed = modules / "@bufbuild" / "protoc-gen-es" / "package.json"
    if not installed.exists() or json.loads(installed.read_text())["version"] != wanted:
        run("npm", "ci", "--silent", cwd=package)
    target = out / "typescript"
    target.mkdir()
    protoc(
        f"--plugin=protoc-gen-es={modules / '.bin' / 'protoc-gen-es'}",
        f"--es_out={target}",
        "--es_opt=target=js+dts,import_extension=js",
        *ours(),
        *vendored(),
    )


def go(out: Path) -> None:
    """Messages, services and service configs for Go."""
    target = out / "go"
    target.mkdir()
    plugins: list[str] = []
    for name, (module, version) in GO_PLUGINS.items():
        binary = GO_CACHE / version / name
        if not binary.exists():
            run("go", "install", f"{module}@{version}", env={"GOBIN": str(binary.parent)})
        plugins += [f"--plugin={name}={binary}"]
    protoc(
        *plugins,
        *(f"--{name}_out={target}" for name in ("go", "go-grpc")),
        *(f"--{name}_opt=module={GO_MODULE}" for name in ("go", "go-grpc")),
        *ours(),
    )
    for config in ours(".json"):
        go_service_config(config, target / config)


def go_service_config(config: str, target: Path) -> None:
    """A service config as a Go constant, since a Go module can embed no file from outside itself."""
    proto = (PROTOS / config.replace("_config.json", ".proto")).read_text()
    package = re.search(r'go_package = "[^"]*;(\w+)"', proto)
    service = re.search(r"^service (\w+)", proto, re.MULTILINE)
    if package is None or service is None:
        message = f"{config}: the .proto beside it has no go_package or no service"
        raise SystemExit(message)
    target.with_suffix(".go").write_text(
        "// Code generated by gen/generate.py. DO NOT EDIT.\n"
        f"// source: {config}\n\n"
        f"package {package[1]}\n\n"
        f"// {service[1]}Config is the gRPC service config of {service[1]}, for grpc.WithDefaultServiceConfig.\n"
        f"const {service[1]}Config = `{(PROTOS / config).read_text()}`\n"
    )


LANGUAGES = {
    "python": Language((), ("beamwire.binpb", "python/beamwire"), python),
    "typescript": Language(("node", "npm"), ("typescript/beamwire", "typescript/google"), typescript),
    "go": Language(("go",), ("go/beamwire",), go),
}


def files(root: Path, output: str) -> set[str]:
    """The files of one output below a root; byte code that an interpreter left there is nobody's output."""
    start = root / output
    found = [start] if start.is_file() else [path for path in start.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)) for path in found if path.suffix != ".pyc"}


def differences(fresh: Path, outputs: Iterable[str]) -> list[str]:
    """The files below gen/ that are not as in the freshly generated tree, in order."""
    differing: list[str] = []
    for output in outputs:
        for name in files(fresh, output) | files(GEN, output):
            ours, theirs = GEN / name, fresh / name
            if not (ours.exists() and theirs.exists() and filecmp.cmp(ours, theirs, shallow=False)):
                differing.append(name)
    return sorted(differing)


def carry_over(fresh: Path, name: str) -> None:
    """Make one file below gen/ what it is in the freshly generated tree."""
    if (fresh / name).exists():
        (GEN / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh / name, GEN / name)
    else:
        (GEN / name).unlink()


def chosen(names: list[str], *, everything: bool) -> list[Language]:
    """The languages to generate; says which are left out, and exits with 2 if one of those was asked for."""
    wanted = list(LANGUAGES) if everything or not names else names
    absent = {name: missing for name in wanted if (missing := LANGUAGES[name].missing())}
    for name, missing in absent.items():
        print(f"{name}: left out, {' and '.join(missing)} not found", file=sys.stderr)
    if absent and (everything or names):
        raise SystemExit(2)
    return [LANGUAGES[name] for name in wanted if name not in absent]


def main() -> int:
    """Generate or check; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("languages", nargs="*", metavar="language", help=", ".join(LANGUAGES))
    parser.add_argument("--all", action="store_true", help="fail if a language's toolchain is missing")
    parser.add_argument("--check", action="store_true", help="write nothing; print what differs and exit with 1")
    options = parser.parse_args()
    if unknown := set(options.languages) - set(LANGUAGES):
        parser.error(f"no such language: {', '.join(sorted(unknown))}; there are {', '.join(LANGUAGES)}")
    languages = chosen(options.languages, everything=options.all)
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        for language in languages:
            language.generate(fresh)
        differing = differences(fresh, [output for language in languages for output in language.outputs])
        for name in differing:
            print(f"gen/{name}")
            if not options.check:
                carry_over(fresh, name)
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
