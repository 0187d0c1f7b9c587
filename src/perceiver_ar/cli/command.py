"""The command: calls the function of a verb. Results go to stdout, progress and messages to stderr.

Exit status: 0 done; 2 a failure that the user can repair (wrong input, a full disk, training that diverges), reported
in one line with its place and remedy; 1 any other failure, with its traceback; 130 interrupted.
"""

import errno
import io
import os
import re
import sys
import warnings
from contextlib import suppress
from importlib import import_module

from perceiver_ar import __version__
from perceiver_ar.errors import InputError, require
from perceiver_ar.threads import share_cores

USAGE = """usage: perceiver-ar VERB ...

Perceiver AR on your own files: train, see how good it is, generate.

  train [PATH...] --out RUN     train a model; RUN is a new directory for it
  evaluate RUN [PATH...]        bits per byte on files, or on the run's held-out documents
  score RUN [PATH...]           bits of every document and token; two runs compared
  embed RUN [PATH...]           a vector for each document
  scaling RUN...                what size and how many tokens a budget wants, from several runs
  generate RUN                  write text, music, pictures or sound
  compress RUN FILE             make a file smaller with the model's probabilities
  decompress RUN FILE           and back
  serve RUN                     OpenAI's completions over HTTP, and a page to write on
  info RUN                      settings, scores and costs of a run, and why it ended
  convert FORMAT CHECKPOINT --out RUN     make a run from another implementation's checkpoint
  export FORMAT RUN --out PATH            write the model for other implementations, transformers or ONNX
  push RUN OWNER/NAME           upload a run to the Hugging Face Hub

perceiver-ar VERB --help shows options and examples."""
VERBS = re.findall(r"^  (\w+) ", USAGE, re.MULTILINE)
"""Each is the function VERB_verb in the file VERB.py, which is imported when it runs."""
ELSEWHERE = {"decompress": "compress", "export": "convert"}  # verbs in the file of another


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    share_cores()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next opened file would get its descriptor
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries warn their callers, not our users
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(__version__)
            return 0
        require(argv[0] in VERBS, f"there is no verb {argv[0]!r}: use {', '.join(VERBS)}")
        module = import_module(f"perceiver_ar.cli.{ELSEWHERE.get(argv[0], argv[0])}")
        getattr(module, f"{argv[0]}_verb")(argv[1:])
        return 0
    except InputError as error:
        complain(" ".join(str(error).split()))
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.strerror is None:
            raise
        remedy = {
            errno.ENOSPC: "free some space, then start again (train: with --resume)",
            errno.EACCES: "change its permissions or choose another place",
        }
        place = f": {error.filename}" if error.filename else ""
        complain(f"{error.strerror}{place}; {remedy.get(error.errno or 0, 'choose another place, or check the disk')}")
        return 2
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted")
        return 130


def complain(message: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"perceiver-ar: {message}", file=sys.stderr, flush=True)
