"""Real processes, forked from one that has imported torch and the package: an import takes seconds."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

SERVER = """
import json, os, signal, sys
import perceiver_ar.plots, perceiver_ar.training.main, torch._dynamo, torch.utils.tensorboard
from perceiver_ar.cli import main

for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
            if job["session"]:
                os.setsid()
            for descriptor, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
                opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                os.dup2(opened, descriptor)
                os.close(opened)
            os.environ.update(job["variables"])
            sys.exit(exec(job["code"], job["given"]) if job["code"] else main(job["argv"]))
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""

Moment = Callable[[], bool]
"""Whether it has come."""


def after(seconds: float) -> Moment:
    begun: list[float] = []

    def passed() -> bool:
        begun.append(time.monotonic())
        return begun[-1] - begun[0] >= seconds

    return passed


class Server:
    """Starts processes and waits for their ends."""

    def __init__(self, folder: Path) -> None:
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.jobs, self.answers = self.process.stdin, self.process.stdout

    def run(self, *argv: object, code: str = "", signals: Iterable[tuple[Moment, int]] = (), **settings: Any) -> int:
        """Runs the command, or `code`, sends it the signals as soon as their moments have come, and returns its exit
        status.

        settings: given: values by the names that `code` has for them; session: whether it has a session of its own,
            whose terminal is then `stdout` or `stderr` if that is one; stdout, stderr: other files than those of the
            server; variables: of the environment.
        """
        [status] = self._run([{"argv": [str(word) for word in argv], "code": code, **settings}], signals)
        return status

    def run_file(self, file: Path, *arguments: object, signals: Iterable[tuple[Moment, int]] = ()) -> int:
        """Runs a Python file as a program; its exit status."""
        code = "import runpy, sys; sys.argv = argv; sys.path.insert(0, folder); runpy.run_path(argv[0], {}, '__main__')"
        given = {"argv": [str(file), *map(str, arguments)], "folder": str(file.parent)}
        return self.run(code=code, given=given, signals=signals)

    def run_ranks(
        self, ranks: int, *argv: object, code: str = "", signals: Iterable[tuple[Moment, int]] = ()
    ) -> list[int]:
        """Runs the command, or `code`, in several processes under the variables of torchrun. Signals go to the first.

        Returns their exit statuses.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        what = {"argv": [str(word) for word in argv], "code": code}
        return self._run([what | {"variables": variables(rank, ranks, port)} for rank in range(ranks)], signals)

    def _run(self, jobs: list[dict[str, Any]], signals: Iterable[tuple[Moment, int]]) -> list[int]:
        defaults = {"given": {}, "session": False, "variables": {}}
        defaults |= {"stdout": str(self.stdout), "stderr": str(self.stderr)}
        for file in self.stdout, self.stderr:
            file.write_text("")
        self.jobs.write(json.dumps([defaults | job for job in jobs]).encode() + b"\n")
        children, coming = [int(child) for child in self.answers.readline().split()], list(signals)
        try:
            while not select.select([self.answers], [], [], 0.001 if coming else None)[0]:
                if coming and coming[0][0]():
                    with suppress(ProcessLookupError):  # it has just ended by itself
                        os.kill(children[0], coming.pop(0)[1])
        except BaseException:  # the next one finds the server free
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            self.answers.readline()
            raise
        return [int(status) for status in self.answers.readline().split()]

    def messages(self) -> list[str]:
        return self.stderr.read_text().strip().splitlines()

    def close(self) -> None:
        self.jobs.close()
        assert self.process.wait(timeout=60) == 0
        self.answers.close()


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Those that torchrun gives a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1"} | {n: str(x) for n, x in numbers.items()}
