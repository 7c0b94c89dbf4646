"""`python -m bench [--quick] data|control|streamer`: measure one suite."""

from __future__ import annotations

import argparse
import importlib
import os

from bench.report import publish

SUITES = ("data", "control", "streamer")


def main() -> None:
    """Run the suites that were asked for, all of them if none was."""
    parser = argparse.ArgumentParser(prog="bench", description=main.__doc__)
    parser.add_argument("suite", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all of them by default")
    parser.add_argument(
        "--quick", action="store_true", help="a part of the suites data and streamer, each once; also with QUICK=1"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        os.environ["QUICK"] = "1"
    wanted = arguments.suite or SUITES
    for suite in wanted:
        if suite not in SUITES:
            parser.error(f"there is no suite {suite!r}; there are {', '.join(SUITES)}")
        print(f"written to {publish(suite, importlib.import_module(f'bench.{suite}').run())}")


if __name__ == "__main__":
    main()
