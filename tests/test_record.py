"""The record of a run: columns in few blocks, whatever the number of batches."""

import gc

import numpy as np
import torch
from torch import Tensor, nn

import tta
from tta.results.cost import Passes
from tta.results.record import BLOCK, Record
from tta.tasks import DETECTION, SEGMENTATION


def tensors():
    """Number of live tensors."""
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def add_maps(record, number):
    logits = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(number))
    labels = torch.randint(3, (2, 256, 256), generator=torch.Generator().manual_seed(number))
    index = torch.tensor([2 * number, 2 * number + 1])
    record.add(logits, labels, torch.zeros(2).long(), index, task=SEGMENTATION)


def test_a_batch_of_maps_leaves_no_tensor_of_its_own():
    """A small allocation in the room of the freed logits: 2 000 frames of 240 x 180 took 3.5 GB."""
    record = Record()
    counts = []
    for number in range(60):
        add_maps(record, number)
        if number in (29, 59):
            record.score()  # reduces what waits
            counts.append(tensors())
    assert counts[1] == counts[0]


def test_a_backward_pass_leaves_no_tensor_of_its_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    adapter = tta.adapt(model, "tent", task="segmentation")
    passes, counts = Passes(), []
    passes.attach(adapter)
    for number in range(12):
        adapter(torch.rand(2, 3, 8, 8))
        if number in (5, 11):
            counts.append(tensors())
    assert counts[1] == counts[0]
    assert passes.backwards == 24


def test_columns_are_those_of_each_batch_in_order():
    record, parts = Record(), []
    for number in range(6):
        add_maps(record, number)
    whole = record.predictions()
    for number in range(6):
        alone = Record()
        add_maps(alone, number)
        parts.append(alone.predictions())
    for name in ("index", "confusion", "confidence", "entropy"):
        np.testing.assert_array_equal(
            whole.column(name), np.concatenate([part.column(name) for part in parts]), err_msg=name
        )
    first = record.score()
    assert record.score() == first
    add_maps(record, 6)
    assert len(record.predictions()) == 14
    assert len(whole) == 12  # a copy: it does not change


def test_boxes_of_growing_number_are_filled_up_with_nan():
    record, sizes = Record(), [(1, 2), (3, 0), (BLOCK, 4), (2, 1)]
    for images, found in sizes:
        one = {"boxes": torch.full((found, 4), float(found)), "labels": torch.ones(found), "scores": torch.ones(found)}
        labels = torch.full((images, 1, 6), 7.0)
        record.add([one] * images, labels, torch.zeros(images).long(), torch.arange(images), task=DETECTION)
    found = record.predictions().column("found")
    assert found.shape == (BLOCK + 6, 4, 6)
    count = (~np.isnan(found[:, :, 0])).sum(1)
    assert count.tolist() == [size for images, size in sizes for _ in range(images)]
    assert (found[-1, 0, :4] == 1).all()


def test_scores_of_outliers_are_kept_if_every_batch_has_some():
    def record_of(*scored):
        record = Record()
        for has in scored:
            score = torch.tensor([0.25, 0.5]) if has else None
            record.add(torch.rand(2, 3), torch.tensor([0, 1]), torch.zeros(2).long(), torch.arange(2), score)
            record.wrong_and_known()  # reduces what waits
        return record.predictions().outlier_score

    assert record_of(True, True).tolist() == [0.25, 0.5, 0.25, 0.5]
    assert record_of(True, False) is None
    assert record_of(False, True) is None
