"""`python -m perceiver_ar.cli`, also under torchrun."""

import sys

from perceiver_ar.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
