"""The embedded stream of boxes: canvases of digits with a box around each, and the detector that comes with it."""

import pytest
import torch

import tta
from tta.cli.commands import main
from tta.datasets import catalog, digits_boxes, digits_mosaic
from tta.datasets.corruptions import corrupt
from tta.results import find_results


def test_boxes_enclose_the_ink_of_each_digit_and_nothing_more():
    images, masks, boxes = digits_mosaic.mosaics("test", 40)
    for mask, of_canvas in zip(masks, boxes, strict=True):
        found = of_canvas[~of_canvas[:, 0].isnan()].long()
        assert 3 <= len(found) <= 6
        rest = mask.clone()
        for left, top, right, bottom, digit in found.tolist():
            ink = mask[top:bottom, left:right] == digit
            assert ink.any(0)[[0, -1]].all()  # its four sides touch the digit
            assert ink.any(1)[[0, -1]].all()
            rest[top:bottom, left:right] = digits_mosaic.BACKGROUND
        assert not ((rest >= 0) & (rest != digits_mosaic.BACKGROUND)).any()
    assert len(images) == 40


def test_stream_corrupts_the_pictures_and_leaves_boxes_alone():
    stream = tta.stream("digits-boxes", batch_size=16, corruptions=["fog", "elastic_transform"], samples=20)
    images, _, boxes = digits_mosaic.mosaics("test", 20)
    assert stream.task == "detection"
    assert torch.equal(stream[0].images, corrupt(images, "fog", severity=5, seed=0)[:16])
    expected = torch.cat([boxes[..., :4], boxes[..., 4:] + 1, torch.zeros(20, 6, 1)], 2)
    expected[expected[..., 0].isnan()] = torch.nan
    for batch in (stream[0], stream[2], stream.clean()[0]):
        torch.testing.assert_close(batch.labels, expected[:16], equal_nan=True, rtol=0, atol=0)
    milder = stream.domains[0].at(2)
    assert torch.equal(milder.images(torch.arange(20)), corrupt(images, "fog", severity=2, seed=0))
    described = stream.domains[0].describe()
    assert described["boxes"] == milder.clean().describe()["boxes"]


def test_source_images_are_as_torchvisions_detectors_are_trained_on(monkeypatch):
    monkeypatch.setattr(digits_boxes, "SOURCE_CANVASES", 20)  # of 2000
    source = catalog.source_images("digits-boxes")
    image, truth = source[3]
    assert len(source) == 20
    assert image.shape == (3, 64, 64)
    assert truth["boxes"].shape == (len(truth["labels"]), 4)
    assert 1 <= truth["labels"].min() <= truth["labels"].max() <= 10


def test_embedded_detector_finds_the_digits_of_clean_canvases():
    model = tta.load_model("digits-ssd")
    assert model.class_names == ["background", *"0123456789"]
    assert sum(parameter.numel() for parameter in model.parameters()) < 30_000
    clean = tta.stream("digits-boxes", corruptions=["fog"], samples=32, batch_size=16).clean()
    result = tta.evaluate(tta.adapt(model, "source"), clean, progress=False)
    assert result.score.name == "mAP@50"
    assert result.score.value > 95  # 99.3 on all 160


@pytest.mark.parametrize("method", ["norm", "actmad"])
def test_the_command_line_runs_it_with_nothing_said(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits_boxes, "SOURCE_CANVASES", 64)
    words = ["run", "digits-boxes", "source", method, "samples=16", "corruptions=[brightness]"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "mAP@50" in capsys.readouterr().out
    found = {result.method: result.score.value for result in find_results(tmp_path)}
    if method == "norm":
        assert found["norm"] > found["source"] + 30  # batch statistics mend what brightness breaks
