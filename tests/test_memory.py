"""Averaged copies; the balanced memory against the published rule, applied to one sample at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tta
from tta import ema
from tta.memory import BalancedMemory


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
            p.add_(1.0)
    student[1].running_mean.add_(1.0)
    ema.follow(teacher, student, 0.25, when=torch.tensor(False))
    assert all(torch.equal(start[key], value) for key, value in teacher.state_dict().items())
    ema.follow(teacher, student, 0.25, when=torch.tensor(True))
    moved = {key: value - start[key] for key, value in teacher.state_dict().items()}
    for key in ("0.weight", "1.weight", "1.bias"):
        torch.testing.assert_close(moved[key], torch.full_like(moved[key], 0.25))
    for key in ("0.bias", "1.running_mean"):
        assert not moved[key].any()
    assert ema.frozen_copy(student)[0].weight.data_ptr() != student[0].weight.data_ptr()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_the_student_is_exact_at_its_ends(share):
    student = nn.Linear(50, 50)
    teacher = ema.frozen_copy(nn.Linear(50, 50))
    expected = (student if share else copy.deepcopy(teacher)).weight.detach().clone()
    ema.follow(teacher, student, share, when=torch.tensor(True))
    assert torch.equal(teacher.weight, expected)
