"""`python -m perceiver_ar`: the command."""

import sys

from perceiver_ar.cli import main

if __name__ == "__main__":
    sys.exit(main())
