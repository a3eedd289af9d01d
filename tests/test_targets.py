"""Labels of a user's dataset are what its samples give, whatever wraps them, and are read without an image where they can be."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from torchvision.datasets import VisionDataset

import tta
from tta.datasets import targets

IMAGE = torch.zeros(3, 4, 4, dtype=torch.uint8)


class Torchvision(VisionDataset):
    """As torchvision's classes work; counts how often a sample is read."""

    def __init__(self, labels, **settings):
        super().__init__(".", **settings)
        self.targets, self.read = labels, 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.read += 1
        label = self.targets[index]
        if self.transforms is not None:
            return self.transforms(IMAGE, label)
        return IMAGE, label


class Own(Dataset):
    """A user's: what it gives, and an attribute of labels if there is one."""

    def __init__(self, given, **attributes):
        self.given = given
        vars(self).update(attributes)

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return IMAGE, self.given[index]


def labels(dataset):
    return tta.stream({"mine": dataset}).domains[0].labels.tolist()


def from_samples(dataset):
    return [int(dataset[position][1]) for position in range(len(dataset))]


def turned():
    return Torchvision([0, 1, 2, 3, 3], target_transform=lambda label: 10 - label)


@pytest.mark.parametrize(
    "make",
    [
        turned,
        lambda: Subset(turned(), [4, 0, 2]),
        lambda: Subset(turned(), np.array([1, 1])),
        lambda: ConcatDataset([turned(), Torchvision([7, 8])]),
        lambda: Subset(ConcatDataset([Subset(turned(), [1, 3]), turned()]), range(1, 6)),
        lambda: random_split(turned(), [2, 3], torch.Generator().manual_seed(0))[1],
        lambda: ConcatDataset([turned(), TensorDataset(torch.zeros(2, 3, 4, 4), torch.tensor([[5], [6]]))]),
        lambda: Torchvision(["cat", "dog", "cat"], target_transform=["cat", "dog"].index),
        lambda: Torchvision(torch.tensor([3, 1]), target_transform=lambda label: {1: 4, 3: 5}[int(label)]),
    ],
    ids=["plain", "subset", "array", "concat", "nested", "split", "tensors", "words", "tensor"],
)
def test_target_transform_is_applied_through_every_wrapper_without_a_sample(make, monkeypatch):
    expected = from_samples(make())
    monkeypatch.setattr(Torchvision, "__getitem__", lambda *_: pytest.fail("an image was read"))
    assert labels(make()) == expected


def test_labels_are_read_from_the_samples_where_only_they_know():
    joint = Torchvision([0, 1, 2], transforms=lambda image, label: (image, label + 5))
    assert labels(joint) == [5, 6, 7]
    assert labels(Subset(joint, [2])) == [7]
    assert labels(Own([3, 1])) == [3, 1]
    assert labels(ConcatDataset([turned(), Own([3, 1])])) == [10, 9, 8, 7, 7, 3, 1]
    assert labels(Own([3, 1], targets=[0, 0, 0])) == [3, 1]  # of another length: something else
    assert labels(Own([3, 1], labels=["b", "a"])) == [3, 1]
    assert labels(Own([3, 1], targets=torch.tensor([[3, 9], [1, 9]]))) == [3, 1]  # QMNIST has eight numbers an image


def test_an_attribute_that_the_samples_contradict_is_an_error():
    wrong = tta.stream({"mine": Own([0, 1, 5], targets=[0, 1, 2])})
    with pytest.raises(ValueError, match=r"Domain 'mine', sample 2: its label is 5, but .*'targets'.* says 2"):
        list(wrong)
    list(tta.stream({"mine": Own([[0, 1], [1, 0]], targets=[1, 0])}))  # samples of another form say nothing


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([[2], [0], [1]]),
        np.array([[2], [0], [1]], dtype=np.uint8),
        np.array([[[2]], [[0]], [[1]]]),
        [np.array([2]), np.array([0]), np.array([1])],
        [torch.tensor(2), torch.tensor([0]).squeeze(), 1],
        torch.tensor([2.0, 0.0, 1.0]),
    ],
)
def test_labels_of_one_number_each_are_squeezed(given):
    assert labels(Own(given)) == [2, 0, 1]
    assert labels(Own(given, labels=given)) == [2, 0, 1]
    (batch,) = tta.stream({"mine": Own(given, labels=given)})
    assert batch.labels.shape == (3,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.eye(2, dtype=torch.long), r"shape \(2, 2\), dtype int64\. They look one-hot: labels\.argmax\(1\)"),
        (np.array([[1, 1], [0, 1]]), r"shape \(2, 2\), dtype int64\. Of several labels an image choose one"),
        (torch.tensor([0.5, 1.0]), r"shape \(2,\), dtype float32\. Numbers between the classes"),
        (np.array([np.nan, 1.0]), r"shape \(2,\), dtype float64"),
        (["cat", "dog"], r"shape \(2,\), dtype str\. Give each class a number"),
        ([{"boxes": []}, {"boxes": []}], r"dtype dict\. Give each class a number"),
        ([None, 1], r"dtype NoneType"),
        ([[1], [2, 3]], r"got labels of different shapes\. Give each"),
        ([0, -2], r"or -1 for an unknown one; the lowest label is -2"),
    ],
)
def test_other_labels_are_refused_by_domain_shape_and_type(given, message):
    for dataset in (Own(given), Own(given, targets=given), Subset(Own(given, labels=given), [0, 1])):
        with pytest.raises(ValueError, match=r"^Domain 'mine': a label is the number of .*" + message):
            labels(dataset)
    if isinstance(given, torch.Tensor):
        with pytest.raises(ValueError, match=message):
            labels(TensorDataset(torch.zeros(len(given), 3, 4, 4), given))


def test_an_unknown_class_and_an_empty_dataset_stay():
    assert labels(Own([0, -1])) == [0, -1]
    assert targets.class_numbers([], "mine").tolist() == []
