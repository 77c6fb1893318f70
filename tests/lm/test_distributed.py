"""DistributedDataParallel over two gloo processes on the CPU equals one process with the whole batch."""

import datetime
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.lm.test_model import tiny
from tests.ops.cases import distance

BATCH = 4


def loss_of(model, ids):
    logits = model(ids[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def trained(model, ids, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()


def worker(rank, ids, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    model = DistributedDataParallel(tiny("hybrid"))
    trained(model, ids.chunk(2)[rank])
    if rank == 0:
        torch.save(model.module.state_dict(), os.path.join(folder, "weights.pt"))
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    ids = torch.randint(0, 50, (BATCH, 20))
    mp.spawn(worker, args=(ids, str(tmp_path)), nprocs=2)
    ours, alone = torch.load(tmp_path / "weights.pt"), tiny("hybrid")
    trained(alone, ids)
    for name, value in alone.state_dict().items():
        assert distance(ours[name], value) < 1e-10
