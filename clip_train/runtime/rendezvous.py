"""The process group of workers that torchrun may have started before.

torchrun's agent serves one key-value store to every generation of its workers, without telling them apart (2.5 and
later, pytorch issue 135712): after a restart a process may read the address that a dead one left there, and the new
group never connects. Restart counts are each agent's own, so they cannot serve as a prefix. Here rank 0 greets every
rank anew, and what was agreed on becomes the prefix.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from clip_train.errors import TrainingError


def join_group(backend: str, timeout: timedelta) -> None:
    """Set up the process group over the agent's store; nothing to do where no agent serves one, or for one process.

    Raises TrainingError naming the ranks that did not come in time.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world == 1 or dist.is_initialized():
        return
    rank = int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    name = greet(store, world, timeout) if rank == 0 else introduce(store, rank)
    dist.init_process_group(backend, store=PrefixStore(name, store), rank=rank, world_size=world, timeout=timeout)


def greet(store: Store, world: int, timeout: timedelta) -> str:
    """Rank 0: answer whoever says hello until all have come back with the name of this generation."""
    name = f"generation_{uuid.uuid4().hex}"
    missing, deadline = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check(
                [f"hello/{rank}"]
            ):  # perhaps a dead process's: then nobody comes back, and a new one follows
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", name)
            if store.check([f"{name}/joined/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)[:10]))
            raise TrainingError(f"{len(missing)} of {world} processes did not come within {timeout}: rank {names}")
        time.sleep(0.02)
    return name


def introduce(store: Store, rank: int) -> str:
    """Any other rank: say hello under a name that no other process ever had, and learn the generation's."""
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    name = store.get(f"welcome/{me}").decode()
    store.set(f"{name}/joined/{rank}", "")
    return name
