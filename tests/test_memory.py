"""Averaged copies; the balanced memory against the published rule, applied to one sample at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tta
from tta import ema
from tta.memory import BalancedMemory, PredictionBalancedReservoir, ReplayMemory, ReviewQueue


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_content_is_that_of_the_rule_applied_one_by_one(plain_memory, data):
    """For any capacity, classes, weights, order, ties, and cut into batches."""
    capacity = data.draw(st.integers(1, 12), "capacity")
    classes = data.draw(st.integers(2, 15), "classes")
    weights = data.draw(st.sampled_from([(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.3, 2.0)]), "weights")
    doubts = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # few, so that scores tie
    offered = data.draw(st.lists(st.tuples(st.integers(0, classes - 1), doubts), min_size=1, max_size=60), "offered")
    bank, plain = BalancedMemory(capacity, *weights), plain_memory(capacity, classes, *weights)
    start = 0
    while start < len(offered):
        part = offered[start : start + data.draw(st.integers(1, 20), "batch")]
        numbers = torch.arange(start, start + len(part)).float()
        bank.add(numbers[:, None], *(torch.tensor(column) for column in zip(*part, strict=True)), classes)
        for number, (label, doubt) in zip(numbers.tolist(), part, strict=True):
            plain.add(number, label, doubt)
        start += len(part)
        samples, ages = bank.contents()
        assert (samples[:, 0].tolist(), ages.tolist()) == plain.contents()
        assert len(bank) == len(ages) <= capacity
    assert bank.offered == len(offered)


def test_a_class_may_pass_its_share_by_a_fraction():
    """64 slots and 10 classes: 6 samples are below the share of 6.4, so that a seventh is taken; an eighth is not."""
    bank = BalancedMemory(64, 1.0, 1.0)
    bank.add(torch.zeros(20, 1), torch.zeros(20).long(), torch.zeros(20), classes=10)
    assert len(bank) == 7


def test_more_classes_than_slots_keep_one_sample_each():
    bank = BalancedMemory(8, 1.0, 1.0)
    bank.add(torch.zeros(40, 1), torch.arange(40) % 20, torch.zeros(40), classes=100)
    assert len(set(bank.labels.tolist())) == len(bank) == 8


def test_books_stay_on_the_cpu_and_in_their_types():
    bank = BalancedMemory(4, 1.0, 1.0)
    bank.add(torch.ones(2, 3), torch.tensor([0, 1]), torch.rand(2), classes=5)
    bank.double().to("meta")
    assert bank.samples.device.type == "meta"
    assert bank.samples.dtype == torch.float64
    assert {bank.labels.device.type, bank.uncertainties.device.type, bank.ages.device.type} == {"cpu"}
    assert bank.uncertainties.dtype == torch.float32


def test_samples_are_copies():
    bank, batch = BalancedMemory(4, 1.0, 1.0), torch.ones(2, 3)
    bank.add(batch, torch.tensor([0, 1]), torch.zeros(2), classes=5)
    batch.zero_()
    assert bank.contents()[0].eq(1).all()


def test_state_from_before_the_first_batch_loads_into_a_used_adapter(cnn, golden_images):
    """And one of another image size: the shape of the bank is that of the state."""
    early, adapter = (tta.adapt(cnn, "rotta", update_frequency=8) for _ in range(2))
    state = early.state_dict()
    assert "memory.samples" not in state
    adapter(golden_images[:16])
    adapter.load_state_dict(state)
    assert adapter.memory.samples is None
    assert torch.equal(adapter(golden_images[:16]), early(golden_images[:16]))

    small = tta.adapt(cnn, "rotta", update_frequency=8)
    small(golden_images[:16, :, ::2, ::2])
    adapter.load_state_dict(small.state_dict())
    assert torch.equal(adapter(golden_images[16:32, :, ::2, ::2]), small(golden_images[16:32, :, ::2, ::2]))


def test_teacher_follows_what_the_student_learns():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    student[0].bias.requires_grad_(False)
    teacher = ema.frozen_copy(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    start = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(float(p.requires_grad))
    student[1].running_mean.add_(1.0)
    ema.follow(teacher, student, 0.25, when=torch.tensor(False))
    assert all(torch.equal(start[key], value) for key, value in teacher.state_dict().items())
    ema.follow(teacher, student, 0.25, when=torch.tensor(True))
    moved = {key: value - start[key] for key, value in teacher.state_dict().items()}
    for key in ("0.weight", "1.weight", "1.bias"):
        torch.testing.assert_close(moved[key], torch.full_like(moved[key], 0.25))
    for key in ("0.bias", "1.running_mean"):
        assert not moved[key].any()
    assert teacher[0].weight is not student[0].weight
    assert teacher[0].bias is student[0].bias  # neither learns it: one set


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_the_student_is_exact_at_its_ends(share):
    student = nn.Linear(50, 50)
    teacher = ema.frozen_copy(nn.Linear(50, 50))
    expected = (student if share else copy.deepcopy(teacher)).weight.detach().clone()
    ema.follow(teacher, student, share, when=torch.tensor(True))
    assert torch.equal(teacher.weight, expected)


@pytest.fixture(params=["balanced", "reservoir", "replay", "queue"])
def offer(request):
    """``offer(samples)`` offers them to a new memory of four places, for classes 0, 1, 2, 0 ...; the memory is its ``bank``."""
    banks = {
        "balanced": BalancedMemory(4, 1.0, 1.0),
        "reservoir": PredictionBalancedReservoir(4),
        "replay": ReplayMemory(4),
        "queue": ReviewQueue(4, 0.1),
    }
    bank = banks[request.param]

    def give(samples):
        labels = torch.arange(len(samples)) % 3
        arguments = {
            "balanced": (labels, torch.rand(len(samples)), 3),
            "reservoir": (labels, 3, lambda below: 0),
            "replay": (labels, 3, lambda classes: classes[0]),
            "queue": (3,),
        }
        bank.add(samples, *arguments[request.param])

    give.bank = bank
    return give


def books(bank):
    return {key: value.clone() for key, value in bank.state_dict().items()}


def test_samples_of_another_size_are_refused_and_change_nothing(offer):
    offer(torch.rand(3, 3, 4, 4))
    before = books(offer.bank)
    with pytest.raises(ValueError, match=r"holds images of shape \(3, 4, 4\); got images of shape \(3, 8, 8\)"):
        offer(torch.rand(3, 3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in books(offer.bank).items())
    offer(torch.rand(3, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_samples_of_another_type_are_held_in_that_of_the_first(offer, dtype):
    for first, then in ((torch.float32, dtype), (dtype, torch.float32)):
        offer(torch.rand(3, 2, dtype=first))
        offer(torch.rand(3, 2, dtype=then))
    held = offer.bank.images if isinstance(offer.bank, ReviewQueue) else offer.bank.samples
    assert held.dtype == torch.float32
    assert held.any(1).all()


def test_samples_are_held_without_their_history(offer):
    offer(torch.rand(3, 2, requires_grad=True) * 2)
    assert not any(value.requires_grad for value in offer.bank.state_dict(keep_vars=True).values())


# Settings with which every batch is learned from, and changes the memory.
REMEMBERING = {
    "note": {"update_frequency": 4},
    "rotta": {"update_frequency": 4},
    "stamp": {"alpha": 5.0, "views": 1},
    "ttac": {"queue_size": 16, "lr": 1e-4},
}


@pytest.mark.parametrize("method", REMEMBERING)
def test_a_batch_of_another_size_changes_nothing_and_good_ones_go_on(method, cnn, golden_images, golden_source):
    settings = {"source": golden_source[:32], **REMEMBERING[method]}
    adapter, undisturbed = (tta.adapt(cnn, method, **settings) for _ in range(2))
    adapter(golden_images[:8])
    undisturbed(golden_images[:8])
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="memory holds images of shape"):
        adapter(torch.rand(8, 3, 64, 64))
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())
    assert torch.equal(adapter(golden_images[8:16]), undisturbed(golden_images[8:16]))


@pytest.mark.parametrize("method", REMEMBERING)
def test_the_memory_has_no_part_in_a_graph_of_the_users(method, cnn, golden_images, golden_source):
    settings = {"source": golden_source[:32], **REMEMBERING[method]}
    adapter, plain = (tta.adapt(cnn, method, **settings) for _ in range(2))
    for x in golden_images[:24].split(8):
        assert torch.equal(adapter(x.clone().requires_grad_()), plain(x))


@pytest.mark.parametrize(
    ("method", "copies", "settings"), [("cotta", 3, {}), ("petal", 3, {}), ("rotta", 2, {}), ("petta", 2, {})]
)
def test_copies_of_the_model_share_what_stays(method, copies, settings):
    """Student, teacher and source where all weights learn; one set of convolutions and its source where only norms do."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.Conv2d(64, 64, 3),
        nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    adapter = tta.adapt(model, method, source=torch.rand(8, 3, 12, 12), **settings).double()
    held = [*adapter.model.parameters(), *adapter.teacher.parameters(), *filter(None.__ne__, adapter._source.values())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    whole = sum(8 * tensor.numel() for tensor in model.parameters())
    assert copies * whole <= sum(storages.values()) < 1.1 * copies * whole
