"""Threads of the CPU: how many cores this process may use, and OpenMP on a machine that does other things too."""

import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

SPINS = "10000"
"""Rounds that a thread of GNU OpenMP looks for work before it sleeps; its own default is 300,000 (docs/log.md)."""
SPARE = "spare OpenMP threads"
"""Name of the thread that holds them."""

T = TypeVar("T")


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's threads sleep soon while they wait, and use no more cores than the control group allows.

    At every barrier the threads of GNU OpenMP spin for milliseconds. If another program uses one of the cores, they
    spin while the thread that they wait for cannot run. OpenMP reads these variables once, so this has to come before
    `import torch`. Variables that the user has set stay. Other OpenMP libraries ignore GOMP_SPINCOUNT.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
    if (cores := available_cores()) < affinity():  # OpenMP looks at the affinity, but at no quota
        environment.setdefault("OMP_NUM_THREADS", str(cores))


def in_own_thread(task: Callable[[], T]) -> T:
    """The result of `task`, which runs in a thread that ends with it.

    Each thread that computes keeps OpenMP threads of its own. If they all are more than the cores, they sleep soon, as
    with `adaptive_spins`. So a thread should not compute if afterwards it only waits for another one that does.
    """
    result = Future[T]()

    def run() -> None:
        try:
            result.set_result(task())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)  # so that Ctrl+C need not wait for it
    thread.start()
    result.exception()
    thread.join()
    return result.result()


@contextmanager
def adaptive_spins(stat: Path = Path("/proc/stat"), interval: float = 1.0) -> Iterator[None]:
    """Lets OpenMP's threads sleep even sooner while other programs use the cores; looks every `interval` seconds.

    GNU OpenMP spins 1,000 rounds at most while it has more threads than cores (GOMP_SPINCOUNT in its manual). So while
    the machine is busy, one more thread holds OpenMP threads that do nothing. Results stay, as no more threads share an
    operation. Does nothing without Linux, with one thread, or if the user has set how long to spin.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or os.environ.get("GOMP_SPINCOUNT") != SPINS or not os.access(stat, os.R_OK):
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(threads, stat, interval, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(threads: int, stat: Path, interval: float, ended: threading.Event) -> None:
    """Holds OpenMP threads while other programs leave less than `threads` cores free."""
    import torch

    def hold(release: threading.Event) -> None:
        torch.zeros(threads << 16)  # large enough for all threads
        release.wait()

    release: threading.Event | None = None
    time_before, used_before = time.monotonic(), others_seconds(stat)
    while not ended.wait(interval):
        now, used = time.monotonic(), others_seconds(stat)
        busy = (used - used_before) / (now - time_before) > affinity() - threads + 0.25
        time_before, used_before = now, used
        if busy and release is None:
            release = threading.Event()
            threading.Thread(target=hold, args=(release,), name=SPARE, daemon=True).start()
        elif release is not None and not busy:
            release.set()
            release = None
    if release is not None:
        release.set()


def others_seconds(stat: Path) -> float:
    """CPU time that other processes have used on the cores of this one, but for a constant."""
    cores = os.sched_getaffinity(0)
    used = 0
    for line in stat.read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            user, nice, system, _idle, _io, irq, softirq = map(int, ticks[:7])
            used += user + nice + system + irq + softirq
    return used / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def available_cores() -> int:
    """Cores that this process may use: its affinity, and at most its quota of CPU time."""
    return max(1, round(min(affinity(), cgroup_quota())))


def affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """CPU seconds per second that the control groups (version 1 or 2) of this process allow; infinity without a limit.

    Docker's --cpus, Kubernetes' limits and systemd's CPUQuota set it.
    """
    quota = float("inf")
    try:
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            group = mount / controllers / path.strip("/")
            for folder in (group, *group.parents):
                quota = min(quota, _quota(folder))
                if folder == mount:
                    break
    except (OSError, ValueError):  # no Linux, or not readable: no limit is known
        pass
    return quota


def _quota(folder: Path) -> float:
    if (file := folder / "cpu.max").exists():  # version 2: "max 100000" or "200000 100000"
        allowed, period = file.read_text().split()
    elif (file := folder / "cpu.cfs_quota_us").exists():  # version 1: -1 is no limit
        allowed, period = file.read_text().strip(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return float("inf")
    return float("inf") if allowed in ("max", "-1") else int(allowed) / int(period)
