"""One stream over several workers: N processes with parts of a batch give what one process gives with the batch.

The processes are forked by this file, run as a program (torch is imported once): it writes what each worker saw, and the tests
compare that with one process. Sums in another order differ by 4e-6 at most after six steps, where logits are about 10.
"""

import copy
import datetime
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tta
from tta import distributed
from tta.adapter.base import DISTRIBUTED
from tta.cli.listings import NOTES
from tta.distributed import Workers
from tta.methods import find
from tta.pooled import Pool
from tta.results.cost import Passes

TOLERANCE = 1e-4
SPLITS = {  # images of each worker in each batch of 24
    1: [(24,)] * 6,
    2: [(12, 12), (24, 0), (5, 19), (0, 24), (12, 12), (1, 23)],
    3: [(8, 8, 8), (24, 0, 0), (5, 0, 19), (0, 1, 23), (8, 8, 8), (1, 22, 1)],
}


class Net(nn.Module):
    """Images (batch, 3, 12, 12) -> logits (batch, 5) by the colour; not finite for an image with a pixel of 50."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.deep, self.norm2 = nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm2(self.deep(self.norm1(self.conv(x)).relu())).relu()
        return x.flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)) / (x.amax((1, 2, 3)) < 50)[:, None]


class LayerNorm2d(nn.Module):
    """A normalisation layer of a kind that is not known here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Unknown(Net):
    """A net of which adapters warn when they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.more = LayerNorm2d()


def pictures(labels: Tensor, seed: int) -> Tensor:
    """Noise on the colour of each class, (n, 3, 12, 12)."""
    draws = torch.Generator().manual_seed(seed)
    colours = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(len(labels), 3, 12, 12, generator=draws) - 0.5
    return 0.25 + colours[labels][..., None, None] / 2 + 0.3 * noise


@cache
def source() -> tuple[nn.Module, Tensor]:
    """A net whose last layer is fitted to the colours, and the images that it was fitted to."""
    torch.manual_seed(0)
    net, labels = Net().eval(), torch.arange(100) % 5
    images = pictures(labels, seed=2)
    with torch.no_grad():
        for norm in (net.norm1, net.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
            norm.momentum = 1.0
        net.train()(images)
        features = net.eval().features(images)
        inputs = torch.cat([features, torch.ones(100, 1)], 1)
        solved = torch.linalg.lstsq(inputs.double(), 8 * torch.eye(5)[labels].double()).solution.float()
        net.fc.weight.copy_(solved[:-1].T)
        net.fc.bias.copy_(solved[-1])
    return net, images


def shifted(batches: int = 6, *, in_runs: bool = False, size: int = 24) -> Tensor:
    """Darker batches of less contrast, (batches, size, 3, 12, 12), their labels mixed or in runs."""
    total = batches * size
    mixed = torch.randint(5, (total,), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(total) * 5 // total if in_runs else mixed
    return (0.1 + 0.6 * pictures(labels, seed=4)).view(batches, size, 3, 12, 12)


CASES: dict[str, dict] = {
    "source": {"method": "source"},
    "norm": {"method": "norm"},
    "norm blended": {"method": "norm", "alpha": 0.5},
    "norm moving": {"method": "norm", "momentum": 0.2},
    "norm small": {"method": "norm", "small_batches": "blend"},
    "tent": {"method": "tent", "lr": 0.02},
    "tent guarded": {"method": "tent", "lr": 0.02, "guard": True},
    "come": {"method": "tent", "lr": 0.02, "loss": "come", "optimizer": "sgd", "steps": 2},
    "eata": {"method": "eata", "lr": 0.1, "e_margin": 1.2, "d_margin": 0.8, "fisher_alpha": 50.0},
    "sar": {"method": "sar", "lr": 0.1, "rho": 0.5, "margin_e0": 1.2, "exclude": ()},
    "sar recovering": {"method": "sar", "lr": 0.1, "margin_e0": 1.5, "reset_constant": 0.7, "exclude": ()},
    "actmad": {"method": "actmad", "lr": 2e-3},
    "actmad activation": {
        "method": "actmad",
        "lr": 1e-3,
        "position": "activation",
        "score": "after",
        "optimizer": "adam",
    },
    "auto": {"method": "auto"},
    "default": {},
}
IN_RUNS = {"auto in runs": {"method": "auto"}, "auto few": {"method": "auto"}}
OF_THREE = ["norm", "norm blended", "tent", "eata", "sar", "actmad", "default", "auto in runs"]
RUNS = [*((2, case) for case in {**CASES, **IN_RUNS}), *((3, case) for case in OF_THREE)]


def make(case: str, group: object = None, **more: object) -> tta.Adapter:
    net, images = source()
    settings = {**({**CASES, **IN_RUNS}.get(case, {})), **more}
    method = settings.pop("method", None)
    given = images if method in ("eata", "actmad") else None
    return tta.adapt(net, method, source=given, process_group=group, **settings)


def stream_of(case: str) -> Tensor:
    if case == "auto few":
        return shifted(12, in_runs=True, size=4)
    return shifted(6, in_runs=case in IN_RUNS)


def splits_of(case: str, size: int) -> list[tuple[int, ...]]:
    few = {1: [(4,)], 2: [(2, 2), (4, 0), (1, 3)], 3: [(2, 1, 1), (0, 0, 4), (1, 3, 0)]}
    return (few[size] * 12)[:12] if case == "auto few" else SPLITS[size]


# ---------------------------------------------------------------------- wrong variants


def _of_own_images(self: Workers, x: Tensor) -> tuple[Tensor, ...]:
    own = x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(own, dims, correction=0)
    self.sum(mean.detach())  # the workers stay in step
    return mean, var, torch.tensor(24.0 * own[0, 0].numel())


def _mean_of_means(self: Workers, values: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(len(values), dtype=torch.bool) if mask is None else mask
    kept = torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0).sum(0) / mask.sum().clamp(min=1)
    return kept / self.size


_begin = Pool.begin


def _begin_with_own(self: Pool, *moments: Tensor) -> None:
    _begin(self, *moments)
    own = torch.zeros(self.weights.shape[1])
    own[self._mine] = 1
    self.weights = self.weights * own / (self.weights * own).sum(1, keepdim=True)


LEARNING = ["tent", "eata", "sar"]
# name -> (class, its method, what takes its place, cases that it makes wrong)
WRONG: dict[str, tuple[type, str, Callable, list[str]]] = {
    "local statistics": (Workers, "moments", _of_own_images, ["norm", "norm blended", "norm moving", *LEARNING]),
    "mean of means": (Workers, "mean", _mean_of_means, ["come", *LEARNING]),
    "statistics without gradient": (distributed._Sum, "backward", staticmethod(lambda ctx, g: (g * 0, None)), LEARNING),
    "gradient of one worker": (
        distributed._Sum,
        "backward",
        staticmethod(lambda ctx, g: (g, None)),
        [*LEARNING, "actmad"],
    ),
    "penalty of each worker": (Workers, "part", lambda self, x: x, ["eata", "actmad"]),
    "pool of one worker": (Pool, "begin", _begin_with_own, ["auto", "default"]),
}


# ---------------------------------------------------------------------- what the workers run


def follow(adapter: tta.Adapter, case: str) -> dict:
    """Adapt to a case's stream; all that the workers' results are compared by."""
    workers = adapter.workers
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits = []
        for batch, split in zip(stream_of(case), splits_of(case, workers.size), strict=True):
            logits.append(adapter(batch.split(split)[workers.rank]))
    return {
        "logits": [workers.gathered(part)[0] for part in logits],
        "state": adapter.state_dict(),
        "progress": adapter.progress(),
        "guard": None if adapter.guard is None else (adapter.guard.counts, list(adapter.guard.history)),
        "said": [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)],
    }


def wrong(name: str, group: object) -> dict:
    """Results of a wrong variant, for the cases that it is about."""
    owner, attribute, change, cases = WRONG[name]
    kept = vars(owner)[attribute]
    setattr(owner, attribute, change)
    try:
        return {case: follow(make(case, group), case)["logits"] for case in cases}
    finally:
        setattr(owner, attribute, kept)


def refusals(group: object, out: Path) -> dict:
    """Errors and states of workers of which one is given a bad batch, is paused, or holds another adapter."""
    found: dict = {}
    rank = Workers(group).rank

    def said(run: Callable) -> str:
        try:
            run()
        except ValueError as error:
            return str(error)
        return ""

    adapter, batches = make("tent", group), shifted()
    mine = [adapter.workers.part_of(batch) for batch in batches]
    bad, last = mine[0].clone(), rank == Workers(group).size - 1
    bad[-1, 0, 0, 0] = torch.nan
    found["nan"] = said(lambda: adapter(bad if last else mine[0]))
    found["shape"] = said(lambda: adapter(mine[0][:, :1] if last else mine[0]))
    found["size"] = said(lambda: adapter(mine[0][..., :8] if last else mine[0]))
    found["none"] = said(lambda: adapter(mine[0][:0]))
    found["ids"] = said(lambda: adapter.step(mine[0], ids=[1] if last else None))

    def paused_alone() -> None:
        if last:
            with adapter.paused():
                adapter(mine[0])
        else:
            adapter(mine[0])

    found["paused"] = said(paused_alone)
    found["after refusals"] = [adapter.workers.gathered(adapter(part))[0] for part in mine[:2]]
    with adapter.paused():
        found["while paused"] = adapter.workers.gathered(adapter(mine[2]))[0]
    adapter.save(out / f"{Workers(group).size}.safetensors")
    adapter.workers.objects(None)
    again = tta.load(out / f"{Workers(group).size}.safetensors", source()[0], process_group=group)
    exported = adapter.export()
    found["exported"] = exported(batches[3])
    found["continued"], found["loaded"] = (
        [a.workers.gathered(a(part))[0] for part in mine[3:]] for a in (adapter, again)
    )
    adapter.reset()
    found["reset"] = [adapter.workers.gathered(adapter(part))[0] for part in mine[:2]]
    adapter.join(None)
    found["alone again"] = adapter(batches[2])

    lost, huge = mine[1].clone(), mine[1].clone()
    lost[-1, 0, 0, 0], huge[-1, 0, 0, 0] = 60.0, 1e6
    for name, unfit in (("lost", lost), ("huge", huge)):
        adapter = make("tent", group)
        parts = [mine[0], unfit if last else mine[1], *mine[2:4]]
        logits = [adapter.workers.gathered(adapter(part))[0] for part in parts]
        found[name] = logits, adapter.progress()
    adapter = make("tent", group, on_bad="skip")
    all_bad = torch.full_like(mine[1], torch.nan)
    parts = [bad if last else mine[0], all_bad if last else mine[1], all_bad, mine[2]]
    found["skipped"] = [adapter.workers.gathered(adapter(part))[0] for part in parts]

    found["method"] = said(lambda: make("rotta", group, method="rotta"))
    found["wrapped"] = said(lambda: make("chain", group, method="chain:tent"))
    found["settings"] = said(lambda: make("tent", group, lr=0.1 if last else 0.2))
    other = make("tent")
    if last:
        other(batches[0])
    found["state"] = said(lambda: other.join(group))
    found["summary"] = str(make("tent", group).summary())
    found["copy"] = copy.deepcopy(make("tent", group))(batches[0])
    made = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made.append(tta.adapt(Unknown(), "tent", process_group=group))
    found["said at first"] = [str(w.message) for w in warned if issubclass(w.category, RuntimeWarning)]
    return found


def harmful(group: object) -> dict:
    """A rate so high that the guard goes back."""
    adapter = make("harmful", group, method="tent", lr=1.0, guard={"hold": 4})
    logits = []
    for number in range(14):
        batch = shifted()[number % 6]
        logits.append(adapter.workers.gathered(adapter(adapter.workers.part_of(batch)))[0])
    return {
        "logits": logits,
        "counts": adapter.guard.counts,
        "history": list(adapter.guard.history),
        "state": adapter.state_dict(),
    }


def work(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{out}/store{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    group = torch.distributed.group.WORLD
    found: dict = {case: follow(make(case, group), case) for of, case in RUNS if of == size}
    if size == 2:
        found["wrong"] = {name: wrong(name, group) for name in WRONG}
        found["harmful"] = harmful(group)
    if size == 3:
        found["refusals"] = refusals(group, out)
    torch.save(found, out / f"{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    for case in (
        "norm",
        "sar",
        "auto",
        "tent guarded",
    ):  # imports and first uses once; no backward pass, whose threads a fork loses
        make(case)
    forking = torch.multiprocessing.get_context("fork")
    for size in (2, 3):
        processes = [forking.Process(target=work, args=(rank, size, out)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a worker of {size} failed")


# ---------------------------------------------------------------------- the tests

needs_gloo = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and fork")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """Results of each worker, by the number of workers."""
    out = tmp_path_factory.mktemp("workers")
    command = [sys.executable, "-W", "ignore", __file__, str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return {
        size: [torch.load(out / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)] for size in (2, 3)
    }


@cache
def by_one(case: str) -> dict:
    """Results of one process without a group."""
    return follow(make(case), case)


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert [len(logits) for logits in ours] == [len(logits) for logits in theirs]
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def alone(case: str, **more: object) -> tuple[tta.Adapter, Tensor]:
    return make(case, **more), shifted()


@needs_gloo
@pytest.mark.parametrize(("size", "case"), RUNS)
def test_workers_give_what_one_gives(seen, size, case):
    one, first = by_one(case), seen[size][0][case]
    assert apart(first["logits"], one["logits"]) < TOLERANCE
    assert first["progress"] == one["progress"]
    assert first["guard"] == one["guard"]
    shared = {name for name in one["state"] if not name.startswith("guard.answers.")}  # answers are for one worker
    for other in seen[size]:
        assert {*other[case]["state"]} == shared
        assert all(torch.equal(value, first["state"][name]) for name, value in other[case]["state"].items())


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("one") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("case", {**CASES, **IN_RUNS})
def test_a_group_of_one_changes_no_bit(group_of_one, case):
    in_group, plain = follow(make(case, group_of_one), case), by_one(case)
    assert apart(in_group["logits"], plain["logits"]) == 0
    assert all(torch.equal(value, in_group["state"][name]) for name, value in plain["state"].items())


@pytest.mark.parametrize("case", [case for case in CASES if case != "source"])
def test_each_case_adapts(case):
    """The logits of the last batch are far from the source model's: what is compared is what was learned."""
    assert (by_one(case)["logits"][-1] - source()[0](shifted()[-1])).abs().max() > 100 * TOLERANCE


def test_filters_and_recovery_decide_something():
    """EATA and SAR leave out some samples, SAR recovers, and correlated labels bring the pools of auto."""
    for case in ("eata", "sar"):
        adapter, batches = alone(case)
        passes = Passes()
        passes.attach(adapter)
        for batch in batches:
            adapter(batch)
        assert 0 < passes.backwards < passes.forwards
    recovering, batches = alone("sar recovering")
    averages = [(recovering(batch), float(recovering.average_loss))[1] for batch in batches]
    assert torch.inf in averages
    assert by_one("auto in runs")["state"]["correlated"]


@needs_gloo
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (*_, cases) in WRONG.items() for case in cases])
def test_a_wrong_variant_is_far_off(seen, name, case):
    assert not apart(seen[2][0]["wrong"][name][case], by_one(case)["logits"]) < 100 * TOLERANCE


@needs_gloo
def test_the_guard_decides_as_around_one(seen):
    one, (first, second) = harmful(None), (found["harmful"] for found in seen[2])
    assert one["counts"]["rollbacks"] >= 1
    assert first["counts"] == second["counts"] == one["counts"]
    assert first["history"] == second["history"] == one["history"]
    assert apart(first["logits"], one["logits"]) < 10 * TOLERANCE  # lr=1 in the five batches before the alarm
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())


@needs_gloo
def test_what_one_worker_refuses_all_refuse(seen):
    found = [worker["refusals"] for worker in seen[3]]
    for reason, said in {
        "nan": "1 of the 24 images hold NaN or infinite values",
        "shape": "different shapes: (1, 12, 12), (3, 12, 12)",
        "size": "different shapes: (3, 12, 8), (3, 12, 12)",
        "none": "None of the 3 workers has an image",
        "ids": "1 ids for 8 images",
        "paused": "Of 3 workers only 2 would predict without learning",
        "method": "rotta cannot share a stream with other workers",
        "wrapped": "chain:tent cannot share a stream",
        "settings": "they differ in config.",
        "state": "they differ in state.",
    }.items():
        assert all(said in worker[reason] for worker in found), reason
    assert found[0]["ids"].startswith("Worker 2 of 3 was given a batch that is refused")
    adapter, batches = alone("tent")
    assert apart(found[0]["after refusals"], [adapter(batch) for batch in batches[:2]]) < TOLERANCE


@needs_gloo
def test_paused_saved_loaded_and_reset_are_as_with_one(seen):
    adapter, batches = alone("tent")
    first = [adapter(batch) for batch in batches[:2]]
    with adapter.paused():
        while_paused = adapter(batches[2])
    exported = adapter.export(batches[2])(batches[3])
    rest = [adapter(batch) for batch in batches[3:]]
    for found in (worker["refusals"] for worker in seen[3]):
        assert apart([found["while paused"], found["exported"]], [while_paused, exported]) < TOLERANCE
        assert apart(found["continued"], rest) < TOLERANCE
        assert apart(found["loaded"], found["continued"]) == 0
        assert apart(found["reset"], first) < TOLERANCE
        assert apart([found["alone again"]], [while_paused]) < TOLERANCE


@needs_gloo
@pytest.mark.filterwarnings("ignore:Tent")
@pytest.mark.parametrize(("name", "pixel"), [("lost", 60.0), ("huge", 1e6)])
def test_a_bad_image_of_one_worker_is_decided_by_all(seen, name, pixel):
    adapter, batches = alone("tent")
    bad = batches[1].clone()
    bad[-1, 0, 0, 0] = pixel
    expected = [adapter(batch) for batch in (batches[0], bad, batches[2], batches[3])]
    assert adapter.progress().recoveries == (name == "lost")
    for worker in seen[3]:
        logits, progress = worker["refusals"][name]
        assert progress == adapter.progress()
        finite = [torch.nan_to_num(one, 0, 0, 0) for one in (*logits, *expected)]
        assert apart(finite[:4], finite[4:]) < TOLERANCE


@needs_gloo
def test_bad_images_are_skipped_by_their_worker_alone(seen):
    adapter, batches = alone("tent")
    bad = torch.stack([batches[0], batches[1], batches[1]])
    bad[0, -1] = bad[1, 16:] = bad[2] = torch.nan
    expected = [adapter(batches[0][:-1]), adapter(batches[1][:16]), None, adapter(batches[2])]
    for worker in seen[3]:
        found = worker["refusals"]["skipped"]
        assert [int(logits.isnan().any(1).sum()) for logits in found] == [1, 8, 24, 0]
        assert apart([found[0][:-1], found[1][:16], found[3]], [expected[0], expected[1], expected[3]]) < TOLERANCE


@needs_gloo
def test_a_warning_is_said_once_and_a_copy_is_alone(seen):
    found = [worker["refusals"] for worker in seen[3]]
    assert [len(worker["said at first"]) for worker in found] == [1, 0, 0]
    assert "one stream over 3 workers" in found[0]["summary"]
    adapter, batches = alone("tent")
    assert apart([worker["copy"] for worker in found], 3 * [adapter(batches[0])]) < TOLERANCE


@needs_gloo
@pytest.mark.slow
def test_torchrun_runs_the_command_line_and_the_documented_example(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "launched" in code)
    (tmp_path / "workers.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [
        "-m",
        "tta",
        "run",
        "digits-c",
        "tent",
        "auto",
        "corruptions=[fog]",
        "samples=50",
        "batch_size=16",
        "clean=true",
    ]

    def ran(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = ran([*torchrun, "workers.py"])
    assert sorted(re.findall(r"(\d) Progress\(batches=4, updates=4", said)) == ["0", "1"]
    assert ran([*torchrun, *words, "--out", "two"]).count("Online error") == 1
    ran([sys.executable, *words, "--out", "one"])
    assert len(list(tmp_path.glob("two/*/*/result.json"))) == 2
    for one in tmp_path.glob("one/*/*/result.json"):
        alone, shared = (
            tta.Result.load(one.parent),
            tta.Result.load(tmp_path / "two" / one.parent.relative_to(tmp_path / "one")),
        )
        assert shared.errors == alone.errors
        assert shared.predictions.index.tolist() == alone.predictions.index.tolist()
        assert shared.predictions.prediction.tolist() == alone.predictions.prediction.tolist()
        for name in ("forwards", "backwards", "source_error_before", "source_error_after"):
            assert shared.metrics[name] == alone.metrics[name]
        assert shared.manifest["workers"] == 2
        assert "workers" not in alone.manifest


def test_methods_that_workers_can_share_are_listed():
    able = [name for name in tta.list_methods() if vars(find(name)).get("distributed")]
    named = ", ".join(able)
    assert named == DISTRIBUTED
    assert f"(torchrun) with {named}." in NOTES["methods"]
    page = (Path(__file__).parent.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert f"Methods that can: {', '.join(f'`{name}`' for name in able)}." in page


if __name__ == "__main__":
    main(Path(sys.argv[1]))
