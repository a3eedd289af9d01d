"""Streams of pictures with a class for every pixel, in the published layouts, and their scores."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

import tta
from tta.cli import main
from tta.datasets import driving
from tta.datasets.corruptions import corrupt, corrupt_masks
from tta.engine import AdaptCallback
from tta.results import Predictions, Result, compare_errors, maps
from tta.tasks import SEGMENTATION, class_iou, confusion, mean_iou


def picture(path, size=(24, 16), colour=(90, 120, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def mask(path, numbers, size=(24, 16), mode="L"):
    """Columns of one number each, as wide as fits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.repeat(np.array(numbers, dtype=np.uint8), size[0] // len(numbers))[None].repeat(size[1], 0)
    Image.fromarray(np.stack([array] * 3, 2) if mode == "RGB" else array).save(path)


def classes_of(stream):
    """The classes of the masks of a stream, column by column of the first row of its first image."""
    row = stream[0].labels[0, 0]
    return [int(row[0]), *(int(b) for a, b in itertools.pairwise(row) if a != b)]


def test_camvid(tmp_path):
    for name in ("b", "a"):
        picture(tmp_path / f"CamVid/test/{name}.png", colour=(ord(name), 0, 0))
        mask(tmp_path / f"CamVid/testannot/{name}.png", [0, 10, 11])
    stream = tta.stream("camvid", root=tmp_path, batch_size=2)
    assert stream.task == "segmentation"
    assert stream.classes.count == 11
    assert classes_of(stream) == [0, 10, -1]
    assert stream[0].images[:, 0, 0, 0].tolist() == [ord("a"), ord("b")]
    foggy = tta.stream("camvid", root=tmp_path, batch_size=2, corruptions=["fog", "contrast"], size=[8, 12])
    assert [domain.name for domain in foggy.domains] == ["fog", "contrast"]
    assert foggy[0].labels.shape == (2, 8, 12)
    clean = tta.stream("camvid", root=tmp_path, batch_size=2)[0]
    expected = corrupt(clean.images, "fog", severity=3, seed=0, recipe="imagenet")
    assert torch.equal(tta.stream("camvid", root=tmp_path, batch_size=2, corruptions=["fog"])[0].images, expected)


@pytest.mark.parametrize("decoder", ["trained", "none"])
def test_ttt_mae_trains_its_decoder_on_a_folder_of_frames(decoder, tmp_path, capsys):
    """A source stage of maps is refused (``tta train``); this is what takes its place."""
    for name in "abcd":
        picture(tmp_path / f"CamVid/train/{name}.png", size=(64, 48), colour=(50 * ord(name) % 256, 0, 90))
    for name in "xyz":
        picture(tmp_path / f"CamVid/test/{name}.png", size=(64, 48), colour=(2 * ord(name), 90, 0))
        mask(tmp_path / f"CamVid/testannot/{name}.png", [0, 10], size=(64, 48))
    words = ["run", "camvid", "source", "ttt_mae", "model=digits-maps", f"stream.root={tmp_path}", "batch_size=1"]
    words += ["copies=2", "source_steps=2", "source_samples=4", "lr=0.01", "encoder_lr=1", "clean=false"]
    source = [f"source={tmp_path / 'CamVid' / 'train'}"] if decoder == "trained" else []
    code = main([*words, *source, "--out", str(tmp_path / "out")])
    if decoder == "none":
        assert code == 2
        assert "source=" in capsys.readouterr().err
        return
    assert code == 0
    plain, adapted = (Result.load(next((tmp_path / "out").glob(f"*/{name}*"))) for name in ("source", "ttt_mae"))
    assert plain.rows[0].samples == adapted.rows[0].samples == 3 * 64 * 48
    assert adapted.rows[0].sums["confusion"] != plain.rows[0].sums["confusion"]  # it has learned


def drives(root, frames=5):
    """CamVid's layout: two drives, of which the second in order has a frame less."""
    for drive, count in (("0001TP_00", frames), ("Seq05VD_f0", frames - 1)):
        for frame in range(count):
            stripes = np.full((16, 24, 3), (40 * frame, 120, 40), dtype=np.uint8)
            stripes[:, ::3, 2] = 250
            file = root / f"test/{drive}{3 * frame:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stripes).save(file)
            mask(root / f"testannot/{drive}{3 * frame:02}.png", [frame, 10, 11])


def test_camvid_by_drives_is_reset_at_the_cut_and_frames_stay_in_order(tmp_path):
    drives(tmp_path)
    stream = tta.stream("camvid", root=tmp_path, batch_size=2, sequences=True, protocol="per-domain")
    assert [domain.name for domain in stream.domains] == ["0001TP", "Seq05VD"]
    assert [plan.domains for plan in stream.schedule()] == 3 * [("0001TP",)] + 2 * [("Seq05VD",)]  # none holds both
    assert stream.reset == "domain"
    first = torch.cat([batch.images[:, 0, 0, 0] for batch in stream]).mul(255).round().tolist()
    assert first == [0, 40, 80, 120, 160, 0, 40, 80, 120]
    named = tta.stream("camvid", root=tmp_path, sequences=True, corruptions=["fog", "contrast"], samples=2)
    assert [domain.name for domain in named.domains] == [
        "0001TP fog",
        "0001TP contrast",
        "Seq05VD fog",
        "Seq05VD contrast",
    ]
    assert named.samples == 8
    assert named.task == "segmentation"


def test_weather_that_comes_and_goes(tmp_path):
    """Severity 4 in a period of 4 frames: 0, 2, 4, 2, 0; each frame as it is alone at its severity, and masks with it."""
    drives(tmp_path)
    made = tta.stream("camvid", root=tmp_path, samples=5, corruptions=["elastic_transform"], severity=4, period=4)[0]
    clean = tta.stream("camvid", root=tmp_path, samples=5)[0]
    for frame, severity in enumerate((0, 2, 4, 2, 0)):
        one, how = slice(frame, frame + 1), {"seed": 0, "recipe": "imagenet", "index": torch.tensor([frame])}
        expected = corrupt(clean.images[one], "elastic_transform", severity=severity, **how)
        assert torch.equal(made.images[one], expected)
        moved = corrupt_masks(clean.labels[one], "elastic_transform", severity=severity, **how)
        assert torch.equal(made.labels[one], moved)
    assert torch.equal(made.images[4], clean.images[4])
    assert not torch.equal(made.images[2], clean.images[2])
    stream = tta.stream("camvid", root=tmp_path, corruptions=["fog"], period=8)
    assert stream.domains[0].severities(torch.arange(8)).tolist() == [0, 0.5, 1.5, 2.5, 3, 2.5, 1.5, 0.5]
    assert "every 8 frames" in stream.domains[0].describe()["origin"]
    with pytest.raises(ValueError, match="2 or more; got 1"):
        tta.stream("camvid", root=tmp_path, corruptions=["fog"], period=1)


@pytest.mark.parametrize(("kind", "numbers"), [("labelTrainIds", [0, 18, 255]), ("labelIds", [7, 33, 0])])
def test_cityscapes(tmp_path, kind, numbers):
    picture(tmp_path / "leftImg8bit/val/ulm/ulm_000000_leftImg8bit.png")
    mask(tmp_path / f"gtFine/val/ulm/ulm_000000_gtFine_{kind}.png", numbers)
    stream = tta.stream("cityscapes", root=tmp_path, size=[8, 12])
    assert classes_of(stream) == [0, 18, -1]
    assert stream[0].images.shape[2:] == (8, 12)
    assert stream[0].labels.shape[1:] == (16, 24)  # predictions are resized, masks are not


def test_acdc_comes_in_the_published_order_ten_times(tmp_path):
    for place, name in enumerate(("rain", "fog", "snow", "night")):
        picture(tmp_path / f"ACDC/rgb_anon/{name}/train/GP010156/GP010156_frame_00{place}_rgb_anon.png")
        mask(tmp_path / f"ACDC/gt/{name}/train/GP010156/GP010156_frame_00{place}_gt_labelTrainIds.png", [0, 18, 255])
    stream = tta.stream("acdc", root=tmp_path, batch_size=1, protocol="recurring", size=[8, 12])
    assert [domain.name for domain in stream.domains][:5] == ["fog", "night", "rain", "snow", "fog@2"]
    assert len(stream) == 40
    assert classes_of(stream) == [0, 18, -1]
    assert (stream.read(39).labels == stream.read(3).labels).all()


def test_carla_tta(tmp_path):
    folder = tmp_path / "dynamic_1200/Town10HD/30/dynamic_weather"
    for number in (1, 0):
        picture(folder / f"camera/f-{number}.png", colour=(number, 0, 0))
        mask(folder / f"segmentation/f-{number}.png", [7, 6, 3], mode="RGB")
    made = {"root": tmp_path, "domains": ["dynamic_1200"], "size": 16, "batch_size": 2}
    stream = tta.stream("carla-tta", **made)
    assert classes_of(stream) == [0, 13, -1]
    assert stream[0].images[:, 0, 0, 0].tolist() == [0, 1]
    (tmp_path / "lists").mkdir()
    listed = "dynamic_1200/Town10HD/30/dynamic_weather/camera/f-1.png\n"
    (tmp_path / "lists/dynamic_1200.txt").write_text(listed)
    assert tta.stream("carla-tta", lists=tmp_path / "lists", **made).samples == 1


def test_shift_has_a_domain_a_sequence(tmp_path):
    for name in ("b1-00", "a0-ff"):
        inside = tmp_path / "shift/continuous/videos/1x/val/front"
        picture(inside / f"img/{name}/00000100_img_front.jpg")
        mask(inside / f"semseg/{name}/00000100_semseg_front.png", [1, 22, 3], mode="RGB")
    stream = tta.stream("shift", root=tmp_path, batch_size=1, protocol="per-domain", size=[8, 12])
    assert [domain.name for domain in stream.domains] == ["a0-ff", "b1-00"]
    assert stream.reset == "domain"
    assert classes_of(stream) == [0, 13, -1]
    with pytest.raises(ValueError, match="one or more of a0-ff, b1-00"):
        tta.stream("shift", root=tmp_path, domains=["c"])


def test_voc(tmp_path):
    picture(tmp_path / "VOC2012/JPEGImages/x_1.jpg")
    mask(tmp_path / "VOC2012/SegmentationClass/x_1.png", [0, 20, 255])
    (tmp_path / "VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "VOC2012/ImageSets/Segmentation/val.txt").write_text("x_1\n")
    assert classes_of(tta.stream("voc", root=tmp_path, batch_size=1)) == [0, 20, -1]


def test_ade20k_c(tmp_path):
    picture(tmp_path / "ADEChallengeData2016/images/validation/ADE_val_1.jpg")
    mask(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_1.png", [0, 1, 150])
    stream = tta.stream("ade20k-c", root=tmp_path, batch_size=1, corruptions=["fog"], size=None)
    assert classes_of(stream) == [-1, 0, 149]
    assert stream.domains[0].severity == 5


def test_a_folder_of_ones_own(tmp_path):
    for domain in ("night", "rain"):
        picture(tmp_path / domain / "images/x.jpg")
        mask(tmp_path / domain / "masks/x.png", [2, 0, 9])
    stream = tta.stream("maskfolder", root=tmp_path, domains=["rain", "night"], classes=3, ignore_index=9, batch_size=2)
    assert [domain.name for domain in stream.domains] == ["rain", "night"]
    assert classes_of(stream) == [2, 0, -1]
    (tmp_path / "night/masks/x.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images have no mask in .*night.*masks/x\.png"):
        tta.stream("maskfolder", root=tmp_path, domains=["night"], classes=3)


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [("camvid", "testannot"), ("cityscapes", "gtFine"), ("acdc", "rgb_anon"), ("voc", "JPEGImages")],
)
def test_what_is_missing_is_named(tmp_path, name, looked_for):
    with pytest.raises(FileNotFoundError, match=looked_for):
        tta.stream(name, root=tmp_path)


@pytest.mark.parametrize(
    ("number", "dtype", "text"),
    [(70000, np.int32, r"0 to 70000 \(int32\)"), (-1, np.int32, "-1 to 0"), (0.5, np.float32, "float32")],
)
def test_masks_of_numbers_that_are_no_class_are_named(tmp_path, number, dtype, text):
    picture(tmp_path / "images/x.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[0] * 23 + [number]] * 16, dtype=dtype)).save(tmp_path / "masks/x.png", format="TIFF")
    stream = tta.stream("maskfolder", root=tmp_path, classes=3, batch_size=1)
    with pytest.raises(ValueError, match=rf"x\.png' cannot be used as a mask: it holds .*{text}"):
        list(stream)


def test_masks_of_several_sizes_do_not_share_a_batch(tmp_path):
    for number, size in enumerate([(24, 16), (12, 16)]):
        picture(tmp_path / f"images/{number}.jpg", size=(24, 16))
        mask(tmp_path / f"masks/{number}.png", [0, 1], size=size)
    stream = tta.stream("maskfolder", root=tmp_path, classes=2, batch_size=2)
    with pytest.raises(ValueError, match="masks of one batch have one size"):
        stream[0]


# ---------------------------------------------------------------------- corruptions


def test_an_elastic_transform_moves_masks_with_the_pixels():
    """A picture whose colour is its class: after the corruption the mask names the colour, but at borders of classes."""
    blocks = torch.randint(3, (4, 6, 8), generator=torch.Generator().manual_seed(0)).repeat_interleave(16, 1)
    masks = blocks.repeat_interleave(16, 2)
    images = (masks[:, None] * 100).expand(-1, 3, -1, -1).to(torch.uint8)
    settings = {"severity": 3, "seed": 1, "recipe": "imagenet", "index": torch.arange(7, 11)}
    moved = corrupt(images, "elastic_transform", **settings)
    with_them = corrupt_masks(masks, "elastic_transform", **settings)
    shown = (moved[:, 0].float() / 100).round().long()
    assert (shown == masks).float().mean() < 0.9
    assert (shown == with_them).float().mean() > 0.97
    assert torch.equal(corrupt_masks(masks, "fog", **settings), masks)


def test_masks_of_another_size_cannot_move(tmp_path):
    picture(tmp_path / "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", size=(64, 48))
    mask(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelTrainIds.png", [0, 1], size=(64, 48))
    settings = {"root": tmp_path, "batch_size": 1, "corruptions": ["elastic_transform"]}
    assert tta.stream("cityscapes", **settings)[0].labels.shape == (1, 48, 64)
    with pytest.raises(ValueError, match="moves pixels, and masks with them"):
        tta.stream("cityscapes", size=[24, 32], **settings)[0]


# ---------------------------------------------------------------------- datasets of one's own


@pytest.fixture
def scenes():
    """``scenes(count)`` are images and masks of five classes, 7 for void."""

    def make(count, seed=0):
        draws = torch.Generator().manual_seed(seed)
        masks = torch.randint(5, (count, 4, 6), generator=draws).repeat_interleave(4, 1).repeat_interleave(4, 2)
        masks[:, 0] = 7
        return TensorDataset(torch.rand(count, 3, 16, 24, generator=draws), masks)

    return make


def test_datasets_of_masks(scenes):
    data = scenes(6)
    stream = tta.stream({"rain": data, "fog": data}, task="segmentation", ignore_index=7, batch_size=4)
    batch = stream[0]
    assert torch.equal(batch.images, data.tensors[0][:4])
    assert torch.equal(batch.labels, data.tensors[1][:4].where(data.tensors[1][:4] != 7, -1))
    mixed = tta.stream({"rain": data, "fog": data}, task="segmentation", ignore_index=7, batch_size=4, protocol="mixed")
    for batch in mixed:
        assert torch.equal(batch.labels, data.tensors[1][batch.index].where(data.tensors[1][batch.index] != 7, -1))
    assert stream.describe()["task"] == "segmentation"


def test_a_sample_is_decoded_once_a_batch():
    read = []

    class Data:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            read.append(i)
            return Image.new("RGB", (6, 4)), Image.new("L", (6, 4), i)

    batch = tta.stream({"a": Data()}, task="segmentation", batch_size=4)[0]
    assert read == [0, 1, 2, 3]
    assert batch.labels[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_masks_of_earlier_batches_are_not_kept(scenes):
    stream = tta.stream({"a": scenes(12)}, task="segmentation", ignore_index=7, batch_size=2)
    for _ in stream:
        assert len(stream.domains[0]._recent) <= 2


def test_what_is_no_mask_is_refused():
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sample 0: expected a mask .*got torch.int64 of shape \(\)"):
        tta.stream({"a": data}, task="segmentation")[0]


@pytest.mark.parametrize("protocol", ["correlated", "ptta", "label-shift", "outliers", "feedback", "ccc"])
def test_protocols_of_classes_are_refused(protocol, scenes):
    with pytest.raises(ValueError, match="needs one class an image"):
        tta.stream({"a": scenes(4)}, task="segmentation", protocol=protocol)


@pytest.mark.parametrize("protocol", ["continual", "per-domain", "episodic", "mixed", "recurring", "cdc", "batch-1"])
def test_protocols_of_domains_serve_masks(protocol, scenes):
    stream = tta.stream({"a": scenes(4), "b": scenes(4, 1)}, task="segmentation", protocol=protocol, ignore_index=7)
    assert all(batch.labels.shape[1:] == (16, 24) for batch in stream)


def test_an_unknown_task_of_a_stream_is_named(scenes):
    with pytest.raises(ValueError, match="No task of a stream 'detektion'"):
        tta.stream({"a": scenes(4)}, task="detektion")
    with pytest.raises(ValueError, match="is of classification; got task='segmentation'"):
        tta.stream("digits-c", task="segmentation")


# ---------------------------------------------------------------------- scores


def drawn(images=6, classes=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes - 1, (images, 9, 7), generator=draws)  # the last class is never true
    return torch.randint(classes, (images, 9, 7), generator=draws), labels


def test_a_confusion_matrix_an_image():
    predicted, labels = drawn()
    found = confusion(predicted, labels, 4)
    assert found.dtype == torch.int32
    for image in range(6):
        theirs = MulticlassConfusionMatrix(4, ignore_index=-1)(predicted[image], labels[image])
        assert torch.equal(found[image].long(), theirs)


def test_miou_is_that_of_torchmetrics():
    predicted, labels = drawn()
    predicted[predicted == 2], labels[labels == 2] = 0, 1  # a class that is nowhere does not count
    theirs = MulticlassJaccardIndex(4, average="macro", ignore_index=-1)(predicted, labels)
    matrix = confusion(predicted, labels, 4).sum(0).numpy()
    assert mean_iou(matrix) == pytest.approx(100 * float(theirs), abs=1e-4)
    assert np.isnan(class_iou(matrix)).tolist() == [False, False, True, False]
    assert math.isnan(mean_iou(np.zeros((3, 3), dtype=int)))


@pytest.fixture
def run(segmenter, scenes):
    """``run(method)`` is a result on two domains, with the logits of each image."""

    def of(method="source", seed=0, **hparams):
        stream = tta.stream(
            {"rain": scenes(6, seed), "fog": scenes(5, seed + 1)}, task="segmentation", ignore_index=7, batch_size=4
        )
        adapter = tta.adapt(segmenter(), method, task="segmentation", **hparams)
        return tta.evaluate(adapter, stream, progress=False), stream

    return of


def test_evaluate_scores_by_miou(run, segmenter):
    result, stream = run()
    model, by_domain, by_image = segmenter(), {0: [], 1: []}, []
    for batch in stream:
        with torch.no_grad():
            predicted = model(batch.images).argmax(1)
        by_domain[int(batch.domain[0])].append((predicted, batch.labels))
        by_image += list(zip(predicted, batch.labels, strict=True))

    def jaccard(pairs):
        metric = MulticlassJaccardIndex(5, average="macro", ignore_index=-1)
        for predicted, labels in pairs:
            metric.update(predicted, labels)
        return 100 * float(metric.compute())

    rain, fog = (jaccard(by_domain[number]) for number in (0, 1))
    assert result.task == "segmentation"
    assert result.score == ("mIoU", pytest.approx((rain + fog) / 2, abs=1e-4), "up")
    assert result.scores == {"rain": pytest.approx(rain, abs=1e-4), "fog": pytest.approx(fog, abs=1e-4)}
    assert result.metrics["miou_stream"] == pytest.approx(jaccard([*by_domain[0], *by_domain[1]]), abs=1e-4)
    images = [jaccard([pair]) for pair in by_image]
    assert result.metrics["miou_image"] == pytest.approx((np.mean(images[:6]) + np.mean(images[6:])) / 2, abs=1e-4)
    predicted, labels = (torch.cat([pair[k] for pair in by_domain[0]]) for k in (0, 1))
    wrong = (predicted != labels)[labels >= 0].float().mean()
    assert result.errors["rain"] == pytest.approx(100 * float(wrong), abs=1e-4)
    assert result.samples == 11 * 15 * 24  # one row of void
    assert str(result).startswith("source on custom: mean mIoU ")


def test_what_is_summed_makes_the_difference():
    """Two pictures in one domain, one in each of two, small enough to count; the last has no class 1."""
    matrices = np.zeros((4, 2, 2), dtype=np.int32)
    matrices[0, 0] = (3, 1)  # of 4 pixels of class 0, one is taken for class 1: IoU 3/4 and 0
    matrices[1, 0] = (4, 0)  # IoU 1, and no class 1
    matrices[2] = ((1, 1), (0, 2))  # IoU 1/2 and 2/3
    matrices[3, 0, 0] = 5  # IoU 1
    zeros, none = np.zeros(4), -np.ones(4, int)
    predictions = Predictions(
        domain=np.array([0, 0, 1, 2]), index=np.arange(4), label=none, prediction=none,
        confidence=zeros, entropy=zeros, confusion=matrices,
    )  # fmt: skip
    found = maps.summary(predictions, ["a", "b", "c"])
    assert found["domains"]["a"]["miou"] == pytest.approx(100 * (7 / 8 + 0) / 2)
    assert found["domains"]["b"]["miou"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert found["miou_stream"] == pytest.approx(100 * (13 / 15 + 2 / 4) / 2)
    assert found["miou_image"] == pytest.approx(100 * ((3 / 8 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + 1) / 3)
    assert found["miou_class"] == pytest.approx(100 * ((7 / 8 + 1 / 2 + 1) / 3 + (0 + 2 / 3) / 2) / 2)
    assert found["pixel_error"] == pytest.approx(100 * (1 / 8 + 1 / 4 + 0) / 3)
    only = maps.summary(predictions.select(predictions.index == 1), ["a"])
    assert only["domains"]["a"]["class_iou"][0] == 100
    assert math.isnan(only["domains"]["a"]["class_iou"][1])


def test_a_result_of_maps_is_saved_and_compared(run, tmp_path):
    result, _ = run("norm")
    result.save(tmp_path)
    loaded = Result.load(tmp_path)
    assert loaded == result
    assert loaded.score == result.score
    assert loaded.predictions == result.predictions
    assert loaded.curves["miou"].notna().all()
    assert loaded.curves["samples"].sum() == 11


def test_curves_of_maps_are_of_pixels(run):
    result, _ = run()
    curves, matrices = result.curves, result.predictions.confusion
    first = matrices[:4].sum(0)
    assert curves["error"][0] == pytest.approx(100 * (1 - np.trace(first) / first.sum()))
    assert curves["classes"][0] == {k: n for k, n in enumerate(first.sum(0).tolist()) if n}
    assert curves["miou"][0] == pytest.approx(mean_iou(first))


def test_predictions_of_another_run_are_refused(run):
    from dataclasses import replace

    (first, _), (second, _) = run(), run(seed=5)
    with pytest.raises(ValueError, match="come from different runs"):
        replace(first, predictions=second.predictions)


def test_labels_that_are_no_masks_are_refused(segmenter):
    data = TensorDataset(torch.rand(4, 3, 16, 24), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="is scored by masks"):
        tta.evaluate(tta.adapt(segmenter(), "source"), tta.stream({"a": data}), progress=False)


def test_a_class_beyond_the_models_is_refused(segmenter, scenes):
    stream = tta.stream({"a": scenes(4)}, task="segmentation")
    with pytest.raises(ValueError, match=r"the class 7; the model gives 5 classes.*ignore_index=7"):
        tta.evaluate(tta.adapt(segmenter(), "source"), stream, progress=False)


def test_predictions_are_resized_to_larger_masks(segmenter):
    labels = torch.randint(5, (2, 32, 48), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 5, 16, 24, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False)
    found = SEGMENTATION.columns(logits, labels)["confusion"]
    assert torch.equal(found, confusion(large.argmax(1), labels, 5))


def test_the_difference_of_two_methods_has_a_paired_interval(run):
    (source, _), (norm, _) = run("source"), run("norm")
    interval = compare_errors(source, norm, resamples=200)
    assert interval.estimate == pytest.approx(norm.score.value - source.score.value)
    assert interval.low < interval.estimate < interval.high
    same = compare_errors(source, source, resamples=50)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)


def test_published_numbers_of_classes():
    assert len(driving.LABEL_IDS) == 19
    assert len(driving.CARLA) == len(driving.SHIFT) == 14


# ---------------------------------------------------------------------- what is shown


def test_tables_show_the_miou_and_the_best_is_the_highest(run):
    (source, _), (norm, _) = run("source"), run("norm")
    table = tta.compare([source, norm])
    assert "Online mIoU in %" in table.to_text()
    assert "error" not in table.to_text() + table.to_markdown() + table.to_html()
    best = max(source, norm, key=lambda result: result.score.value)
    (row,) = (line for line in table.to_markdown().splitlines() if line.startswith(f"| {best.method} "))
    assert f"**{best.score.value:.1f}**" in row
    assert "vs source: difference of the mean mIoU" in table.to_text().replace("\n", " ")
    frame = table.to_frame().set_index("method")
    assert frame.loc["norm", "difference"] == pytest.approx(norm.score.value - source.score.value)
    assert frame.loc["norm", "rain"] == pytest.approx(norm.scores["rain"])


def test_results_of_two_tasks_are_not_compared(run, cnn, golden_images, golden_labels):
    classes = tta.stream({"a": TensorDataset(golden_images[:20], golden_labels[:20])}, batch_size=10)
    other = tta.evaluate(tta.adapt(cnn, "source"), classes, progress=False)
    table = tta.compare([run("source")[0], other])
    assert len(table.groups) == 2
    assert {group.score.name for group in table.groups} == {"error", "mIoU"}


def test_figures_show_the_score(run):
    figures = pytest.importorskip("tta.report.figures")
    pytest.importorskip("matplotlib")
    results = [run("source")[0], run("norm")[0]]
    (axes,) = figures.heatmap(results).axes
    assert axes.get_title(loc="left") == "online mIoU, %"
    best = max(results, key=lambda result: result.score.value)
    assert axes.get_yticklabels()[0].get_text() == best.method
    assert figures.pareto(results).axes[0].get_ylabel() == "mean online mIoU, %"
    assert "pixels" in figures.curve(results).axes[0].get_ylabel()
    with pytest.raises(ValueError, match="one class an image"):
        figures.calibration(results)


def test_selection_takes_the_highest_miou(run):
    from tta.benchmark.selection import test_error as score

    results = [run("source")[0], run("norm")[0]]
    assert min(results, key=score) is max(results, key=lambda result: result.score.value)


def test_the_clean_domain_is_scored_before_and_after(segmenter, scenes):
    stream = tta.stream({"a": scenes(4)}, task="segmentation", ignore_index=7, batch_size=4)
    adapter = tta.adapt(segmenter(), "source")
    result = tta.evaluate(adapter, stream, progress=False, clean=stream)
    assert result.metrics["source_error_before"] == pytest.approx(result.errors["a"])
    assert result.metrics["source_error_after"] == pytest.approx(result.errors["a"])


def test_the_oracle_compares_at_the_size_of_the_masks(segmenter, scenes):
    images, masks = scenes(4).tensors
    large = torch.utils.data.TensorDataset(images, masks.repeat_interleave(2, 1).repeat_interleave(2, 2))
    stream = tta.stream({"a": large}, task="segmentation", ignore_index=7, batch_size=2)
    result = tta.evaluate(tta.adapt(segmenter(), "tent"), stream, progress=False, oracle_steps=2)
    assert result.rows[0].samples == int((large.tensors[1] != 7).sum())


def test_the_progress_shows_the_score_so_far(run, segmenter, scenes):
    from tta.engine import OnlineModule

    module = OnlineModule(tta.adapt(segmenter(), "source"))
    stream = tta.stream({"a": scenes(6)}, task="segmentation", ignore_index=7, batch_size=4)
    import lightning.pytorch as pl

    pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).test(
        module, stream.loader(), verbose=False
    )
    assert module.score() == tta.evaluate(tta.adapt(segmenter(), "source"), stream, progress=False).score


def test_a_loader_of_ones_own_gives_images_and_masks(segmenter, scenes):
    from tta.batches import images_and_labels

    images, masks = scenes(4).tensors
    assert torch.equal(images_and_labels((images, masks))[1], masks)
    assert torch.equal(images_and_labels({"pixel_values": images, "labels": masks.int()})[1], masks)
    with pytest.raises(ValueError, match="expected one class for each of"):
        images_and_labels((images, masks[:2]))


def test_a_module_of_ones_own_gets_what_its_model_gives(segmenter):
    import lightning.pytorch as pl

    class Own(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = segmenter(form="out", full=False)
            self.maps = []

        def test_step(self, batch, batch_idx):
            self.maps.append(self.model(batch[0])["out"])

    own, data = Own(), torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[AdaptCallback("tent", task="segmentation")],
    )
    trainer.test(own, torch.utils.data.DataLoader(TensorDataset(data), batch_size=4), verbose=False)
    adapter = tta.adapt(segmenter(form="out", full=False), "tent", task="segmentation")
    assert torch.equal(torch.cat(own.maps), torch.cat([adapter(part) for part in data.split(4)]))


def test_the_page_shows_the_score(run):
    pytest.importorskip("matplotlib")
    from tta.report.page import html_page

    results = [run("source")[0], run("norm")[0]]
    page = html_page(tta.compare(results), results)
    assert "<h2>Online mIoU in %</h2>" in page
    assert "<h2>mIoU by domain</h2>" in page
    assert "<h2>mIoU against cost</h2>" in page


def test_the_server_refuses_maps(segmenter):
    serve = pytest.importorskip("tta.serve")
    with pytest.raises(ValueError, match="one class an image; it does not serve segmentation"):
        serve.create_app(tta.adapt(segmenter(), "tent", task="segmentation"))
