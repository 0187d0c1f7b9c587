"""The command `perceiver-ar`: a file for each verb."""

from perceiver_ar.cli.command import USAGE, main

__all__ = ["USAGE", "main"]
