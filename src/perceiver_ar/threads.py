"""Threads of the CPU: how many cores this process may use, and OpenMP on a machine that does other things too."""

import os
from collections.abc import MutableMapping
from pathlib import Path

SPINS = "10000"
"""Rounds that a thread of GNU OpenMP looks for work before it sleeps; its own default is 300,000 (docs/log.md)."""


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
