"""Protocols: what each promises, over domains of any size, and the orders that the released builders give."""

import json
import math
import zlib
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

import tta
from tta.cli import main
from tta.datasets import CORRUPTIONS, Stream
from tta.datasets.orders import ORDERS, class_turn, dirichlet_chunks, imbalanced
from tta.datasets.protocols import PROTOCOLS
from tta.engine import OnlineModule, measure_cost

# Those that neither leave out nor repeat a sample of the domains they are given.
PLAIN = ("continual", "per-domain", "episodic", "csc", "batch-1", "budget", "feedback", "mixed", "correlated", "cdc")
CROSSING = ("mixed", "ptta")
NEEDS_CORRUPTIONS = ("gradual", "ccc")
# accuracies of a model that loses 4 points with each quarter of severity
LOSING = (96.0 - 4 * np.add.outer(np.arange(21), np.arange(21))).clip(min=10)
CCC = {"matrix": dict.fromkeys(permutations(CORRUPTIONS, 2), LOSING), "total": 60, "speed": 7}


class Unreadable(Dataset):
    """Knows its labels, fails as soon as an image is asked for."""

    def __init__(self, labels):
        self.targets = [int(label) for label in labels]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        raise AssertionError("an image was read")


def make(labels, **settings):
    return tta.stream({f"d{n}": Unreadable(part) for n, part in enumerate(labels)}, **settings)


def arrivals(stream):
    return [tuple(pair) for pair in stream.order.tolist()]


def batches(stream):
    lengths = [plan.samples for plan in stream.schedule()]
    return [[tuple(pair) for pair in part.tolist()] for part in stream.order.split(lengths)]


def corrupted(**settings):
    """A small digits-c stream."""
    extra = CCC if settings.get("protocol") == "ccc" else {}
    return tta.stream(
        "digits-c", **{"samples": 12, "batch_size": 5, "corruptions": ["fog", "snow", "frost"], **extra, **settings}
    )


@pytest.fixture
def no_image(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an image was made")

    for module in ("domains", "ccc"):
        monkeypatch.setattr(f"tta.datasets.{module}.corrupt", fail)


labels = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=30), min_size=1, max_size=4)
quick = settings(max_examples=25, deadline=None)


# ---------------------------------------------------------------------- every protocol


def test_resets():
    never = [
        "continual",
        "gradual",
        "mixed",
        "correlated",
        "ptta",
        "cdc",
        "csc",
        "recurring",
        "forgetting",
        "budget",
        "feedback",
        "ccc",
    ]
    domain = ["per-domain", "label-shift", "batch-1", "outliers"]
    expected = dict.fromkeys(never, "never") | dict.fromkeys(domain, "domain") | {"episodic": "batch"}
    assert {name: protocol.reset for name, protocol in PROTOCOLS.items()} == expected


@quick
@given(labels=labels, seed=st.integers(0, 2**31), batch_size=st.integers(1, 9), protocol=st.sampled_from(PLAIN))
def test_every_sample_once(labels, seed, batch_size, protocol):
    stream = make(labels, protocol=protocol, seed=seed, batch_size=batch_size)
    assert sorted(arrivals(stream)) == [(d, i) for d, part in enumerate(labels) for i in range(len(part))]
    assert sum(plan.samples for plan in stream.schedule()) == stream.samples


@quick
@given(
    labels=labels, seed=st.integers(0, 2**31), batch_size=st.integers(1, 9), protocol=st.sampled_from(list(PROTOCOLS))
)
def test_batches_are_full_where_nothing_ends(labels, seed, batch_size, protocol):
    if protocol in NEEDS_CORRUPTIONS:
        return
    extra = {"outliers": {"outliers": Unreadable(range(99))}, "forgetting": {"clean": "d0"}}.get(protocol, {})
    stream = make([*labels, [0, 1]], protocol=protocol, seed=seed, batch_size=batch_size, **extra)
    plans = stream.schedule()
    size = 1 if protocol == "batch-1" else batch_size
    assert stream.batch_size == size
    assert all(1 <= plan.samples <= size for plan in plans)
    if protocol in CROSSING:
        assert all(plan.samples == size for plan in plans[:-1])
        return
    assert all(len(plan.domains) == 1 for plan in plans)
    for plan, following in pairwise(plans):
        assert plan.samples == size or plan.domains != following.domains or protocol == "cdc"


DRAWN = [
    *[(name, {}) for name in ("mixed", "ptta", "cdc", "label-shift", "outliers")],
    ("ccc", CCC),
    ("continual", {"shuffle": True}),
    ("correlated", {"delta": 0.5, "min_size": 0}),
    ("cdc", {"draw": "multinomial"}),
    ("label-shift", {"prior": 4.0}),
]


@pytest.mark.parametrize(("protocol", "extra"), DRAWN)
def test_the_seed_decides_and_nothing_else(protocol, extra):
    def order(seed):
        np.random.rand(1)  # the global generators play no part
        torch.rand(1)
        stream = tta.stream("digits-c", samples=60, batch_size=4, protocol=protocol, seed=seed, **extra)
        return [(d, stream.domains[d].index[i].item()) for d, i in arrivals(stream)]

    assert order(3) == order(3)
    assert order(3) != order(4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_schedule_before_an_image_is_made(protocol, no_image):
    stream = corrupted(protocol=protocol, samples=100)
    assert f"protocol {protocol}" in str(stream)
    assert sum(plan.samples for plan in stream.schedule()) == stream.samples == len(stream.order)


@pytest.mark.parametrize("protocol", ["outliers", "forgetting", "gradual"])
def test_picture_before_an_image_is_made(protocol, no_image):
    from tta.report.schedule import schedule

    stream = corrupted(protocol=protocol, **({"learn": False} if protocol == "forgetting" else {}))
    above, below = schedule(stream).axes
    assert above.get_xlim() == below.get_xlim() == (0, len(stream))
    assert len(above.patches) == len(stream.domains)
    assert len(below.patches) == len(stream.domains[0].labels.unique())
    assert len(above.lines) == sum(stream.paused)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_evaluated_is_what_was_planned(protocol, cnn):
    stream = corrupted(protocol=protocol, corruptions=["fog", "contrast"], batch_size=12)
    result = tta.evaluate(tta.adapt(cnn, "source"), stream, progress=False)
    assert result.reset == PROTOCOLS[protocol].reset
    assert list(result.errors) == [domain.name for domain in stream.domains]
    assert result.predictions.domain.tolist() == stream.order[:, 0].tolist()
    known = sum(
        int((d.labels[stream.order[stream.order[:, 0] == n, 1]] >= 0).sum()) for n, d in enumerate(stream.domains)
    )
    assert result.samples == known
    assert json.loads(result.to_json())["manifest"]["data"]["protocol"] == protocol


@pytest.mark.parametrize("protocol", ["mixed", "correlated", "ptta", "outliers"])
def test_adapters_cannot_see_the_labels(protocol, cnn, monkeypatch):
    """The order may follow the labels; with the order fixed, permuted labels change no prediction."""

    def predictions(permuted):
        stream = corrupted(protocol=protocol, corruptions=["fog", "contrast"], samples=40)
        if permuted:
            for domain in stream.domains:
                domain.labels = torch.where(domain.labels < 0, domain.labels, (domain.labels + 3) % 10)
        return tta.evaluate(tta.adapt(cnn, "tent", lr=0.01), stream, progress=False).predictions

    plain, permuted = predictions(False), predictions(True)
    assert (plain.prediction == permuted.prediction).all()
    assert (plain.label != permuted.label).any()


# ---------------------------------------------------------------------- orders of the released builders

THREE = [np.arange(24) * 7 % 3, (np.arange(24) * 5 + 1) % 3]
AT_ONE_SEED = {
    # RoTTA's sampler
    "ptta": (THREE, {"seed": 1, "batch_size": 64}, "0:0 3 6 9 12 15 18 1 4 21 2 5 8 11 14 17 20 23 7 10 13 16 19 22 "
             "1:0 3 6 1 4 7 10 13 16 19 9 12 15 18 22 21 2 5 8 11 14 17 20 23"),
    # NOTE's target stream, minimum size 4
    "correlated": (THREE[:1], {"seed": 1, "delta": 0.1, "min_size": 4},
                   "0:16 19 4 1 7 22 8 14 11 2 20 23 17 5 10 13 21 6 3 18 0 12 9 15"),
    # SAR's script, imbalance 10
    "label-shift": ([np.repeat(np.arange(3), 8)], {"seed": 2021, "imbalance": 10, "total": 24},
                    "0:2 3 4 5 1 2 14 4 21 21 23 23 21 21 21 16 8 13 23 13 12 10 13 8"),
    # the benchmark's mixed_domains
    "mixed": ([[0] * 6, [0] * 6], {"seed": 1},
              "1:1 1:5 0:0 1:2 0:5 1:0 0:3 1:4 0:4 0:1 1:3 0:2"),
}  # fmt: skip


def spelled(text):
    domain, pairs = 0, []
    for word in text.split():
        *owner, position = word.split(":")
        domain = int(owner[0]) if owner else domain
        pairs.append((domain, int(position)))
    return pairs


@pytest.mark.parametrize("protocol", AT_ONE_SEED)
def test_order_is_the_released_builders(protocol):
    labels, given, expected = AT_ONE_SEED[protocol]
    assert arrivals(make(labels, protocol=protocol, **given)) == spelled(expected)


def test_prior_is_ttabs():
    (order,) = [arrivals(make(THREE[:1], protocol="label-shift", prior=4.0, seed=1))]
    assert [i for _, i in order] == [0, 22, 17, 20, 10, 13, 23, 14, 11, 18, 15, 21, 6, 19, 3, 1, 5, 8, 4]


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        ("dirichlet", [1, 1, 0, 0, 0, 0, 1, 1, 2, 2, 1, 0, 2, 2, 2]),
        ("multinomial", [1, 1, 1, 1, 0, 1, 2, 0, 0, 0, 0, 2, 2, 2, 2]),
    ],
)
def test_cdc_is_dpcores(draw, expected):
    stream = make([[0] * 24] * 3, protocol="cdc", draw=draw, seed=1, batch_size=5)  # 24 // 5 + 1 batches a domain
    assert [part[0][0] for part in batches(stream)] == expected


# ---------------------------------------------------------------------- one by one


def test_ten_orders():
    assert len(set(ORDERS)) == 10
    assert all(sorted(order) == sorted(CORRUPTIONS) for order in ORDERS)
    stream = tta.stream("digits-c", samples=2, order=5)
    assert [domain.name for domain in stream.domains] == list(ORDERS[5])
    some = tta.stream("digits-c", samples=2, order=0, corruptions=["fog", "snow", "brightness"])
    assert [domain.name for domain in some.domains] == ["brightness", "snow", "fog"]


def test_shuffle_is_the_same_in_each_domain():
    first, second = np.array(arrivals(make([[0] * 20, [0] * 20], shuffle=True, seed=7)))[:, 1].reshape(2, 20)
    assert (first == second).all()
    assert sorted(first) == list(range(20)) != first.tolist()


@pytest.mark.parametrize("first", ["descending", "full"])
def test_gradual_rises_and_falls_by_one(first, no_image):
    stream = corrupted(protocol="gradual", first=first)
    steps = [domain.name.partition("@")[0].split("-") for domain in stream.domains]
    paths = {name: [int(s) for n, s in steps if n == name] for name, _ in steps}
    up_and_down = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    assert paths == {
        "fog": up_and_down if first == "full" else [5, 4, 3, 2, 1],
        "snow": up_and_down,
        "frost": up_and_down,
    }
    assert [domain.severity for domain in stream.domains] == [int(s) for _, s in steps]
    assert arrivals(stream) == [(d, i) for d in range(len(steps)) for i in range(12)]
    assert "severity 2" in {d.name: d for d in stream.domains}["snow-2@2"].origin
    assert [d.name for d in corrupted(protocol="gradual", severity=2, corruptions=["fog", "snow"]).domains] == [
        *("fog-2", "fog-1", "snow-1", "snow-2", "snow-1@2"),
    ]


def test_gradual_shows_the_images_of_its_severities():
    stream = corrupted(protocol="gradual", batch_size=12)
    for number in (1, 6):
        domain = stream.domains[number]
        plain = corrupted(severity=domain.severity, corruptions=[domain.name.split("-")[0]], batch_size=12)
        assert torch.equal(stream[number].images, plain[0].images)


def test_recurring_keeps_each_round():
    stream = make([[0] * 5, [1] * 7], protocol="recurring", rounds=3, batch_size=4)
    assert [domain.name for domain in stream.domains] == ["d0", "d1", "d0@2", "d1@2", "d0@3", "d1@3"]
    assert arrivals(stream) == [(row, i) for row in range(6) for i in range((5, 7)[row % 2])]
    assert torch.equal(stream.domains[5].index, stream.domains[1].index)
    assert stream.domains[4].describe() == {"same_images_as": "d0"}


@quick
@given(labels=labels, seed=st.integers(0, 999), batch_size=st.integers(2, 9), gamma=st.sampled_from([0.05, 0.1, 5.0]))
def test_ptta_plays_domains_in_turn_and_drops_a_lone_sample(labels, seed, batch_size, gamma):
    stream = make(labels, protocol="ptta", seed=seed, batch_size=batch_size, gamma=gamma)
    every = [(d, i) for d, part in enumerate(labels) for i in range(len(part))]
    assert len(every) - stream.samples == (len(every) % batch_size == 1)
    assert set(arrivals(stream)) <= set(every)
    assert [d for d, _ in arrivals(stream)] == [d for d, _ in every][: stream.samples]
    classes = len({label for part in labels for label in part})
    for d, part in enumerate(labels):  # at most one run of a class in a slot, and as many slots as classes
        seen = [part[i] for owner, i in arrivals(stream) if owner == d]
        assert 1 + sum(a != b for a, b in pairwise(seen)) <= classes * classes


def test_ptta_has_the_papers_order_of_the_fifteen():
    assert [d.name for d in tta.stream("digits-c", samples=10, protocol="ptta").domains] == list(ORDERS[5])
    assert [d.name for d in corrupted(protocol="ptta").domains] == ["fog", "snow", "frost"]
    own = tta.stream("digits-c", samples=10, protocol="ptta", order=None)
    assert [d.name for d in own.domains] == list(CORRUPTIONS)


@quick
@given(labels=labels, seed=st.integers(0, 999))
def test_correlated_sorts_each_domain(labels, seed):
    stream = make(labels, protocol="correlated", seed=seed)
    assert arrivals(stream) == [
        (d, i) for d, part in enumerate(labels) for i in sorted(range(len(part)), key=lambda i: (part[i], i))
    ]
    mixed = [labels[d][i] for d, i in arrivals(make(labels, protocol="correlated", mixed=True, seed=seed))]
    assert mixed == sorted(label for part in labels for label in part)


@quick
@given(
    counts=st.lists(st.integers(4, 12), min_size=2, max_size=5), seed=st.integers(0, 999), min_size=st.integers(0, 3)
)
def test_dirichlet_chunks_have_a_minimum_size_and_one_run_of_each_class(counts, seed, min_size):
    part = np.repeat(np.arange(len(counts)), counts)
    order = dirichlet_chunks(part, 0.5, min_size, np.random.RandomState(seed))
    assert sorted(order) == list(range(len(part)))
    runs = 1 + int((np.diff(part[order]) != 0).sum())
    assert runs <= len(counts) ** 2
    # cut where the chunks may end: some cut gives as many chunks, of that size, without a class twice in two runs
    assert _divides(part[order].tolist(), len(counts), min_size)


def _divides(classes, chunks, min_size):
    """Whether a sequence is so many chunks of at least that size, each with one run of a class at most."""
    ends = {0}
    for _ in range(chunks):
        reached = set()
        for start in ends:
            seen: set[int] = set()
            for end in range(start, len(classes) + 1):
                if end > start:
                    new = classes[end - 1]
                    if new in seen and classes[end - 2] != new:
                        break
                    seen.add(new)
                if end - start >= min_size:
                    reached.add(end)
        ends = reached
    return len(classes) in ends


@quick
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    batch_size=st.integers(1, 9),
    draw=st.sampled_from(["dirichlet", "multinomial"]),
)
def test_cdc_reads_each_domain_in_order(sizes, seed, batch_size, draw):
    stream = make([[0] * n for n in sizes], protocol="cdc", draw=draw, seed=seed, batch_size=batch_size)
    for d, n in enumerate(sizes):
        own = [part for part in batches(stream) if part[0][0] == d]
        assert [i for part in own for _, i in part] == list(range(n))
        assert [len(part) for part in own] == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    if draw == "dirichlet":
        turns = [part[0][0] for part in batches(stream)]
        comings = [d for d, before in zip(turns, [None, *turns], strict=False) if d != before]
        assert max(comings.count(d) for d in set(comings)) <= 3


@quick
@given(part=st.lists(st.integers(0, 4), min_size=5, max_size=40), seed=st.integers(0, 999), total=st.integers(5, 90))
def test_label_shift_draws_from_each_class_in_its_turn(part, seed, total):
    stream = make([part, part], protocol="label-shift", imbalance=1e12, total=total, seed=seed)
    classes = sorted(set(part))
    steps = total // len(classes)
    first, second = (np.array([i for d, i in arrivals(stream) if d == n]) for n in (0, 1))
    assert (first == second).all()
    turns = np.array(part)[first].reshape(len(classes), steps)
    assert (turns == turns[:, :1]).all()  # so large an imbalance leaves one class a step
    assert sorted(turns[:, 0]) == classes


# The files that SAR ships (20f6e24, dataset/seed*_total_100000_ir_*.npy): CRC-32 of their numbers as int64.
SARS_FILES = {
    (2022, 1): 0x65609ABD,
    (2022, 1000): 0x572C8D54,
    (2022, 2000): 0x73756C57,
    (2022, 3000): 0xC893F2DB,
    (2022, 4000): 0x42D32BDE,
    (2022, 5000): 0x1E3517C2,
    (2022, 500_000): 0x52F76E22,
    (2023, 1000): 0xC5F425BF,
    (2023, 500_000): 0xC532613A,
}


@pytest.mark.parametrize(("seed", "imbalance"), SARS_FILES)
def test_label_shift_gives_the_files_that_sar_ships(seed, imbalance):
    """50 000 images, 50 of each class: the k-th ratio of SAR's list has the k-th shuffle of the classes."""
    drawn = imbalanced(np.repeat(np.arange(1000), 50), imbalance, 100_000, seed)
    assert zlib.crc32(drawn.astype(np.int64).tobytes()) == SARS_FILES[seed, imbalance]


def test_a_ratio_that_sar_has_no_file_of_takes_the_first_shuffle():
    first, other, listed = (class_turn(50, ratio, seed=3) for ratio in (1, 10, 1000))
    assert first == other != listed
    assert class_turn(50, 500_000.0, seed=3) == class_turn(50, 500_000, seed=3)  # the command line gives a float


def test_label_shift_of_imbalance_1_is_uniform():
    part = np.repeat(np.arange(4), 50)
    drawn = part[[i for _, i in arrivals(make([part], protocol="label-shift", imbalance=1, total=8000, seed=1))]]
    assert np.bincount(drawn) == pytest.approx([2000] * 4, rel=0.1)  # 5 standard deviations are 0.097
    assert np.bincount(drawn[:2000]) == pytest.approx([500] * 4, rel=0.2)


@quick
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_prior_takes_as_many_as_there_are_and_none_twice(counts, seed):
    part = np.repeat(np.arange(len(counts)), counts)
    taken = [i for _, i in arrivals(make([part], protocol="label-shift", prior=4.0, seed=seed))]
    assert len(set(taken)) == len(taken) <= len(part)
    share = np.random.default_rng(seed).dirichlet([4.0] * len(counts))
    most = int(min(np.array(counts) / share))
    assert np.bincount(part[taken], minlength=len(counts)).tolist() == (most * share).astype(int).tolist()


@quick
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 999), rate=st.floats(0, 0.6))
def test_outliers_come_at_their_rate(sizes, seed, rate):
    strange = Unreadable(range(99))
    stream = make([[1] * n for n in sizes], protocol="outliers", outliers=strange, rate=rate, seed=seed, batch_size=8)
    for d, n in enumerate(sizes):
        arrived = sorted(i for owner, i in arrivals(stream) if owner == d)
        count = round(n * rate / (1 - rate))
        assert arrived == list(range(n + count))
        assert stream.domains[d].labels.tolist() == [1] * n + [-1] * count
        assert len(set(stream.domains[d].index.tolist())) == n + count


def test_outliers_are_gaussian_noise_or_ones_own():
    stream = corrupted(protocol="outliers", rate=0.5, batch_size=24, corruptions=["fog"])
    (batch,) = stream
    rng = np.random.RandomState(1)  # the pixels of the released code
    noise = np.array(np.clip(rng.randn(12, 32, 32, 3) + 0.5, 0, 1) * 255, dtype=np.uint8)
    unknown = batch.labels < 0
    assert int(unknown.sum()) == 12
    first = int(batch.index[unknown].min())
    for index, image in zip(batch.index[unknown].tolist(), batch.images[unknown], strict=True):
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(noise[index - first]).permute(2, 0, 1))
    plain = corrupted(corruptions=["fog"], batch_size=12)[0]
    order = batch.index[~unknown].argsort()
    assert torch.equal((batch.images[~unknown][order] * 255).round().byte(), plain.images)

    own = TensorDataset(torch.rand(4, 3, 32, 32), torch.zeros(4))
    (batch,) = corrupted(protocol="outliers", outliers={"fog": own}, rate=0.25, corruptions=["fog"], batch_size=16)
    assert torch.equal(batch.images[batch.labels < 0].sort(0).values, own.tensors[0].sort(0).values)


def test_forgetting_returns_to_the_clean_images(no_image):
    stream = corrupted(protocol="forgetting", batch_size=12, learn=False)
    assert [d.name for d in stream.domains] == ["fog", "clean", "snow", "clean@2", "frost", "clean@3"]
    assert stream.paused == (False, True) * 3
    clean = stream[1]
    assert torch.equal(clean.images, stream.domains[0]._clean)
    assert torch.equal(clean.index, stream.domains[0].index)
    assert corrupted(protocol="forgetting").paused == (False,) * 18
    own = make([[0] * 3, [1] * 3, [1] * 3], protocol="forgetting", clean="d1")
    assert [d.name for d in own.domains] == ["d0", "d1", "d2", "d1@2"]


# ---------------------------------------------------------------------- mixed batches, and batches that teach nothing


def test_a_mixed_batch_has_each_domains_images():
    stream = corrupted(protocol="mixed", batch_size=7, samples=5)
    for batch in stream:
        for image, label, d, index in zip(*batch, strict=True):
            own = corrupted(corruptions=[stream.domains[int(d)].name], samples=5)[0]
            here = int((own.index == index).nonzero())
            assert torch.equal(image * 255, own.images[here].float())
            assert label == own.labels[here]


@pytest.mark.parametrize("protocol", ["mixed", "forgetting", "ptta", "gradual"])
def test_an_unfinished_loader_gives_the_same_images(protocol):
    stream = corrupted(protocol=protocol, batch_size=7)
    finished = [stream.finish(batch) for batch in stream.loader(unfinished=True)]
    for mine, plain in zip(finished, (stream[n] for n in range(len(stream))), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_domains_that_meet_have_one_size():
    def images(size, kind):
        return TensorDataset((torch.rand(4, 3, size, size) * 255).to(kind), torch.zeros(4, dtype=torch.long))

    with pytest.raises(ValueError, match=r"of one size.*\(3, 16, 16\), \(3, 8, 8\)"):
        list(tta.stream({"a": images(8, torch.uint8), "b": images(16, torch.uint8)}, protocol="mixed"))
    (batch,) = tta.stream(
        {"a": images(8, torch.uint8), "b": TensorDataset(torch.rand(4, 3, 8, 8), torch.zeros(4))}, protocol="mixed"
    )
    assert batch.images.dtype == torch.float32
    assert batch.images.max() <= 1


def test_reset_by_domain_looks_at_the_first_sample(cnn):
    stream = corrupted(protocol="mixed", samples=30)
    adapter, resets = tta.adapt(cnn, "tent"), []
    original = adapter.reset
    adapter.reset = lambda: (resets.append(1), original())
    tta.evaluate(adapter, stream, reset="domain", progress=False)
    first = [part[0][0] for part in batches(stream)]
    assert len(resets) == sum(a != b for a, b in zip(first, [None, *first], strict=False))


def logits_by_hand(cnn, stream, learned):
    adapter, seen = tta.adapt(cnn, "tent", lr=0.05), []
    for n, batch in enumerate(stream):
        if learned[n]:
            seen.append(adapter(batch.images))
        else:
            with adapter.paused():
                seen.append(adapter(batch.images))
    return torch.cat(seen).argmax(1)


def test_clean_batches_teach_nothing_when_asked(cnn):
    stream = corrupted(protocol="forgetting", learn=False, samples=40)
    result = tta.evaluate(tta.adapt(cnn, "tent", lr=0.05), stream, progress=False)
    expected = logits_by_hand(cnn, stream, [not paused for paused in stream.paused])
    assert result.predictions.prediction.tolist() == expected.tolist()
    assert result.manifest["paused_batches"] == 24
    learned = tta.evaluate(
        tta.adapt(cnn, "tent", lr=0.05), corrupted(protocol="forgetting", samples=40), progress=False
    )
    assert learned.predictions.prediction.tolist() != expected.tolist()


@pytest.mark.parametrize(("cost", "every"), [(1, 1), (2, 2), (2.5, 3), (3, 3)])
def test_a_slow_method_misses_batches(cnn, cost, every):
    stream = corrupted(protocol="budget", cost=cost, samples=40)
    result = tta.evaluate(tta.adapt(cnn, "tent", lr=0.05), stream, progress=False)
    expected = logits_by_hand(cnn, stream, [n % every == 0 for n in range(len(stream))])
    assert result.predictions.prediction.tolist() == expected.tolist()
    assert result.manifest["paused_batches"] == len(stream) - math.ceil(len(stream) / every)
    assert result.manifest["cost"] == cost


def test_measured_cost_leaves_the_adapter_alone(cnn, monkeypatch):
    adapter = tta.adapt(cnn, "tent", lr=0.05)
    before = adapter.state_dict()
    assert measure_cost(adapter, torch.rand(8, 3, 32, 32)) >= 1
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
    monkeypatch.setattr("tta.online.measure_cost", lambda adapter, images: 2.05)
    result = tta.evaluate(adapter, corrupted(protocol="budget"), progress=False)
    assert result.manifest["cost"] == 2.05
    assert result.manifest["paused_batches"] == 4  # of 9: a twentieth above 2 is noise


def test_a_method_that_costs_more_is_measured_so(cnn, monkeypatch):
    class Slow(tta.Adapter):
        config: tta.Config

        def adapt(self, x):
            for _ in range(19):
                self.predict(x)
            return self.predict(x)

    now = [0.0]

    def a_second(*_):
        now[0] += 1

    cnn.register_forward_hook(a_second)
    monkeypatch.setattr("tta.online.time.perf_counter", lambda: now[0])
    assert measure_cost(tta.adapt(cnn, Slow), torch.rand(8, 3, 32, 32)) == 20


@pytest.mark.parametrize("cost", [0, 0.5, math.inf, "much"])
def test_impossible_cost_is_named(cnn, cost):
    with pytest.raises(ValueError, match="cost is a number of batches, 1 or more, or 'measured'"):
        OnlineModule(tta.adapt(cnn, "source"), cost=cost)


# ---------------------------------------------------------------------- mistakes, command line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"protocol": "correlated", "dela": 0.1}, "'dela'. Did you mean 'delta'"),
        ({"protocol": "continual", "delta": 0.1}, "protocol 'continual': 'delta'"),
        ({"protocol": "correlated", "delta": "small"}, "delta of protocol 'correlated' is of type float; got 'small'"),
        ({"protocol": "correlated", "delta": -1}, "delta is 0 or more; got -1"),
        ({"protocol": "correlated", "delta": 0.1}, "do not fill 9 chunks with 10 each: lower min_size"),
        ({"order": 10}, "order is 0 to 9; got 10"),
        ({"protocol": "gradual", "first": "up"}, "first is 'descending' or 'full'; got 'up'"),
        ({"protocol": "recurring", "rounds": 0}, "rounds is 1 or more; got 0"),
        ({"protocol": "ptta", "gamma": 0}, "gamma is a number above 0; got 0"),
        ({"protocol": "cdc", "draw": "dice"}, "draw is 'dirichlet' or 'multinomial'; got 'dice'"),
        ({"protocol": "label-shift", "total": 3}, "total is 9 or more .a draw for each class.; got 3"),
        ({"protocol": "label-shift", "prior": 4.0, "total": 100}, "lower total .now 100."),
        ({"protocol": "outliers", "rate": 1.0}, "rate is a share from 0 up to, not including, 1; got 1.0"),
        ({"protocol": "outliers", "outliers": Unreadable([1])}, "needs 3 outliers; there are 1"),
        ({"protocol": "outliers", "outliers": "textures"}, "outliers is 'gaussian-noise'; got 'textures'"),
        ({"protocol": "forgetting", "clean": "day"}, "clean is one of fog, snow, frost, or nothing; got 'day'"),
        ({"protocol": "budget", "cost": 0.5}, "cost is a number, 1 or more, or 'measured'; got 0.5"),
        ({"protocol": "ptta", "batch_size": 0}, "batch_size is 1 or more; got 0"),
        ({"protocol": "gradual", "severity": 2.5}, "severity of protocol 'gradual' is a whole number; got 2.5"),
        ({"protocol": "ccc", "matrix": None}, "as matrix=PATH, or a source model to calibrate on as model=MODEL"),
        ({"protocol": "ccc", "matrix": 5}, "matrix is a file, a mapping, or what calibrate.. gives; got 5"),
        ({"protocol": "ccc", "matrix": {("fog", "snow"): LOSING}}, "no pair frost.snow; it has: fog.snow"),
        ({"protocol": "ccc", "target": 101}, "target is an accuracy in percent; got 101"),
        ({"protocol": "ccc", "speed": 0}, "speed is 1 or more; got 0"),
        ({"protocol": "ccc", "total": 0}, "total is 1 or more; got 0"),
        ({"protocol": "ccc", "target": 0}, "target=0 needs two or more of gaussian_noise, .*; the stream has: none"),
        ({"protocol": "ccc", "recipe": "svhn"}, "No recipe 'svhn'"),
        ({"protocol": "ccc", "matrix": None, "model": "digits-cnn"}, "model gives logits for images; got 'digits-cnn'"),
        ({"protocol": "ccc", "matrix": None, "model": len, "grid": 0.75}, "grid is 0.25, 0.5, 1, .* got 0.75"),
        ({"protocol": "ccc", "matrix": None, "model": len, "cache": "x"}, "cache keeps the accuracies of an nn.Module"),
        ({"protocol": "ccc", "matrix": None, "model": len, "per_cell": 0}, "per_cell is 1 or more; got 0"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        corrupted(**given)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("gradual", "needs domains with severities; 'd0' has none"),
        ("forgetting", "clean=NAME"),
        ("ccc", "one domain of clean images; got 2, d0 and others"),
        ("continual", "none of them"),
    ],
)
def test_what_ones_own_datasets_lack_is_named(protocol, message):
    with pytest.raises(ValueError, match=message):
        make([[0, 1], [1]], protocol=protocol, **({"order": 1} if protocol == "continual" else {}))


def test_no_order_is_found_for_ever():
    with pytest.raises(ValueError, match="in 1000 attempts: raise delta"):
        make([[0] * 10 + [1] * 2], protocol="correlated", delta=1e-3, min_size=6)


def test_lines_are_sentences_of_one_line():
    for name, protocol in PROTOCOLS.items():
        assert protocol.line.endswith("."), name
        assert 20 < len(protocol.line) < 121, name


def test_command_line_knows_protocols_and_their_parameters(tmp_path, capsys):
    assert main(["list", "protocols"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines() if line[0] != " "] == list(PROTOCOLS)
    words = ["samples=20", "batch_size=10", "corruptions=[fog,contrast]", "protocol=recurring", "rounds=2"]
    assert main(["run", *words, "source", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("result.json")
    assert list(json.loads(file.read_text())["errors"]) == ["fog", "contrast", "fog@2", "contrast@2"]
    assert main(["plot", "schedule", *words, "stream.rounds=3", "-o", str(tmp_path / "a" / "b.png")]) == 0
    assert (tmp_path / "a" / "b.png").exists()
    capsys.readouterr()
    assert main(["run", *words, "round=1", "source"]) == 2
    assert "Did you mean 'rounds'" in capsys.readouterr().err
    assert main(["plot", "schedule", "protocol=often"]) == 2
    assert "No protocol 'often'" in capsys.readouterr().err


def test_the_default_schedule_of_a_stream_is_continual():
    domains = make([[0] * 5, [1] * 3]).domains
    assert arrivals(Stream("x", domains, batch_size=2)) == arrivals(make([[0] * 5, [1] * 3], batch_size=2))
