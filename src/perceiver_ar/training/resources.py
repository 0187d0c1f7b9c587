"""The resources of a run: devices, processes and precision. They are determined once."""

import os
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lsf import LSFEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from perceiver_ar.config import TrainerConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.training.console import console, say

Precision = Literal["32", "bf16", "fp16"]
FABRIC_PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}
FIRST_PROCESS = "PERCEIVER_AR_FIRST_PROCESS"
"""Environment variable with the id of the process that started this one as another rank."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables in which launchers put the rank of a process; the first one set counts, as in Fabric."""


@dataclass(frozen=True)
class Resources:
    device: Literal["cpu", "cuda", "mps"]
    devices: int
    """In the whole run; each has a process."""
    machines: int
    launched: bool
    """Whether torchrun or SLURM starts all processes."""
    rank: int


def resolve(settings: TrainerConfig) -> Resources:
    """Raises InputError if this machine lacks the devices in `settings`, or for a launcher's leftover variables."""
    check_launcher(settings)
    devices, machines, launched = settings.devices, 1, True
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["WORLD_SIZE"])
        machines = devices // int(os.environ["LOCAL_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        devices, machines = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", 1))
    else:
        launched = False
    ranks = [int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ]
    rank = ranks[0] if ranks and devices > 1 else 0
    console.quiet = rank > 0
    if launched and settings.devices not in (1, devices):
        say(f"the launcher has started {devices} processes, so trainer.devices {settings.devices} does not count")
    return Resources(choose_device(settings, devices, machines), devices, machines, launched, rank)


def check_launcher(settings: TrainerConfig) -> None:
    """Raises InputError for the variables of a launcher that did not start this process.

    The process would wait for others, or believe it is another rank. (sbatch and salloc set SLURM_NTASKS for the srun
    inside them; only srun sets SLURM_STEP_ID.)
    """
    torchrun, slurm = TorchElasticEnvironment.detect(), SLURMEnvironment.detect()
    started = torchrun or (slurm and "SLURM_STEP_ID" in os.environ)
    needed = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK") if torchrun else ("SLURM_NODEID", "SLURM_PROCID")
    if started and (missing := [name for name in needed if name not in os.environ]):
        kept = "TORCHELASTIC_RUN_ID" if torchrun else "SLURM_STEP_ID"
        raise InputError(f"the environment has {kept} but no {', '.join(missing)}: first `unset {kept}`")
    if started or LSFEnvironment.detect() or os.environ.get(FIRST_PROCESS) == str(os.getppid()):
        return
    by_hand = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if by_hand and os.environ.get("WORLD_SIZE") == str(settings.devices):
        return
    alone = dict.fromkeys(RANK_VARIABLES, 0) | {"WORLD_SIZE": 1}
    alone |= {"SLURM_NTASKS": 1} if slurm else {}
    alone |= {"LOCAL_RANK": -1} if settings.devices > 1 else {}  # Fabric then does not start the others
    values = {name: os.environ.get(name, "") for name in alone}
    left = [name for name in alone if values[name].isdecimal() and int(values[name]) > alone[name]]
    require(
        not left,
        f"the environment has {', '.join(f'{name}={values[name]}' for name in left)}, but neither torchrun nor srun "
        f"has started this process: start it with one of them, or first `unset {' '.join(left)}`",
    )


def choose_device(settings: TrainerConfig, devices: int, machines: int) -> Literal["cpu", "cuda", "mps"]:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = settings.device
    if device == "auto":
        device = "cuda" if available["cuda"] else "mps" if available["mps"] and devices == 1 else "cpu"
    require(available[device], f"trainer.device is {device}, but this machine has none: use auto")
    if device == "cuda" and devices // machines > torch.cuda.device_count():
        raise InputError(
            f"trainer.devices is {devices}, but this machine has {torch.cuda.device_count()} GPUs: lower it"
        )
    require(device != "mps" or devices == 1, f"trainer.devices is {devices}, but there is only one MPS device: use 1")
    return device


def choose_precision(asked: Literal["auto", "32", "bf16", "fp16"], device: str) -> Precision:
    """The precision to compute in. Raises InputError if the device cannot do it."""
    if asked == "auto":
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device == "cpu" and torch.cpu._is_avx512_bf16_supported() and bfloat16_is_faster()
        return "bf16" if fast else "32"
    if asked == "fp16" and device != "cuda":
        raise InputError(f"trainer.precision is fp16, which needs a CUDA device, not {device}: use bf16, 32 or auto")
    return asked


def bfloat16_is_faster() -> bool:
    """Whether the CPU multiplies bfloat16 matrices clearly faster than float32 ones.

    The instruction set does not decide it: AMD's bfloat16 is four times as fast as float32, Intel's without AMX half
    as fast.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=10))

    return 1.5 * seconds(torch.bfloat16) < seconds(torch.float32)


def launch_fabric(resources: Resources, settings: TrainerConfig) -> Fabric:
    """Starts and connects all processes of the run, of which this is one."""
    strategy: DDPStrategy | ModelParallelStrategy | str = "auto"
    if resources.devices > 1:
        os.environ[FIRST_PROCESS] = str(os.getpid())  # for the processes that Fabric starts
        strategy = DDPStrategy()
        if settings.sharded:
            strategy = ModelParallelStrategy(shard, data_parallel_size=resources.devices, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator=resources.device,
        devices=resources.devices // resources.machines,
        num_nodes=resources.machines,
        strategy=strategy,
        precision=FABRIC_PRECISIONS[settings.precision],
    )
    fabric.launch()
    return fabric


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch takes deterministic algorithms only."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divides the network of a `WeightedLoss` among all ranks, layer by layer (FSDP2).

    Gradients are averaged over all ranks, including those that share a prefix. Theirs differ only by rounding;
    averaging keeps their weights equal.
    """
    network: nn.Module = module.model  # type: ignore[assignment]
    for layer in (*network.cross_attention, *network.self_attention, network):  # type: ignore[misc]
        fully_shard(layer, mesh=mesh["data_parallel"])
    return module
