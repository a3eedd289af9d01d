"""Streams: order, batches and labels, known before an image is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import tta
from tta.datasets.domains import Classes, Corrupted, Generated, Visit, classes_in, original
from tta.datasets.stream import Stream, _only


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


class Plain:
    """A user's own domain with nothing but the required parts."""

    name, origin = "plain", "nowhere"
    labels = torch.tensor([0, 1, 2])
    index = torch.arange(3)

    def images(self, positions):
        return torch.full((len(positions), 3, 2, 2), 7, dtype=torch.uint8)

    def describe(self):
        return {"origin": self.origin}


class Full(Plain):
    """A user's own domain with every optional part."""

    name, severity, recipe, classes = "full", 2, "cifar", Classes(3)

    def stored(self, positions):
        return torch.zeros(len(positions), 3, 2, 2, dtype=torch.uint8)

    def finish(self, stored, index):
        return stored + 7

    def at(self, severity):
        return self

    def clean(self):
        return Plain()


@pytest.mark.parametrize("kind", [Plain, Full])
def test_a_domain_is_any_object_with_the_attributes_of_one(kind):
    domain = kind()
    stream = Stream("own", [domain, Visit(domain, 2)], batch_size=2)
    begun = list(stream.loader(unfinished=True))
    assert [batch.images.unique().tolist() for batch in begun] == [[0 if kind is Full else 7]] * 4
    for whole, batch in zip(stream.loader(), begun, strict=True):
        assert torch.equal(stream.finish(batch).images, whole.images)
    assert (stream.classes == Classes(3)) is (kind is Full)
    assert stream.describe()["domains"][f"{domain.name}@2"] == {"same_images_as": domain.name}
    if kind is Full:
        assert stream.clean().domains[0].name == "plain"
        assert stream.clean_images(2)[1].tolist() == [0, 1]
    else:
        assert stream.clean_images(2) is None
        with pytest.raises(ValueError, match="has no clean images"):
            stream.clean()


def test_a_renamed_domain_keeps_the_optional_parts_of_its_original():
    full, plain = Full(), Plain()
    twice = Visit(Visit(full, 2), 3)
    assert original(twice) is full
    assert isinstance(original(twice), Corrupted)
    assert isinstance(original(twice), Generated)
    assert (twice.name, twice.severity, classes_in(twice)) == ("full@2@3", 2, Classes(3))
    renamed = Visit(plain, 2)
    assert not isinstance(original(renamed), (Corrupted, Generated))
    assert (renamed.severity, classes_in(renamed)) == (None, None)
