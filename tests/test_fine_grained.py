"""The ten fine-grained sets: CoOp's split files in miniature, the names of the classes, and who reads them."""

import json

import pytest
import torch
from PIL import Image

import tta
from tta import models
from tta.cli import main
from tta.datasets import fine_grained
from tta.datasets.fine_grained import SETS


def build(root, name):
    """Two classes with two test images each, laid out as published; class 1 is listed first."""
    layout = SETS[name]
    images = root / layout.folder / layout.images
    names = ["black_bear", "snail"]
    rows = [[f"{names[label]}/{place}.jpg", label, names[label]] for label in (1, 0) for place in range(2)]
    if name == "aircraft":
        rows = [[f"00{place}.jpg", label, name] for place, (_, label, name) in enumerate(rows)]
        lines = [f"{path.removesuffix('.jpg')} {class_name}" for path, _, class_name in rows]
        images.mkdir(parents=True)
        (root / layout.folder / layout.split).write_text("\n".join(lines) + "\n")
        (root / layout.folder / "variants.txt").write_text("\n".join(names) + "\n")
    else:
        images.mkdir(parents=True)
        (root / layout.folder / layout.split).write_text(json.dumps({"train": rows[:1], "val": [], "test": rows}))
    for path, label, _ in rows:
        (images / path).parent.mkdir(exist_ok=True)
        Image.new("L", (40, 36), 50 + 100 * label).save(images / path, quality=95)


@pytest.fixture
def small(monkeypatch):
    """Four images of two classes are all that is expected."""
    for name, layout in SETS.items():
        monkeypatch.setitem(fine_grained.SETS, name, layout._replace(test=4, classes=2))


@pytest.mark.parametrize("name", SETS)
def test_images_labels_and_names_are_those_of_the_split(tmp_path, small, name):
    build(tmp_path, name)
    stream = tta.stream(name, root=tmp_path, resize=36, crop=32, batch_size=4)
    (batch,) = stream
    assert batch.images.shape == (4, 3, 32, 32)
    assert torch.equal(batch.labels, (batch.images[:, 0, 0, 0] > 100 / 255).long())
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    assert stream.class_names == ("black_bear", "snail")
    assert stream.classes.count == 2


def test_the_published_counts_are_held_to(tmp_path):
    build(tmp_path, "pets")
    with pytest.raises(ValueError, match="lists 4 test images of 2 classes; expected 3669 of 37"):
        tta.stream("pets", root=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"No oxford_flowers/ .*Looked for split_zhou_OxfordFlowers\.json and jpg/"
    ):
        tta.stream("flowers102", root=tmp_path)


def test_eurosats_folders_are_spelled_out(tmp_path, small):
    build(tmp_path, "eurosat")
    file = tmp_path / "eurosat" / "split_zhou_EuroSAT.json"
    file.write_text(file.read_text().replace('"snail"', '"SeaLake"'))
    assert tta.stream("eurosat", root=tmp_path).class_names == ("black_bear", "Sea or Lake")


def test_folders_of_your_own_are_names(tmp_path):
    build(tmp_path, "dtd")
    stream = tta.stream("imagefolder", root=tmp_path / "dtd" / "images", resize=36, crop=32)
    assert stream.class_names == ("black_bear", "snail")


def test_a_run_gives_a_model_the_names_of_the_stream(tmp_path, small, monkeypatch, capsys):
    build(tmp_path, "dtd")
    asked = []
    load = models.load_model

    def loaded(spec, **settings):
        asked.append(settings)
        return load("digits-clip", classes=["one", "two"])

    monkeypatch.setattr(tta, "load_model", loaded)
    monkeypatch.chdir(tmp_path)
    words = ["model=hf-clip:NAME", f"stream.root={tmp_path}", "stream.resize=36", "stream.crop=32", "views=4"]
    assert main(["run", "dtd", "zero", *words, "templates=['a {}']"]) == 0
    assert asked[0]["classes"] == ("black_bear", "snail")
    assert asked[0]["templates"] == ["a {}"]
    assert "source" in capsys.readouterr().out


def test_imagenets_names_are_a_thousand_and_differ():
    names = models.imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert names[:2] == ["tench", "goldfish"]
    # what CLIP's authors say that they changed
    assert [names[n] for n in (21, 134, 517, 677)] == [
        "kite (bird of prey)",
        "crane bird",
        "construction crane",
        "metal nail",
    ]


def test_imagenets_names_are_those_that_open_clip_ships():
    theirs = pytest.importorskip("open_clip", reason="needs the extra `clip`").zero_shot_metadata.IMAGENET_CLASSNAMES
    ours = models.imagenet_names()
    assert {n: theirs[n] for n in range(1000) if ours[n] != theirs[n]} == {744: "missile", 836: "sunglasses"}
