"""Run the benchmarks, all or by name: `make bench`, `make bench NAME=encoder`."""

import argparse
import pkgutil
import subprocess
import sys
from pathlib import Path

MODULES = {m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])}
NAMES = sorted(MODULES - {"__main__", "timing"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none: all")
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in names:  # a process each: what one holds would count as its children's memory in the next
        if failed := subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            sys.exit(failed)


if __name__ == "__main__":
    main()
