"""Pictures kept of a run of maps or boxes, and the figure of them: `tta plot maps`."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import tta
from tta.cli import main
from tta.distributed import Workers
from tta.report import figures, pictures
from tta.report.page import html_page
from tta.results import Result
from tta.results.keeper import FrameKeeper, spread
from tta.tasks import CLASSIFICATION, SEGMENTATION, mean_iou

to_rgb = pytest.importorskip("matplotlib.colors", reason="the extra plot is not installed").to_rgb
SETTINGS = {"corruptions": ["fog", "contrast"], "samples": 6, "batch_size": 4}


def run(method, **options):
    settings = {**SETTINGS, **options.pop("stream", {})}
    stream = tta.stream("digits-mosaic", **settings)
    return tta.evaluate(tta.adapt(tta.load_model("digits-maps"), method), stream, progress=False, **options)


@pytest.fixture(scope="module")
def results():
    return [run("norm"), run("source")]


def test_the_last_picture_of_each_domain_is_kept_as_it_was_seen(results):
    stream = tta.stream("digits-mosaic", **SETTINGS)
    adapter = tta.adapt(tta.load_model("digits-maps"), "norm")
    batches = [(batch, adapter(batch.images)) for batch in stream]
    assert [frame.position for frame in results[0].frames] == [5, 11]
    assert [frame.domain for frame in results[0].frames] == [0, 1]
    for frame, (batch, logits) in zip(results[0].frames, (batches[1], batches[3]), strict=True):
        np.testing.assert_array_equal(frame.image, (batch.images[1] * 255).round().byte().permute(1, 2, 0))
        np.testing.assert_array_equal(frame.truth, batch.labels[1])
        np.testing.assert_array_equal(frame.predicted, logits[1].argmax(0))
        assert frame.scale == 1


def test_places_are_of_ones_choice():
    assert [frame.position for frame in run("source", frames=[7, 2]).frames] == [2, 7]
    assert run("source", frames=[]).frames == ()
    with pytest.raises(ValueError, match="frames are places in the stream, from 0 to 11; got 12"):
        run("source", frames=[3, 12])


def test_many_domains_leave_eight_pictures_at_equal_distances():
    order = torch.stack([torch.arange(15).repeat_interleave(3), torch.arange(3).repeat(15)], 1)
    assert spread(order) == [2, 8, 14, 20, 26, 32, 38, 44]
    assert spread(order[:6]) == [2, 5]
    mixed = order[torch.randperm(45, generator=torch.Generator().manual_seed(0))]
    assert len(spread(mixed)) == 8
    assert 44 in spread(mixed)


def test_large_pictures_are_reduced_and_masks_keep_their_classes():
    keeper = FrameKeeper([3])
    images = torch.rand(2, 3, 500, 960)
    labels = torch.full((2, 500, 960), 4)
    labels[:, :, 480:] = -1
    logits = torch.zeros(2, 6, 500, 960)
    logits[:, 5, :250] = 1
    keeper.add(2, images, labels, torch.tensor([7, 7]), logits, SEGMENTATION)
    keeper.add(4, images, labels, torch.tensor([7, 7]), logits, SEGMENTATION)
    (frame,) = keeper.frames()
    assert (frame.position, frame.domain, frame.scale) == (3, 7, 0.4)
    assert frame.image.shape == (200, 384, 3)
    assert abs(frame.image.mean() / 255 - images[1].mean()) < 0.01
    assert (frame.truth[:, :192] == 4).all()
    assert (frame.truth[:, 192:] == -1).all()
    assert (frame.predicted[:100] == 5).all()
    assert (frame.predicted[100:] == 0).all()


def test_of_classes_no_picture_is_kept():
    keeper = FrameKeeper([0])
    keeper.add(0, torch.rand(1, 3, 4, 4), torch.zeros(1).long(), torch.zeros(1), torch.zeros(1, 2), CLASSIFICATION)
    assert keeper.frames() == ()


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 5), (3, 8), (4, 3)])
def test_workers_know_where_their_part_begins(size, count):
    workers = [Workers() for _ in range(size)]
    for rank, worker in enumerate(workers):
        worker.size, worker.rank = size, rank
        part = worker.part_of(torch.arange(count))
        assert worker.first_of(count) == (int(part[0]) if len(part) else count)


def test_pictures_are_saved_beside_the_result(results, tmp_path):
    results[0].save(tmp_path)
    again = Result.load(tmp_path)
    assert again == results[0]
    for mine, theirs in zip(again.frames, results[0].frames, strict=True):
        for field in dataclasses.fields(mine):
            np.testing.assert_array_equal(getattr(mine, field.name), getattr(theirs, field.name))
    file = tmp_path / "frames.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"frames.npz: not the frames of a result .* Without this file"):
        Result.load(tmp_path)
    dataclasses.replace(results[0], frames=()).save(tmp_path)
    assert not file.exists()
    assert Result.load(tmp_path).frames == ()


# ---------------------------------------------------------------------- the figure


def cells(figure, columns):
    """The axes of a figure, row by row."""
    axes = [one for one in figure.axes if one.images]
    return [axes[start : start + columns] for start in range(0, len(axes), columns)]


def test_each_row_is_image_truth_source_and_method(results):
    figure = figures.maps(results)
    rows = cells(figure, 4)
    assert [one.get_title() for one in rows[0]] == ["image", "truth", "source", "norm"]
    assert [row[0].get_ylabel() for row in rows] == ["fog\nframe 5", "contrast\nframe 11"]
    norm, source = results
    for number, row in enumerate(rows):
        position = norm.frames[number].position
        np.testing.assert_array_equal(row[0].images[0].get_array(), norm.frames[number].image)
        for axes, result in zip(row[2:], (source, norm), strict=True):
            painted = axes.images[0].get_array()
            predicted = result.frames[number].predicted
            of_digit = predicted == np.bincount(predicted[predicted != 10]).argmax()
            assert {tuple(colour) for colour in painted[of_digit]} == {
                to_rgb(pictures.COLOURS[predicted[of_digit].flat[0]])
            }
            assert {tuple(colour) for colour in painted[predicted == 10]} <= {to_rgb(pictures.BACKGROUND_COLOUR)}
            value = mean_iou(result.predictions.confusion[position])
            assert axes.get_xlabel() == f"mIoU {value:.1f}"
        truth = row[1].images[0].get_array()
        assert (truth[norm.frames[number].truth == -1] == 1).all()
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[-2:] == ["background", "void"]
    present = {number for result in results for frame in result.frames for number in np.unique(frame.predicted)}
    present |= {number for frame in norm.frames for number in np.unique(frame.truth)} - {-1}
    assert shown[:-2] == [str(number) for number in sorted(present - {10})]


def test_chosen_pictures_alone_are_shown(results):
    assert len(cells(figures.maps(results, frames=[11]), 4)) == 1
    with pytest.raises(ValueError, match=r"Frame 3 was not kept by every result; there are 5, 11.*frames=\[3\]"):
        figures.maps(results, frames=[3])
    with pytest.raises(ValueError, match=r"a list of places in the stream, such as \[0,50\]; got 3"):
        figures.maps(results, frames=3)


def test_results_without_common_pictures_are_refused(results):
    with pytest.raises(ValueError, match="no pictures in common"):
        figures.maps([dataclasses.replace(results[0], frames=())])
    milder = run("source", stream={"severity": 1})
    with pytest.raises(ValueError, match="different pictures: name results of one stream, severity and seed"):
        figures.maps([results[0], milder])


def test_every_class_has_a_colour_of_its_own():
    colours = [tuple(np.round(to_rgb(pictures._colour(number, ())), 3)) for number in range(-1, 60)]
    assert len(set(colours)) == len(colours)


class Boxes(nn.Module):
    """Gives two boxes an image, one of them unsure."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        found = {
            "boxes": torch.tensor([[100.0, 50, 300, 250], [0.0, 0, 50, 50]]),
            "labels": torch.tensor([2, 1]),
            "scores": torch.tensor([0.9, 0.4]) + 0 * self.norm(images).mean(),
        }
        return [found for _ in images]


class Pictures(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, position):
        image = torch.full((3, 384, 768), position / 2)
        return image, {"boxes": torch.tensor([[90.0, 40, 310, 260]]), "labels": torch.tensor([2])}


def test_boxes_are_drawn_at_their_places():
    pytest.importorskip("faster_coco_eval", reason="the extra detection is not installed")
    stream = tta.stream({"rain": Pictures()}, task="detection", batch_size=2)
    result = tta.evaluate(tta.adapt(Boxes(), "source", task="detection"), stream, progress=False)
    ((_, truth, source),) = cells(figures.maps([result]), 3)
    (box,) = truth.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (44.5, 19.5, 110, 110)  # half the size
    (box,) = source.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (49.5, 24.5, 100, 100)
    assert box.get_edgecolor()[:3] == to_rgb(pictures.COLOURS[2])
    assert len(cells(figures.maps([result], score=0.3), 3)[0][2].patches) == 2


# ---------------------------------------------------------------------- command line and page


def test_the_command_draws_it(results, tmp_path, capsys):
    home = tmp_path / "lr=0.1"  # a folder with an equals sign is no setting
    for result in results:
        result.save(home / result.method)
    out = tmp_path / "maps.svg"
    assert main(["plot", "maps", str(home), "frames=[11]", "-o", str(out)]) == 0
    assert out.read_text().count("<image") == 4
    assert main(["plot", "maps", str(home), "frame=[11]", "-o", str(out)]) == 2
    assert "Figure 'maps' has no setting 'frame'. Did you mean 'frames'" in capsys.readouterr().err.replace("\n", " ")
    assert main(["plot", "heatmap", str(home), "frames=[1]", "-o", str(out)]) == 2
    assert "It has none" in capsys.readouterr().err


def test_the_page_shows_them(results):
    page = html_page(tta.compare(results), results)
    assert page.index("Pictures") < page.index("Error over the stream")
    assert page.count("<image") >= 8
    without = [dataclasses.replace(result, frames=()) for result in results]
    assert "Pictures" not in html_page(tta.compare(without), without)


def test_a_run_keeps_the_pictures_that_it_is_told(tmp_path):
    words = ["digits-mosaic", "source", "samples=4", "corruptions=[fog]", "frames=[1,2]", "--out", str(tmp_path)]
    assert main(["run", *words]) == 0
    (result,) = (Result.load(file) for file in tmp_path.rglob("result.json"))
    assert [frame.position for frame in result.frames] == [1, 2]
    assert main(["run", *words[:4], "frames=[9]", "--out", str(tmp_path / "other")]) == 2


def test_a_stream_of_ones_own_has_numbers_for_names(results):
    data = TensorDataset(torch.rand(2, 3, 8, 8), torch.randint(11, (2, 8, 8)))
    stream = tta.stream({"rain": data}, task="segmentation", batch_size=2)
    result = tta.evaluate(tta.adapt(tta.load_model("digits-maps"), "norm"), stream, progress=False)
    labels = [text.get_text() for text in figures.maps([result]).legends[0].get_texts()]
    assert labels
    assert all(label.startswith("class ") for label in labels)
