"""Streams: order, batches and labels, known before an image is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import tta
from tta.datasets.stream import _only


class Unreadable(Dataset):
    """Fails as soon as an image is asked for."""

    targets = (0, 1, 1, 0, 1)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        raise AssertionError("an image was read")


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 3)


def test_schedule_is_printable_before_an_image_is_read():
    stream = tta.stream({"night": Unreadable(), "rain": Unreadable()}, batch_size=2)
    assert len(stream) == 6
    assert [(plan.domains, plan.samples) for plan in stream.schedule()] == [
        *[(("night",), 2), (("night",), 2), (("night",), 1)],
        *[(("rain",), 2), (("rain",), 2), (("rain",), 1)],
    ]
    assert "rain                 batches 3-5" in str(stream)
    assert stream.domains[0].labels.tolist() == [0, 1, 1, 0, 1]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), batch_size=st.integers(1, 7))
def test_every_sample_once_in_order(sizes, batch_size):
    datasets = {f"d{i}": images(n, seed=i) for i, n in enumerate(sizes)}
    stream = tta.stream(datasets, batch_size=batch_size)
    batches = list(stream)
    assert len(batches) == len(stream) == sum(-(-n // batch_size) for n in sizes)
    seen = torch.cat([torch.stack([b.domain, b.index], 1) for b in batches])
    assert seen.tolist() == [[d, i] for d, n in enumerate(sizes) for i in range(n)]
    for batch in batches:
        data = datasets[stream.domains[int(batch.domain[0])].name]
        assert torch.equal(batch.images, data.tensors[0][batch.index])
        assert torch.equal(batch.labels, data.tensors[1][batch.index])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_batches_of_the_stream(num_workers):
    stream = tta.stream({"a": images(10), "b": images(7)}, batch_size=4)
    for mine, loaded in zip(stream, stream.loader(num_workers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, loaded, strict=True))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_of_one_domain_are_told_from_mixed_ones(domains, batch_size):
    parts = [torch.tensor(domains[start : start + batch_size]) for start in range(0, len(domains), batch_size)]
    found = _only(torch.tensor(domains), [len(part) for part in parts])
    assert found == [int(part[0]) if len(part.unique()) == 1 else -1 for part in parts]


def test_pil_images_become_floats_in_the_unit_interval():
    class Pictures(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.new("RGB", (8, 8), (255, 0, 51)), index

    (batch,) = tta.stream({"a": Pictures()})
    assert batch.images.dtype == torch.float32
    assert batch.images[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert batch.labels.tolist() == [0, 1, 2]


def test_digits_c_is_a_function_of_its_description_and_seed():
    def first(seed):
        return next(iter(tta.stream("digits-c", severity=3, batch_size=32, seed=seed, corruptions=["shot_noise"])))

    assert all(torch.equal(a, b) for a, b in zip(first(0), first(0), strict=True))
    assert not torch.equal(first(0).images, first(1).images)
    assert torch.equal(first(0).labels, first(1).labels)


def test_digits_c_shows_the_same_images_in_each_domain():
    stream = tta.stream("digits-c", batch_size=50, samples=100)
    assert len(stream.domains) == 15
    assert len(stream) == 30
    assert all(torch.equal(domain.index, stream.domains[0].index) for domain in stream.domains)


def test_manifest_hash_sees_one_changed_pixel():
    data = images(6)
    before = tta.stream({"a": data}).describe()
    data.tensors[0][3, 0, 0, 0] += 0.25
    after = tta.stream({"a": data}).describe()
    assert before["domains"]["a"]["content"] != after["domains"]["a"]["content"]
    assert before["order"] == after["order"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tta.stream("digit-c"), "No stream 'digit-c'. Did you mean 'digits-c'"),
        (lambda: tta.stream("digits-c", protocol="continuous"), "No protocol 'continuous'. Did you mean 'continual'"),
        (lambda: tta.stream("digits-c", severty=3), "'severty'. Did you mean 'severity'"),
        (lambda: tta.stream("digits-c", severity=6), r"severity is 0 \(none\) to 5, in steps of 0.25; got 6"),
        (lambda: tta.stream("digits-c", corruptions=["fogg"]), "No corruption 'fogg'"),
        (lambda: tta.stream("digits-c", samples=0), "samples is between 1 and 800; got 0"),
        (lambda: tta.stream("digits-c", batch_size=0), "batch_size is 1 or more; got 0"),
        (lambda: tta.stream({"a": images(2)}, severity=3), "no setting 'severity'"),
        (lambda: tta.stream({}), "at least one domain"),
        (lambda: tta.stream({"a": [1, 2]})[0], "sample 0: expected \\(image, label\\); got int"),
        (lambda: tta.stream({"a": 5}), "expected a dataset with __len__ and __getitem__"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_tensor_dataset_is_read_batch_by_batch_and_runs_of_it_are_not_copied() -> None:
    images, labels = torch.rand(10, 3, 4, 4), torch.arange(10) % 3
    stream = tta.stream({"night": TensorDataset(images, labels)}, batch_size=4)
    batches = list(stream)
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)
    assert batches[1].images.data_ptr() == images[4:].data_ptr()
    shuffled = stream.domains[0].images(torch.tensor([7, 2, 3]))
    assert torch.equal(shuffled, images[[7, 2, 3]])
