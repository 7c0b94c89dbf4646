"""`python -m bench data|control`: measure one suite."""

from __future__ import annotations

import argparse
import importlib

from bench.report import publish

SUITES = ("data", "control")


def main() -> None:
    """Run the suites that were asked for, all of them if none was."""
    parser = argparse.ArgumentParser(prog="bench", description=main.__doc__)
    parser.add_argument("suite", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all of them by default")
    wanted = parser.parse_args().suite or SUITES
    for suite in wanted:
        if suite not in SUITES:
            parser.error(f"there is no suite {suite!r}; there are {', '.join(SUITES)}")
        print(f"written to {publish(suite, importlib.import_module(f'bench.{suite}').run())}")


if __name__ == "__main__":
    main()
