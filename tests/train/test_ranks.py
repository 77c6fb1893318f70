"""Two and four processes train as one does: replicated, sharded, and with one sequence spread over them (gloo, CPU)."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mamba3.lm import Mamba3Config
from mamba3.train import TrainConfig, prepare
from mamba3.train.checkpoint import list_checkpoints
from mamba3.train.ranks import join
from mamba3.train.report import read_metrics

CONFIG = TrainConfig(
    steps=4, warmup_steps=1, seq_len=32, batch_tokens=64, micro_tokens=16, val_fraction=0.2, eval_every=2, eval_tokens=60,
    save_every=2, lr=5e-3,
)  # fmt: skip
SHARED = dataclasses.replace(CONFIG, micro_tokens=64)  # a pass of 64 tokens, all ranks on it
WAYS = {
    "ddp": CONFIG,
    "fsdp": dataclasses.replace(CONFIG, parallel="fsdp"),
    "carry": dataclasses.replace(CONFIG, layout="carry", seq_len=16),
    "context": SHARED,
    "context, fsdp, recomputed": dataclasses.replace(SHARED, parallel="fsdp", recompute=True),
}


def shape(vocabulary):
    return Mamba3Config(
        vocab_size=vocabulary, d_model=16, layers=("mamba3",) * 2, d_state=8, headdim=8, d_intermediate=16, mimo_rank=2
    )


def write_corpus(folder):
    """Documents longer than a rank's part and shorter ones."""
    texts = [f"number {i} and the words after it, " * (1 + i % 4) for i in range(24)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def losses(run):
    return [(line["kind"], line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]


def run_ways(corpus, out, ways, context, stop=None, device="cpu"):
    """Every way of training with the ranks of this process group, one after another."""
    for name, config in ways.items():
        shared = context if name.startswith("context") else 1
        ranks = join(shared, device)
        config = dataclasses.replace(config, context_parallel=shared)
        made = prepare(corpus, out / name, config, shape, ranks=ranks, device=device)
        made.run(lambda made=made: stop is not None and made.step >= stop)


def worker(rank, size, corpus, out, ways, context):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet-{size}", rank=rank, world_size=size)
    run_ways(corpus, out, ways, context)
    dist.barrier()
    dist.destroy_process_group()


def weights(run):
    from safetensors.torch import load_file

    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def gpu_worker(rank, size, corpus, out, ways, context):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    meet = f"file://{out}/meet-{size}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meet, rank=rank, world_size=size)
    run_ways(corpus, out, ways, context, device=device)
    dist.barrier()
    dist.destroy_process_group()


def equal_to_rounding(ours, alone, loss=2e-6):
    assert [line[:2] for line in losses(ours)] == [line[:2] for line in losses(alone)]
    for mine, its in zip(losses(ours), losses(alone), strict=True):
        assert mine[2] == pytest.approx(its[2], rel=loss)
    truth = weights(alone)
    for name, value in weights(ours).items():
        # AdamW's step is the gradient's sign while its averages are young, whatever rounding did to a tiny gradient.
        torch.testing.assert_close(value, truth[name], rtol=1e-4, atol=2e-5)


def check(tmp_path, size, ways, context):
    corpus = write_corpus(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "ours").mkdir()
    run_ways(corpus, tmp_path / "alone", ways, 1)
    mp.spawn(worker, args=(size, corpus, tmp_path / "ours", ways, context), nprocs=size)
    for name in ways:
        equal_to_rounding(tmp_path / "ours" / name, tmp_path / "alone" / name)


def test_two_processes_train_as_one(tmp_path):
    check(tmp_path, 2, WAYS, 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    """NCCL between them."""
    torch.use_deterministic_algorithms(False)  # the processes that are started do not have it either
    corpus = write_corpus(tmp_path)
    for folder in ("alone", "ours"):
        (tmp_path / folder).mkdir()
    run_ways(corpus, tmp_path / "alone", WAYS, 1, device="cuda")
    mp.spawn(gpu_worker, args=(2, corpus, tmp_path / "ours", WAYS, 2), nprocs=2)
    for name in WAYS:
        equal_to_rounding(tmp_path / "ours" / name, tmp_path / "alone" / name, loss=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("context", [2, 4])
def test_four_processes_train_as_one(tmp_path, context):
    ways = WAYS
    if context == 2:  # two sequences, each over two ranks
        ways = {n: dataclasses.replace(c, micro_tokens=32) for n, c in WAYS.items() if n.startswith("context")}
    check(tmp_path, 4, ways, context)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """A sharded checkpoint of two ranks is one process's too: the shards are found by name, not by rank."""
    corpus = write_corpus(tmp_path)
    ways = {"fsdp": dataclasses.replace(WAYS["fsdp"], micro_tokens=32)}
    (tmp_path / "ours").mkdir()
    mp.spawn(part_way, args=(2, corpus, tmp_path / "ours", ways), nprocs=2)
    assert [place.name for place in list_checkpoints(tmp_path / "ours" / "fsdp")] == ["step-00000002"]
    run_ways(corpus, tmp_path / "ours", ways, 1)
    run_ways(corpus, tmp_path / "alone", ways, 1)
    equal_to_rounding(tmp_path / "ours" / "fsdp", tmp_path / "alone" / "fsdp")


def part_way(rank, size, corpus, out, ways):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet-{size}", rank=rank, world_size=size)
    run_ways(corpus, out, ways, 1, stop=2)
    dist.destroy_process_group()


# -- torchrun


def torchrun(corpus, run, steps):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "mamba3", "train", str(corpus), "--out", str(run), "--steps", str(steps), "--warmup-steps", "1"]
    command += [
        "--seq-len",
        "16",
        "--batch-tokens",
        "64",
        "--micro-tokens",
        "32",
        "--val-fraction",
        "0.2",
        "--layers",
        "1",
    ]
    command += ["--d-model", "16", "--d-state", "8", "--headdim", "8", "--d-intermediate", "16", "--device", "cpu"]
    command += ["--eval-every", "0", "--save-every", "3", "--parallel", "fsdp"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_with_a_checkpoint_to_go_on_from(tmp_path):
    corpus, run, steps = write_corpus(tmp_path), tmp_path / "run", 60
    job = torchrun(corpus, run, steps)
    while job.poll() is None and len(read_metrics(run / "metrics.jsonl")) < 8:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said or "run the same command again" in said
    newest = int(list_checkpoints(run)[-1].name.removeprefix("step-"))
    assert newest >= 3
    before = {line[1]: line[2] for line in losses(run) if line[0] == "step" and line[1] <= newest}
    job = torchrun(corpus, run, steps)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    after = {line[1]: line[2] for line in losses(run) if line[0] == "step"}
    assert len(after) == steps and {k: after[k] for k in before} == before
    job = torchrun(corpus, tmp_path / "whole", steps)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert losses(tmp_path / "whole") == losses(run)
