"""Several processes of one run, started by torchrun; without it, everything here is a process of its own.

The first process (rank 0) writes and speaks. What it alone finds out reaches the others through `shared`, its mistakes
too, so that no process waits for one that has stopped.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from compress.errors import CompressError, LostError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first one exports and measures alone, which may take hours."""
BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|TCPStore")
"""In what torch raises where a process does not answer any more; for gloo it is a plain RuntimeError."""


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, number of processes); joins torchrun's processes where its environment variables are set.

    Raises LostError where one of them is not there any more when another needs it.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except ValueError as error:  # a cluster's own WORLD_SIZE, without what torchrun sets
        way_out = "start it with torchrun, or unset WORLD_SIZE"
        raise CompressError(f"WORLD_SIZE={count}", str(error).partition(": ")[2] or str(error), way_out) from error
    try:
        yield dist.get_rank(), count
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or BROKEN.search(str(error))):
            raise
        raise LostError(_first_to_say()) from error
    finally:
        # Its threads end once nothing holds it any more, such as a wrapped network in a cycle. One that is left when
        # the interpreter ends, and gives a tensor back then, aborts the process.
        gc.collect()
        dist.destroy_process_group()


def _first_to_say() -> bool:
    """Whether no other process has said yet that one is lost; torchrun's signal, which follows, finds it said."""
    with contextlib.suppress(ValueError):  # in another thread than the first, where signals do not arrive
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return dist.distributed_c10d._get_default_store().add("compress/lost", 1) == 1
    except RuntimeError:  # the store was with the process that is lost
        return True


def own_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def shared(find: Callable[[], T]) -> T:
    """What `find` returns in the first process, in all of them. A CompressError that it raises is raised in all."""
    if not dist.is_initialized():
        return find()
    box: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = find()
        except CompressError as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if isinstance(box[1], CompressError):
        raise box[1]
    return box[0]  # type: ignore[return-value]


def mean(value: float, device: torch.device) -> float:
    """The mean of `value` over all processes; not finite in any makes it not finite in all."""
    if not dist.is_initialized():
        return value
    total = torch.tensor([value], device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def average_gradients(module: torch.nn.Module) -> None:
    """Puts the mean over all processes in the place of each parameter's gradient; a missing one counts as zero."""
    if not dist.is_initialized():
        return
    for parameter in module.parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / dist.get_world_size()


def gathered(value: T) -> list[T]:
    """What each process gives, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
