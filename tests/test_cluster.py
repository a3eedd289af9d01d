"""Benchmarks over Ray: two nodes on this machine, one of which is killed while it runs a cell; what a cell takes of a node."""

import itertools

import pytest

import tta
from tta.benchmark import Failure, workers
from tta.config import ConfigError

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install 'tta-toolkit[ray]'")
pytestmark = pytest.mark.slow

GRID = {
    "name": "grid",
    "methods": ["source", "norm", "tent"],
    "streams": {"digits-c": {"samples": 20, "corruptions": ["fog", "contrast"]}},
    "models": ["digits-cnn"],
    "seeds": [0, 1, 2],
}
# A cell that sleeps until its node is killed, and when it is run again gives the node's name.
SLEEPER = """
import pathlib, time, ray
node, begun = ray.get_runtime_context().get_node_id(), pathlib.Path("begun")
is_first = not begun.exists()
with begun.open("a") as file:
    print(node, file=file)
time.sleep(300 if is_first else 0)
"""


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that has a head without CPUs, so that every cell runs on a node that a test adds."""
    monkeypatch.setattr(workers, "POLL_SECONDS", 1.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # nodes would give it to their processes
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=node(num_cpus=0, include_dashboard=False))
    yield made
    made.shutdown()


def node(**has):
    return {"object_store_memory": 100_000_000, **has}


def test_a_grid_ends_with_the_same_table_though_a_node_is_killed(cluster, tmp_path):
    cluster.add_node(**node(num_cpus=1))
    doomed = cluster.add_node(**node(num_cpus=3))
    killed = []

    def report(cell, outcome, done, total):
        if not killed:
            killed.append(done)
            cluster.remove_node(doomed, allow_graceful=False)

    found = tta.bench(GRID, out=tmp_path / "ray", ray=cluster.address, report=report).format("csv")
    assert killed == [1]  # of nine
    assert found == tta.bench(GRID, out=tmp_path / "plain").format("csv")
    assert "Failed" not in found


def test_cells_of_a_killed_node_are_run_again_on_another(cluster, tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    tasks = ["__import__('runpy').run_path('sleeper.py')['node']", *map(str, range(8))]
    doomed, said, found = cluster.add_node(**node(num_cpus=3)), [], {}
    monkeypatch.chdir(tmp_path)  # the node is elsewhere, and the cells' paths are meant from here

    def say(text):
        said.append(text)
        cluster.add_node(**node(num_cpus=1))

    for task, outcome in workers.over_ray(eval, tasks, cluster.address, say=say):
        found[task] = outcome
        if doomed and (tmp_path / "begun").exists():
            cluster.remove_node(doomed, allow_graceful=False)
            doomed = None
    assert isinstance(found[tasks[0]], str), found[tasks[0]]
    first, second = (tmp_path / "begun").read_text().split()
    assert first != second == found.pop(tasks[0])
    assert found == {task: int(task) for task in tasks[1:]}
    assert said == ["No machine is left that has what a cell takes (CPU 1): waiting for one."]


def test_a_cell_takes_what_it_is_given_of_a_node(cluster):
    cluster.add_node(**node(num_cpus=4, num_gpus=2, resources={"a100": 1}))
    seen = "(__import__('time').time(), __import__('time').sleep(1), __import__('time').time())[::2]"
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    shown = f"[__import__('os').environ.get(name) for name in {names}]"

    def outcomes(cell, count, **resources):
        cells = [f"({shown}, {seen}, {number})" for number in range(count)] if cell is None else cell
        return [outcome for _, outcome in workers.over_ray(eval, cells, cluster.address, resources)]

    pinned = outcomes(None, 2, CPU=2)  # one GPU each
    assert sorted(gpu for (gpu, _), *_ in pinned) == ["0", "1"]
    assert {threads for (_, threads), *_ in pinned} == {"2"}
    shared = outcomes(None, 4, GPU=0.5)
    assert sorted(gpu for (gpu, _), *_ in shared) == ["0", "0", "1", "1"]
    own = sorted(times for _, times, _ in outcomes(None, 3, GPU=0, a100=1))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))  # one after another


def test_what_no_node_has_is_refused_and_what_a_cell_does_wrong_is_said(cluster):
    cluster.add_node(**node(num_cpus=1))
    with pytest.raises(ConfigError, match=r"has what a cell takes \(CPU 1, a100 1\).*CPU 1, memory"):
        list(workers.over_ray(eval, ["1"], cluster.address, {"a100": 1}))
    with pytest.raises(ConfigError, match="takes something"):
        list(workers.over_ray(eval, ["1"], cluster.address, {"CPU": 0}))
    lock = "__import__('threading').Lock()"
    found = dict(workers.over_ray(eval, [lock, "1 / 0"], cluster.address))
    assert found["1 / 0"] == Failure("ZeroDivisionError: division by zero")
    assert "_thread.lock" in found[lock].reason  # an outcome that cannot be sent


def test_local_is_a_cluster_of_its_own(cluster, monkeypatch):
    cluster.add_node(**node(num_cpus=1))
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # where Ray would connect to unasked
    (outcome,) = (outcome for _, outcome in workers.over_ray(eval, ["__import__('ray').nodes()"], "local"))
    theirs = {found.node_id for found in cluster.worker_nodes}
    assert theirs.isdisjoint(found["NodeID"] for found in outcome)
