"""`--shard`: processes with their parts of the parameters (FSDP2) learn, write and read what others do."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from sbp_compile.errors import UsageError
from sbp_compile.nn import named_noise_layers
from sbp_compile.sharding import is_sharded
from sbp_compile.training import Conditions, LeNet500300, Phase, Recipe, Task, World, load, networks, train
from sbp_compile.training.checkpoint import read_state
from sbp_compile.training.learner import ShardedLearner, _blocks
from sbp_compile.training.methods import Pretraining
from sbp_compile.training.recipes import Dropout, GroupLasso, Noise, SparseVD

PHASE = Phase(2, batch=13)  # 39 images: the last process's share of a batch is smaller
NOISE = Noise(PHASE, init_log_sigma=-1.0, noise_factor=300.0)
ONE = torch.zeros(2, 1, 28, 28)


class Tiny(LeNet500300):
    def __init__(self, *, noise=True):
        super().__init__((784, 12, 7), noise=noise)


class Blocks(nn.Module):
    """What is gathered block by block, with odd widths, and buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 5, 5, 3, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3, bias=False)) for _ in range(2)
        )
        self.last = nn.Linear(5, 10)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


@dataclass(frozen=True)
class Alone(World):
    """One process that shards all the same."""

    @property
    def shards(self):
        return True


class StoppedError(Exception):
    pass


class Observer:
    def __init__(self, stop_after=None):
        self.count, self.stop_after, self.epochs = 0, stop_after, []

    def step(self, phase, done, total, loss):
        self.count += 1
        if self.count == self.stop_after:
            raise StoppedError

    def epoch(self, record):
        self.epochs.append((record.kl, record.kept, record.error))


def begin(folder, network, settings, world, *, stop_after=None, state=None, **options):
    networks.CLASSES[network.__name__] = network
    task = Task(load(f"folder:{folder}"))
    task.images, task.labels = task.images[:39], task.labels[:39]
    recipe = Recipe(network.__name__, Phase(1, batch=20), {"it": settings})
    observer = Observer(stop_after)
    result = train(task, recipe, "it", observer, Conditions(world=world, **options), state=state)
    return result.method.module.state_dict(), observer.epochs, (result.kept, result.masked_error)


def start(folder, network, settings, world, checkpoint):
    """Train to the middle of the second epoch of the method, with a checkpoint of every step before."""
    with pytest.raises(StoppedError):
        begin(folder, network, settings, world, stop_after=7, checkpoint=checkpoint, checkpoint_s=0.0)


def close(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    for epoch, other in zip(found[1], expected[1][-len(found[1]) :], strict=True):
        assert epoch == (pytest.approx(other[0], rel=1e-4), *other[1:])
    assert found[2] == expected[2]


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "settings",
    [
        NOISE,
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (SparseVD(PHASE, 0.3, 100.0), GroupLasso(PHASE, 0.3), Dropout(PHASE))
        ),
    ],
)
def test_a_sharded_run_is_the_run_without_shards_and_goes_on_from_its_checkpoints(
    one_process, idx_folder, tmp_path, settings
):
    expected = begin(idx_folder, Tiny, settings, World())
    close(begin(idx_folder, Tiny, settings, Alone()), expected)
    for number, (before, after) in enumerate([(World(), Alone()), (Alone(), World())]):
        checkpoint = tmp_path / f"{number}.ckpt"
        start(idx_folder, Tiny, settings, before, checkpoint)
        state = read_state(checkpoint)
        assert (state.phase, state.step) == (1, 4)
        assert not any(map(is_sharded, state.module.values()))
        close(begin(idx_folder, Tiny, settings, after, state=state), expected)


def run_both(rank, images, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole, sharded = World(rank, 2), World(rank, 2, sharded=True)
    try:
        for network, settings in ((Blocks, NOISE), (Tiny, GroupLasso(PHASE, 0.3))):
            expected = begin(images, network, settings, whole)
            compare = close if rank == 0 else lambda *_: None  # without shards, norms of others are their own
            compare(begin(images, network, settings, sharded), expected)
            for before, after in ((whole, sharded), (sharded, whole)):
                checkpoint = Path(folder) / f"{network.__name__}-{before.sharded}.ckpt"
                start(images, network, settings, before, checkpoint)
                distributed.barrier()
                compare(begin(images, network, settings, after, state=read_state(checkpoint)), expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_shards_are_two_without_and_take_over_from_each_other(idx_folder, tmp_path):
    torch.multiprocessing.spawn(run_both, args=(str(idx_folder), str(tmp_path)), nprocs=2)
    for path in tmp_path.glob("*.ckpt"):
        network, settings = (Blocks, NOISE) if "Blocks" in path.name else (Tiny, GroupLasso(PHASE, 0.3))
        state = read_state(path)
        module, epochs, _ = begin(idx_folder, network, settings, World(), state=state)
        assert len(epochs) == 1
        assert all(value.isfinite().all() for value in module.values())


def test_members_of_containers_are_blocks_where_one_call_calls_them_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.parts = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
            self.inner = nn.ModuleDict({"twice": nn.Linear(4, 4), "read": nn.Linear(4, 4)})
            self.tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.tied[1].weight = self.first.weight

        def forward(self, x):
            x = self.inner["twice"](self.inner["twice"](self.parts(self.first(x))))
            x = nn.functional.linear(x, self.inner["read"].weight)
            return self.tied[1](self.tied[0](x))

    assert _blocks(Net(), torch.zeros(2, 4)) == ["parts.0", "parts.2.0", "tied.0"]


def test_noise_is_gathered_with_the_block_that_it_belongs_to(one_process, idx_folder):
    networks.CLASSES["Blocks"] = Blocks
    module = networks.noisy_network(Blocks(), ONE, -1.0)
    blocks = _blocks(module, ONE)
    assert blocks == [f"blocks.{block}.{part}" for block in (0, 1) for part in (0, 2)]
    learner = ShardedLearner(Pretraining(module, ONE), Alone(), ONE)
    layers = named_noise_layers(learner.called)
    assert layers.keys() == {"blocks.0.0.noise_after", "blocks.1.0.noise_after"}
    assert all(map(is_sharded, learner.called.parameters()))
    assert not any(map(is_sharded, module.parameters()))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(()), "'scale' is a single number"),
        (torch.ones(2, 3).T, "'scale' is not contiguous"),
        (torch.ones(2, dtype=torch.float64), "of several dtypes"),
    ],
)
def test_parameters_that_have_no_parts_are_refused(one_process, value, message):
    module = Tiny(noise=False)
    module.scale = nn.Parameter(value)
    with pytest.raises(UsageError, match=message):
        ShardedLearner(Pretraining(module, ONE), Alone(), ONE)


def test_the_first_process_says_when_a_checkpoint_is_due(one_process):
    device = torch.device("cpu")
    assert [World(rank, 2).agree(True, device) for rank in (0, 1)] == [True, False]
    assert [Alone().agree(due, device) for due in (True, False)] == [True, False]
    assert not World(0, 1, sharded=True).shards
