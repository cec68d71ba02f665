"""`python -m fastpo.bench`, the same as `fastpo bench`."""

import sys

from fastpo.bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
