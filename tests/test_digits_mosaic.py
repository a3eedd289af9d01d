"""The embedded stream of maps: canvases of digits with a class for every pixel, and the model that comes with it."""

import pytest
import torch
from torch.nn import functional as F

import tta
from tta.cli.commands import main
from tta.datasets import catalog, digits_mosaic
from tta.datasets.corruptions import corrupt, corrupt_masks
from tta.results import find_results
from tta.tasks import SEGMENTATION, confusion, mean_iou

CLASSES = digits_mosaic.CLASSES


def test_canvases_are_drawn_again_alike_and_one_by_one():
    images, masks, _ = digits_mosaic.mosaics("test", 12)
    again = digits_mosaic.mosaics.__wrapped__("test", 5)
    assert torch.equal(again.images, images[:5])
    assert torch.equal(again.masks, masks[:5])
    other = digits_mosaic.mosaics("test", 12, seed=1)
    assert not torch.equal(other.images, images)


def test_a_canvas_holds_three_to_six_digits_with_a_rim_that_is_void():
    images, masks, _ = digits_mosaic.mosaics("train", 60)
    assert images.shape == (60, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {-1, *range(CLASSES)}
    is_digit = (masks >= 0) & (masks != digits_mosaic.BACKGROUND)
    near = F.max_pool2d(is_digit[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    assert torch.equal(masks == -1, near & ~is_digit)
    cells = F.max_pool2d(is_digit[:, None, :63, :63].float(), 21)[:, 0]  # each digit lies within a cell of its own
    count = cells.sum((1, 2))
    assert set(count.tolist()) == {3.0, 4.0, 5.0, 6.0}
    assert is_digit[:, 63].sum() == is_digit[:, :, 63].sum() == 0
    per_cell = masks[:, :63, :63].unfold(1, 21, 21).unfold(2, 21, 21).flatten(3)
    highest = per_cell.masked_fill(per_cell == 10, -1).amax(3)
    lowest = per_cell.masked_fill((per_cell == 10) | (per_cell < 0), 99).amin(3)
    assert torch.equal(highest[highest >= 0], lowest[highest >= 0])  # one digit a cell


def test_ink_is_bright_where_the_mask_has_a_digit():
    images, masks, _ = digits_mosaic.mosaics("test", 50)
    grey = images.float().mean(1)
    is_digit = (masks >= 0) & (masks != digits_mosaic.BACKGROUND)
    assert grey[is_digit].mean() > 2.5 * grey[masks == digits_mosaic.BACKGROUND].mean()


def test_stream_corrupts_the_pictures_and_moves_masks_with_moved_pixels():
    stream = tta.stream("digits-mosaic", batch_size=16, corruptions=["fog", "elastic_transform"], samples=20)
    assert stream.task == "segmentation"
    assert stream.classes.count == CLASSES
    assert len(stream) == 4
    images, masks, _ = digits_mosaic.mosaics("test", 20)
    assert torch.equal(stream[0].labels, masks[:16])
    assert torch.equal(stream[0].images, corrupt(images, "fog", severity=5, seed=0)[:16])
    moved = corrupt_masks(masks, "elastic_transform", severity=5, seed=0)
    assert torch.equal(stream[2].labels, moved[:16])
    assert not torch.equal(moved, masks)
    milder = stream.domains[1].at(2)
    assert torch.equal(milder.masks(torch.arange(20)), corrupt_masks(masks, "elastic_transform", severity=2, seed=0))
    assert torch.equal(stream.clean()[0].labels, masks[:16])
    assert torch.equal(stream.clean()[0].images, images[:16])


def test_manifest_hashes_the_masks():
    domain = tta.stream("digits-mosaic", corruptions=["fog"], samples=4).domains[0]
    before = domain.describe()
    domain._canvases.masks[0, 0, 0] = 3
    try:
        assert domain.describe() != before
        assert domain.clean().describe()["masks"] == domain.describe()["masks"] != before["masks"]
    finally:
        domain._canvases.masks[0, 0, 0] = digits_mosaic.BACKGROUND


@pytest.mark.parametrize("samples", [0, 161])
def test_samples_out_of_range_are_refused(samples):
    with pytest.raises(ValueError, match=f"between 1 and 160; got {samples}"):
        tta.stream("digits-mosaic", samples=samples)


def test_source_images_come_with_masks(monkeypatch):
    monkeypatch.setattr(digits_mosaic, "SOURCE_CANVASES", 20)  # of 2000
    images, masks = catalog.source_images("digits-mosaic").tensors
    assert torch.equal(images, digits_mosaic.mosaics("train", 20).images)
    assert masks.shape == (20, 64, 64)


def test_embedded_model_knows_the_clean_canvases():
    model = tta.load_model("digits-maps")
    assert model.class_names == [*"0123456789", "background"]
    assert model.preprocessing["input_size"] == [64, 64]
    assert sum(parameter.numel() for parameter in model.parameters()) < 30_000
    images, masks, _ = digits_mosaic.mosaics("test", 32)
    with torch.no_grad():
        maps = SEGMENTATION.read(model(images / 255), images)
    assert mean_iou(confusion(maps.argmax(1), masks, CLASSES).sum(0).numpy()) > 80


def test_batch_statistics_mend_what_contrast_breaks():
    def score(method):
        stream = tta.stream("digits-mosaic", batch_size=16, corruptions=["contrast"], samples=16)
        return tta.evaluate(tta.adapt(tta.load_model("digits-maps"), method), stream, progress=False).score

    source, norm = score("source"), score("norm")
    assert source.name == "mIoU"
    assert norm.value > source.value + 15
    assert score("norm") == norm  # bit for bit


def test_the_command_line_runs_it_with_nothing_said(tmp_path, capsys):
    words = ["run", "digits-mosaic", "source", "norm", "tent", "samples=16", "corruptions=[fog]"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "mIoU" in capsys.readouterr().out
    found = {result.method: result for result in find_results(tmp_path)}
    assert list(found) == ["norm", "source", "tent"]
    assert all(result.manifest["model"]["spec"] == "digits-maps" for result in found.values())
