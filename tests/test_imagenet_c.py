"""``imagenet-c`` and its kin: the published tree, whole and by a list, and every kind of hole in it."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import tta
from tta.datasets import imagenet_c
from tta.datasets.files import FileImages, FileList
from tta.datasets.geometry import Geometry
from tta.datasets.imagenet_classes import WNIDS
from tta.datasets.stream import Stream

SOME = WNIDS[:3]


def write(file, colour, size=(32, 32)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, quality=85)


def build(folder, corruptions, severities=(5,), wnids=SOME, size=(32, 32)):
    """Two images a class; red tells the severity, green the image."""
    for corruption in corruptions:
        for severity in severities:
            for label, wnid in enumerate(wnids):
                for number in range(2):
                    name = f"ILSVRC2012_val_{8 * number + label:08d}.JPEG"
                    write(
                        folder / corruption / str(severity) / wnid / name,
                        (40 * severity, 30 * label + 10 * number, 0),
                        size,
                    )


@pytest.fixture
def small(monkeypatch):
    """Three classes and six images in place of ImageNet's."""
    for name in ("IMAGENET_C", "IMAGENET_3DCC", "TINY_IMAGENET_C"):
        kind = getattr(imagenet_c, name)
        wnids = None if kind.wnids is None else SOME
        monkeypatch.setattr(imagenet_c, name, kind._replace(images=6, classes=3, wnids=wnids))


@pytest.fixture
def root(tmp_path, small):
    build(tmp_path / "ImageNet-C", ("fog", "snow"), (1, 2, 5))
    return tmp_path


def stream(root, name="imagenet-c", corruptions=("snow", "fog"), **settings):
    return tta.stream(name, root=root, corruptions=list(corruptions), **settings)


@pytest.mark.parametrize("inside", ["", "ImageNet-C"])
@pytest.mark.parametrize("severity", [2, 5])
def test_the_published_tree_is_read(root, inside, severity):
    made = stream(root / inside, severity=severity, batch_size=4)
    assert [domain.name for domain in made.domains] == ["snow", "fog"]
    batches = list(made)
    assert [len(batch.images) for batch in batches] == [4, 2, 4, 2]
    assert batches[0].images.shape == (4, 3, 32, 32)
    for batch in batches:
        red, green = ((255 * batch.images[:, c, 16, 16]).round() for c in (0, 1))
        assert (red - 40 * severity).abs().max() <= 3
        place = batch.index  # of the sorted list: two images a class
        assert (green - (30 * (place // 2) + 10 * (place % 2))).abs().max() <= 3
        assert torch.equal(batch.labels, place // 2)
    assert made.classes == (3, None, None)
    assert "read from" in made.origins[0]


def test_archive_folders_may_lie_between(root):
    (root / "ImageNet-C" / "weather").mkdir()
    (root / "ImageNet-C" / "fog").rename(root / "ImageNet-C" / "weather" / "fog")
    assert [len(batch.images) for batch in stream(root, batch_size=6)] == [6, 6]


def test_all_images_are_shuffled_always_alike_or_by_class(root):
    order = stream(root).domains[0].index.tolist()
    assert sorted(order) == list(range(6)) != order
    assert stream(root, seed=9).domains[0].index.tolist() == order
    assert stream(root, by_class=True).domains[1].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert stream(root, samples=2).domains[1].index.tolist() == order[:2]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_says_which_images_and_in_which_order(root, tmp_path, end):
    names = [f"{SOME[2]}/ILSVRC2012_val_00000010.JPEG", f"{SOME[0]}/ILSVRC2012_val_00000000.JPEG"]
    file = tmp_path / "list.txt"
    file.write_bytes((end.join(names) + end).encode())
    made = stream(root, image_list=str(file), batch_size=2)
    snow, fog = made.domains
    assert fog.files is snow.files
    assert snow.labels.tolist() == [2, 0]
    assert made[0].images[:, 1, 0, 0].tolist() == pytest.approx([70, 0], abs=3)
    told = made.describe()["domains"]["snow"]
    file.write_bytes("\n".join(names).encode())
    again = stream(root, image_list=str(file)).describe()["domains"]["snow"]
    assert again == told  # whatever the line ends
    file.write_bytes("\n".join(reversed(names)).encode())
    assert stream(root, image_list=str(file)).describe()["domains"]["snow"]["list"] != told["list"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names 0 images"),
        (f"{SOME[0]}/ILSVRC2012_val_00000000.JPEG\n" * 2, "names 2 images, 1 different ones"),
        ("n99999999/x.JPEG", r"line 1: 'n99999999/x\.JPEG' is of no known class"),
    ],
)
def test_a_bad_list_is_named(root, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        stream(root, image_list=tmp_path / "list.txt")


def test_images_of_a_list_that_are_not_there_are_named(root, tmp_path):
    (tmp_path / "list.txt").write_text(f"{SOME[0]}/ILSVRC2012_val_00000000.JPEG\n{SOME[1]}/gone.JPEG\n")
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 images are not in '.*snow/5': {SOME[1]}/gone\.JPEG\."):
        stream(root, image_list=tmp_path / "list.txt")
    with pytest.raises(FileNotFoundError, match=r"no list of images '.*none\.txt'"):
        stream(root, image_list=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="by_class is for all images"):
        stream(root, image_list=tmp_path / "list.txt", by_class=True)


def delete(folder):
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda c: delete(c / "fog"), FileNotFoundError, r"has no 'fog': it holds snow\. Get it from https://zenodo"),
        (lambda c: delete(c / "fog" / "5"), FileNotFoundError, r"fog' has no severity 5: it holds 1, 2"),
        (
            lambda c: delete(c / "snow" / "5" / SOME[1]),
            ValueError,
            rf"snow/5' has 2 .*; expected 3\. Missing: {SOME[1]}",
        ),
        (lambda c: delete(c / "fog" / "5" / SOME[1]), ValueError, rf"fog/5' has 2 .*; expected 3\. Missing: {SOME[1]}"),
        (lambda c: (c / "snow" / "5" / "n5").mkdir(), ValueError, r"has 4 class folders; expected 3\. Unknown: n5"),
        (
            lambda c: next((c / "snow" / "5" / SOME[0]).iterdir()).unlink(),
            ValueError,
            r"snow/5' holds 5 images; expected 6.*image_list=FILE",
        ),
        (
            lambda c: (c / "fog" / "5" / SOME[0] / "ILSVRC2012_val_00000008.JPEG").unlink(),
            FileNotFoundError,
            rf"fog/5' holds 5 images; the first .* has 6\. Missing here: {SOME[0]}/ILSVRC2012_val_00000008\.JPEG",
        ),
        (
            lambda c: delete(c),
            FileNotFoundError,
            r"No ImageNet-C/ or imagenet-c/ in .*zenodo.*`tta download imagenet-c`.*TTA",
        ),
    ],
    ids=["corruption", "severity", "class", "class later", "extra class", "image", "image later", "all"],
)
def test_what_is_missing_is_named_with_what_was_found_and_expected(root, spoil, error, message):
    spoil(root / "ImageNet-C")
    with pytest.raises(error, match=message):
        stream(root)


def test_settings_out_of_range_are_named(root):
    for settings, message in [
        ({"severity": 0}, "severity is 1, 2, 3, 4 or 5; got 0"),
        ({"samples": 7}, "samples is between 1 and 6"),
        ({"corruptions": []}, "corruptions is a list of one or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(root, **settings)


def test_severities_and_clean_images(root, tmp_path):
    gradual = stream(root, severity=2, corruptions=["fog"], protocol="gradual", batch_size=6)
    assert [round(255 * float(batch.images[0, 0, 0, 0]) / 40) for batch in gradual] == [2, 1]
    with pytest.raises(FileNotFoundError, match=r"6 of 6 images are not in .*fog/3'"):
        stream(root, severity=5, corruptions=["fog"], protocol="gradual")
    with pytest.raises(FileNotFoundError, match=r"stream\.clean_root=PATH"):
        stream(root, corruptions=["fog"], protocol="forgetting")
    build(tmp_path, ["clean"], (5,), size=(300, 280))
    made = stream(root, corruptions=["fog"], protocol="forgetting", clean_root=tmp_path / "clean" / "5", batch_size=6)
    assert [domain.name for domain in made.domains] == ["fog", "clean"]
    assert list(made)[1].images.shape == (6, 3, 224, 224)
    assert made.domains[1].labels.tolist() == made.domains[0].labels.tolist()


def test_geometry_as_cotta_has_it(root):
    assert stream(root, resize=256, crop=224)[0].images.shape[2:] == (224, 224)


def test_3dcc_and_tiny_imagenet_have_the_same_layout(tmp_path, small):
    build(tmp_path / "ImageNet-3DCC", imagenet_c.CORRUPTIONS_3D)
    made = tta.stream("imagenet-3dcc", root=tmp_path, batch_size=6)
    assert [domain.name for domain in made.domains] == list(imagenet_c.CORRUPTIONS_3D)
    build(tmp_path / "Tiny-ImageNet-C", ["fog"], wnids=("n01443537", "n01629819", "n01641577"), size=(64, 64))
    tiny = tta.stream("tiny-imagenet-c", root=tmp_path, corruptions=["fog"], batch_size=6)
    assert tiny[0].images.shape == (6, 3, 64, 64)
    assert tiny.classes == (3, None, None)
    delete(tmp_path / "Tiny-ImageNet-C" / "fog" / "5" / "n01443537")
    with pytest.raises(ValueError, match="has 2 class folders; expected 3"):
        tta.stream("tiny-imagenet-c", root=tmp_path, corruptions=["fog"])


def test_the_published_numbers_are_checked():
    assert imagenet_c.IMAGENET_C[2:4] == imagenet_c.IMAGENET_3DCC[2:4] == (50_000, 1000)
    assert imagenet_c.TINY_IMAGENET_C[2:4] == (10_000, 200)
    assert len(imagenet_c.CORRUPTIONS_3D) == 12
    assert len(WNIDS) == len(set(WNIDS)) == 1000
    assert list(WNIDS) == sorted(WNIDS)


def test_a_stream_of_imagenet_cs_size_takes_few_megabytes(tmp_path):
    """Fifteen domains of 50 000 files, which need not exist: one list serves them all."""
    names = np.array([f"{WNIDS[n % 1000]}/ILSVRC2012_val_{n:08d}.JPEG".encode() for n in range(50_000)])
    tracemalloc.start()
    files = FileList(names.copy(), torch.arange(50_000) % 1000, torch.arange(50_000)).shuffled()
    domains = [FileImages(name, tmp_path / name, files, Geometry()) for name in tta.datasets.CORRUPTIONS]
    listed = tracemalloc.get_traced_memory()[0]
    made = Stream("imagenet-c", domains, batch_size=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.samples == 750_000
    assert len(made) == 15 * 782
    assert listed < 5e6
    assert peak < 30e6
    assert made.order.element_size() * made.order.nelement() == 12_000_000  # torch's own, not traced
