"""Streams of pictures with boxes, in the published layouts, on miniature folders."""

import json

import pytest
import torch
from PIL import Image

import tta
from tta.cli import main
from tta.datasets.corruptions import corrupt

DETECTOR = """
import torch
from torch import nn
class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    def forward(self, x):
        scores = self.norm(self.conv(x)).mean((1, 2, 3)).sigmoid()
        box = torch.tensor([[12.0, 8.0, 36.0, 24.0]])
        return [{"boxes": box, "labels": torch.tensor([1]), "scores": score[None]} for score in scores]
def small():
    torch.manual_seed(0)
    return Detector()
"""


def picture(path, size=(48, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)).byte()
    Image.fromarray(noise.numpy()).save(path)


@pytest.fixture
def kitti(tmp_path):
    """Three pictures a weather; the second has no object, and the lists are in the folder of splits."""
    for number, name in enumerate(("000001", "000007", "000003")):
        for folder in ("fog/fog_30", "rain/200mm", "snow/5", "initial/images", "fog/fog_50"):
            picture(tmp_path / f"KITTI/{folder}/{name}.png", seed=number)
    labels = tmp_path / "KITTI/labels_yolo_format"
    labels.mkdir()
    (labels / "000001.txt").write_text("0 0.5 0.5 0.5 0.5\n3 0.25 0.5 0.25 1.0\n")
    (labels / "000003.txt").write_text("7 0.5 0.5 1.0 1.0\n")
    (tmp_path / "KITTI/splits").mkdir()
    (tmp_path / "KITTI/splits/test.txt").write_text("000001.png\n000007.png\n000003.png\n")
    return tmp_path


def boxes_of(batch):
    return [row[~row[:, 4].isnan()].tolist() for row in batch.labels]


def test_kitti_weather(kitti):
    stream = tta.stream("kitti-weather", root=kitti, batch_size=3, size=None)
    assert [domain.name for domain in stream.domains] == ["fog", "rain", "snow"]
    assert stream.task == "detection"
    batch = stream[0]
    assert batch.images.shape == (3, 3, 32, 48)
    assert boxes_of(batch) == [
        [[12, 8, 36, 24, 1, 0], [6, 0, 18, 32, 4, 0]],
        [],
        [[0, 0, 48, 32, 8, 0]],
    ]
    own = tta.stream("kitti-weather", root=kitti, domains=["fog/fog_50", "clear"], samples=1, first_label=0, size=None)
    assert [domain.name for domain in own.domains] == ["fog-fog_50", "clear"]
    assert boxes_of(own[0]) == [[[12, 8, 36, 24, 0, 0], [6, 0, 18, 32, 3, 0]]]


@pytest.mark.parametrize(("size", "expected"), [([16, 24], (16, 24)), (64, (64, 96)), (None, (32, 48))])
def test_boxes_are_resized_with_their_pictures(kitti, size, expected):
    batch = tta.stream("kitti-weather", root=kitti, batch_size=1, size=size)[0]
    assert batch.images.shape[2:] == expected
    high, wide = expected
    assert boxes_of(batch)[0][0] == [wide / 4, high / 4, wide * 3 / 4, high * 3 / 4, 1, 0]


def test_a_line_that_is_no_box_is_named(kitti):
    (kitti / "KITTI/labels_yolo_format/000003.txt").write_text("7 0.5 0.5 1.0\n")
    with pytest.raises(ValueError, match=r"000003.txt', line 1: expected a class and four numbers"):
        tta.stream("kitti-weather", root=kitti)


@pytest.fixture
def coco(tmp_path):
    """Two pictures of other sizes, listed against their numbers; one box is a crowd, one is flat."""
    picture(tmp_path / "val2017/000000000009.jpg", size=(40, 30))
    picture(tmp_path / "val2017/000000000004.jpg", size=(64, 48), seed=1)
    annotations = {
        "images": [
            {"id": 9, "file_name": "000000000009.jpg", "width": 40, "height": 30},
            {"id": 4, "file_name": "000000000004.jpg", "width": 64, "height": 48},
        ],
        "annotations": [
            {"image_id": 4, "bbox": [16, 12, 32, 24], "category_id": 90, "iscrowd": 1},
            {"image_id": 4, "bbox": [1, 2, 0, 5], "category_id": 1, "iscrowd": 0},
            {"image_id": 9, "bbox": [0, 0, 10, 15], "category_id": 1, "iscrowd": 0},
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(annotations))
    return tmp_path


def test_coco_c(coco):
    stream = tta.stream("coco-c", root=coco, batch_size=1, corruptions=["fog", "elastic_transform"])
    assert [domain.name for domain in stream.domains] == ["fog", "elastic_transform", "original"]
    assert boxes_of(stream[0]) == [[[16, 12, 48, 36, 90, 1]]]  # pictures in the order of their numbers
    assert boxes_of(stream[2]) == boxes_of(stream[0])  # as in the clean pictures, which the origin says
    assert "boxes as in the clean pictures" in stream.domains[1].origin
    assert boxes_of(stream[5]) == [[[0, 0, 10, 15, 1, 0]]]
    clean = stream[4].images
    expected = corrupt(clean, "fog", severity=5, seed=0, recipe="imagenet", index=torch.tensor([0]))
    assert torch.equal(stream[0].images, expected)
    assert len(tta.stream("coco-c", root=coco, batch_size=1).domains) == 16


def test_pictures_of_several_sizes_share_a_batch_when_resized(coco):
    batch = tta.stream("coco-c", root=coco, batch_size=2, corruptions=[], size=[24, 32])[0]
    assert batch.images.shape == (2, 3, 24, 32)
    assert boxes_of(batch) == [[[8, 6, 24, 18, 90, 1]], [[0, 0, 8, 12, 1, 0]]]
    with pytest.raises(ValueError, match="A batch holds images of one size"):
        tta.stream("coco-c", root=coco, batch_size=2, corruptions=[])[0]


@pytest.mark.parametrize(("name", "looked_for"), [("kitti-weather", "labels_yolo_format"), ("coco-c", "val2017")])
def test_what_is_missing_is_named(tmp_path, name, looked_for):
    with pytest.raises(FileNotFoundError, match=looked_for):
        tta.stream(name, root=tmp_path)


def test_other_boxes_are_another_stream(kitti):
    def content():
        return tta.stream("kitti-weather", root=kitti).describe()["domains"]["fog"]["boxes"]

    before = content()
    (kitti / "KITTI/labels_yolo_format/000003.txt").write_text("7 0.5 0.5 1.0 0.9\n")
    assert content() != before


@pytest.mark.slow
def test_the_command_runs_it(kitti, tmp_path, monkeypatch, capsys):
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    (tmp_path / "mine.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = [
        "run",
        "kitti-weather",
        "source",
        "norm",
        "actmad",
        f"stream.root={kitti}",
        "model=mine:small",
        "batch_size=2",
    ]
    assert (
        main([*run, "size=[32,48]", f"source={kitti / 'KITTI/initial/images'}", "skip_layers=0", "--out", "out"]) == 0
    )
    assert "mAP@50" in capsys.readouterr().out
    results = tta.results.find_results("out")
    assert [result.method for result in results] == ["actmad", "norm", "source"]
    assert (results[0].config["loss_scale"], results[0].reset) == (
        1.0,
        "domain",
    )  # the preset and protocol of the stream
