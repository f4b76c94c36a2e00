import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbp_compile.nn import sampling
from sbp_compile.training import Conditions, LeNet500300, Phase, Recipe, Task, World, load, networks, train
from sbp_compile.training.checkpoint import read_state
from sbp_compile.training.recipes import Noise

TOOL = Path(__file__).parents[2] / "tools" / "train.py"
JOINT = Noise(Phase(1, batch=39), (0.5, 0.5, 0.5), init_log_sigma=-1.0)  # one step on all images
STEPS = Noise(
    Phase(3, batch=13), (0.5, 0.5, 0.5), init_log_sigma=-1.0
)  # the last share of a batch is smaller


class TinyNetwork(LeNet500300):
    def __init__(self, *, noise=True):
        super().__init__((784, 12, 8), noise=noise)


class StoppedError(Exception):
    pass


class Observer:
    def __init__(self, stop_after=None):
        self.count, self.stop_after = 0, stop_after

    def step(self, phase, done, total, loss):
        self.count += 1
        if self.count == self.stop_after:
            raise StoppedError

    def epoch(self, record):
        pass


def begin(folder, settings, world, observer=None, **options):
    networks.CLASSES["tiny"] = TinyNetwork
    task = Task(load(f"folder:{folder}"))
    task.images, task.labels = task.images[:39], task.labels[:39]
    recipe = Recipe("tiny", Phase(0), {"it": settings})
    state = options.pop("state", None)
    return train(task, recipe, "it", observer or Observer(), Conditions(world=world, **options), state=state)


def work(rank, images, folder):
    """Run in each of two processes: one joint step, then a run that stops in its middle."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        world = World(rank, 2)
        module = begin(images, JOINT, world).method.module
        found = {name: (p.detach(), p.grad) for name, p in module.named_parameters()}
        torch.save(found, f"{folder}/joint-{rank}.pt")
        try:
            begin(images, STEPS, world, Observer(5), checkpoint=Path(folder) / "run.ckpt", checkpoint_s=0.0)
        except StoppedError:
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def worked(idx_folder, tmp_path):
    torch.multiprocessing.spawn(work, args=(str(idx_folder), str(tmp_path)), nprocs=2)
    return tmp_path


def draws_of_both_ranks(monkeypatch):
    """Let a single process draw what two ranks draw for their shares of the batch."""
    generators = {}

    def uniform(rows, mu, width=None):
        drawn = torch.empty(rows, width or len(mu))
        for rank in (0, 1):
            if rank not in generators:
                World(rank, 2).seed(0, 1, 0)
                generators[rank] = torch.Generator().manual_seed(torch.initial_seed())
            part = drawn[rank::2]
            part.copy_(torch.rand(part.shape, generator=generators[rank]))
        eps = torch.finfo(torch.float32).eps
        return drawn.clamp_(eps / 4, 1 - eps / 2)

    monkeypatch.setattr(sampling, "uniform", uniform)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_and_a_run_goes_on_with_one(worked, idx_folder, monkeypatch):
    ranks = [torch.load(worked / f"joint-{rank}.pt", weights_only=True) for rank in (0, 1)]
    with monkeypatch.context() as patch:
        draws_of_both_ranks(patch)
        joint = begin(idx_folder, JOINT, World()).method.module
    for name, parameter in joint.named_parameters():
        for value, gradient in (rank[name] for rank in ranks):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)
            assert torch.equal(value, ranks[0][name][0])
            assert gradient.abs().sum() > 0

    state = read_state(worked / "run.ckpt")
    assert (state.phase, state.step) == (1, 4)
    observer = Observer()
    result = begin(idx_folder, STEPS, World(), observer, state=state)
    assert observer.count == 5
    assert all(value.isfinite().all() for value in result.model.parameters())
    assert [epoch["epoch"] for epoch in state.epochs] == [1, 2, 3]


def test_noise_is_the_ranks_own_and_the_steps_own():
    draws = []
    for rank, step in ((0, 0), (1, 0), (0, 1), (0, 0)):
        World(rank, 2).seed(0, 1, step)
        draws.append(torch.rand(8))
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_shares_average_to_the_mean_of_the_batch(size, count):
    batch = torch.arange(count)
    losses = torch.rand(count, dtype=torch.float64)
    shares = [World(rank, size).share(batch) for rank in range(size)]
    mean = sum(losses[mine].mean() * factor for mine, factor in shares) / size
    torch.testing.assert_close(mean, losses.mean())
    assert all(len(mine) for mine, _ in shares)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "shards"])
def test_torchrun_trains_and_another_number_of_processes_takes_over(idx_folder, tmp_path, first):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["lenet500300", "--dataset", f"folder:{idx_folder}", "--dense-epochs", "1", "--epochs", "2"]
    options += ["--no-figures", "-o", str(tmp_path / "m.pt"), "--resume"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launches = [([*launcher, "2", TOOL], 2), ([TOOL], 1), ([*launcher, "3", TOOL, "--shard"], 3)]
    launches = launches if first == "ddp" else [([*launcher, "2", TOOL, "--shard"], 2), ([TOOL], 1)]
    for launch, processes in launches:
        subprocess.run([sys.executable, *launch, *options], check=True, env=environment)
        log = json.loads((tmp_path / "m.json").read_text())
        assert [epoch["phase"] for epoch in log["epochs"]] == ["dense", "sbp", "sbp"]
        assert log["processes"] == processes
