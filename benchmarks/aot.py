"""``python -m benchmarks.aot``: another name of :mod:`benchmarks.gates.aot`."""

import sys

from benchmarks.gates.aot import main

if __name__ == "__main__":
    sys.exit(main())
