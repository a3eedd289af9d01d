"""Pictures of any user: 16 bits and floats, EXIF turns, bombs, links and pipes, long strips, and folders named by numbers."""

import json
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import tta
from tta.cli import main
from tta.datasets import catalog
from tta.datasets.files import ClassOrderWarning, list_flat, list_images, subfolders
from tta.datasets.write import write_corrupted

AS_STORED = {"resize": None, "crop": None}
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every level of 8 bits


def save(picture, file, **how):
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(file, **how)
    except OSError as error:
        if "I;16 as PPM" not in str(error):
            raise
        pytest.skip("this release of Pillow writes no 16-bit PGM")


def stream(root, name="imagefolder", **settings):
    return tta.stream(name, root=root, **{**AS_STORED, **settings})


def images_of(made):
    return (torch.cat([batch.images for batch in made]) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------------- 16 bits and floats

DEEP = {
    "png16": (Image.fromarray(GREY.astype(np.uint16) * 257), "png"),
    "tiff16": (Image.fromarray(GREY.astype(np.uint16) * 257), "tif"),
    "pgm16": (Image.fromarray(GREY.astype(np.uint16) * 257), "pgm"),
    "float": (Image.fromarray(GREY.astype(np.float32) / 255), "tif"),
    "int32": (Image.fromarray(GREY.astype(np.int32)), "tif"),
    "8 bits": (Image.fromarray(GREY), "png"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_levels_keep_their_place_between_black_and_white(tmp_path, kind):
    picture, ending = DEEP[kind]
    save(picture, tmp_path / "a" / f"0.{ending}")
    assert images_of(stream(tmp_path))[0].tolist() == [GREY.tolist()] * 3
    if kind == "pgm16":  # of a file only: in memory it is 16 bits like the others
        return

    class Scans(Dataset):
        targets = (0,)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return picture, 0

    assert images_of(tta.stream({"scans": Scans()}))[0].tolist() == [GREY.tolist()] * 3


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_12_bits_in_16_are_told(tmp_path, ending):
    save(Image.fromarray(GREY.astype(np.uint16) * 16), tmp_path / "a" / f"0.{ending}")
    with pytest.warns(UserWarning, match="16-bit picture has no level above 4095.*scale its levels to 16 bits"):
        images = images_of(stream(tmp_path))
    assert images.max() == round(255 * 16 * 255 / 65535)
    save(Image.fromarray(np.zeros((4, 4), np.uint16)), tmp_path / "a" / f"0.{ending}")  # black is black
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(stream(tmp_path))


BEYOND = {
    "float": (GREY.astype(np.float32), r"floating-point numbers from 0 to 255, so that nobody knows which is white"),
    "negative": (GREY.astype(np.float32) / 255 - 0.1, r"floating-point numbers from -0\.1 to 0\.9"),
    "nan": (np.full((4, 4), np.nan, np.float32), r"floating-point numbers from nan to nan"),
    "int32": (GREY.astype(np.int32) * 257, r"32-bit whole numbers from 0 to 65535, so that nobody knows"),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_levels_whose_white_nobody_knows_are_refused_or_skipped(tmp_path, kind):
    levels, message = BEYOND[kind]
    picture = Image.fromarray(levels)
    save(picture, tmp_path / "a" / "0.tif")
    save(Image.fromarray(GREY), tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"a/0\.tif' cannot be used as an image: its levels are " + message):
        list(stream(tmp_path))
    with pytest.warns(UserWarning, match="1 of 2 files"):
        assert stream(tmp_path, on_error="skip").domains[0].skipped == ["a/0.tif"]
    with pytest.raises(ValueError, match="Domain 'scans', sample 0: its levels are " + message):
        list(tta.stream({"scans": [(picture, 0)]}))


@pytest.mark.parametrize(
    ("given", "found"), [("a picture", "str of str"), (np.zeros((4, 4, 3), np.uint16), "uint16"), ({}, "dict")]
)
def test_what_is_no_image_of_a_dataset_is_named(given, found):
    with pytest.raises(ValueError, match=rf"Domain 'mine', sample 0: expected an image .* got .*{found}"):
        list(tta.stream({"mine": [(given, 0)]}))


@pytest.mark.parametrize("top", [255.0, 65535.0])
def test_floating_point_levels_that_were_never_scaled_are_told_once(top):
    images, labels = torch.rand(6, 3, 4, 4) * top, torch.zeros(6, dtype=torch.long)
    for dataset in (TensorDataset(images, labels), [(image, 0) for image in images]):
        with pytest.warns(
            UserWarning, match=r"Domain 'mine', sample 0: floating-point levels from .* 8-bit image.*\[0, 1\]"
        ) as said:
            batches = list(tta.stream({"mine": dataset}, batch_size=2))
        assert len(said) == 1
        assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (images / top, (images / top - 0.45) / 0.22, images - top / 2):
            list(tta.stream({"mine": TensorDataset(fine, labels)}))


def test_corrupted_copies_are_made_of_the_same_levels(tmp_path):
    for name, (picture, ending) in [("deep", DEEP["png16"]), ("plain", DEEP["8 bits"])]:
        save(picture, tmp_path / name / "a" / f"0.{ending}")
        settings = [
            "corruptions=[brightness]",
            "severities=[3]",
            "resize=null",
            "crop=null",
            "quality=null",
            "recipe=cifar",
        ]
        assert main(["corrupt", str(tmp_path / name), str(tmp_path / f"{name}-c"), *settings]) == 0
    deep, plain = (np.asarray(Image.open(tmp_path / f"{name}-c/brightness/3/a/0.png")) for name in ("deep", "plain"))
    assert (deep == plain).all()


# ---------------------------------------------------------------------- EXIF

SHOT = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
STORED = {
    1: SHOT,
    3: np.rot90(SHOT, 2),
    6: np.rot90(SHOT, 1),
    8: np.rot90(SHOT, 3),
    2: SHOT[:, ::-1],
    5: SHOT.transpose(1, 0, 2),
}


def shoot(file, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    save(Image.fromarray(np.ascontiguousarray(STORED[tag])), file, exif=exif)


@pytest.mark.parametrize("tag", STORED)
def test_pictures_are_turned_upright(tmp_path, tag):
    shoot(tmp_path / "a" / "0.png", tag)
    upright = torch.from_numpy(SHOT).permute(2, 0, 1)
    assert torch.equal(images_of(stream(tmp_path))[0], upright)
    stored = torch.from_numpy(STORED[tag].copy()).permute(2, 0, 1)
    assert torch.equal(images_of(stream(tmp_path, exif=False))[0], stored)
    assert torch.equal(catalog.source_images(str(tmp_path))[0][0], upright)
    (corrupted,) = stream(tmp_path, "imagefolder-c", corruptions=["contrast"]).domains
    assert torch.equal(corrupted.clean().images(torch.tensor([0]))[0], upright)


def test_turns_are_told_and_stand_in_the_manifest(tmp_path):
    for number, tag in enumerate([1, 6, 6, 1, 8, 1]):
        shoot(tmp_path / "a" / f"{number}.png", tag)
    made = stream(tmp_path)
    assert made.origins == [f"read from {tmp_path}, turned by EXIF (3 of 6 pictures looked into)"]
    assert made.describe()["domains"][tmp_path.name]["exif"] is True
    left = stream(tmp_path, exif=False)
    assert left.origins == [f"read from {tmp_path}"]
    assert left.describe()["domains"][tmp_path.name]["exif"] is False
    (one,) = stream(tmp_path, "imagefolder-c", corruptions=["contrast"]).origins
    assert "turned by EXIF (3 of 6" in one


def test_a_corrupted_copy_is_upright_and_says_so(tmp_path):
    shoot(tmp_path / "in" / "a" / "0.png", 6)
    settings = {"corruptions": ["contrast"], "severities": [1], "quality": None, **AS_STORED}
    write_corrupted(tmp_path / "in", tmp_path / "out", **settings)
    with Image.open(tmp_path / "out/contrast/1/a/0.png") as made:
        assert made.size == (9, 6)
    manifest = json.loads((tmp_path / "out" / "tta-corrupt.json").read_text())
    assert manifest["how"]["exif"] is True
    with pytest.raises(ValueError, match="was made with exif True, now False"):
        write_corrupted(tmp_path / "in", tmp_path / "out", **settings, exif=False)
    del manifest["how"]["exif"]  # a copy of an earlier version, which turned nothing
    (tmp_path / "out" / "tta-corrupt.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was made with exif False, now True"):
        write_corrupted(tmp_path / "in", tmp_path / "out", **settings)
    assert write_corrupted(tmp_path / "in", tmp_path / "out", **settings, exif=False) == 0
    assert (
        main(
            [
                "corrupt",
                str(tmp_path / "in"),
                str(tmp_path / "cli"),
                "exif=false",
                "corruptions=[contrast]",
                "crop=null",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "cli" / "tta-corrupt.json").read_text())["how"]["exif"] is False


def test_a_dataset_of_turned_pictures_is_taken_as_it_is_and_told_once(tmp_path):
    shoot(tmp_path / "0.png", 6)
    with Image.open(tmp_path / "0.png") as picture:
        picture.load()
    with pytest.warns(UserWarning, match=r"'phone', sample 0: .*EXIF orientation.*exif_transpose") as said:
        images = images_of(tta.stream({"phone": [(picture, 0), (picture, 0)]}))
    assert len(said) == 1
    assert images.shape == (2, 3, 9, 6)


def test_metadata_that_cannot_be_read_is_no_turn(tmp_path):
    save(Image.fromarray(SHOT), tmp_path / "a" / "0.png", exif=b"Exif\0\0MM\0*no metadata")
    assert torch.equal(images_of(stream(tmp_path))[0], torch.from_numpy(SHOT).permute(2, 0, 1))


# ---------------------------------------------------------------------- files that are none


def bomb(file, side=20_000):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def bind(file):
    os.chdir(file.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(file.name)


BAD = {
    "bomb": (bomb, r"z\.png' cannot be used as an image: Image size \(400000000 pixels\) exceeds limit"),
    "dangling link": (
        lambda file: file.symlink_to("/nowhere"),
        r"z\.png' is a link to '/nowhere', which does not exist",
    ),
    "link to itself": (lambda file: file.symlink_to(file.name), r"z\.png' cannot be used as an image: Too many levels"),
    "pipe": (os.mkfifo, r"z\.png' cannot be used as an image: it is a named pipe \(FIFO\), not a file"),
    "link to a pipe": (
        lambda file: (os.mkfifo(file.parent / "p"), file.symlink_to("p")),
        r"z\.png' cannot be used as an image: it is a named pipe",
    ),
    "socket": (bind, r"z\.png' cannot be used as an image: it is a socket, not a file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), r"z\.png' cannot be used as an image: it is a device"),
    "strip": (
        lambda file: Image.new("RGB", (3000, 1)).save(file),
        r"z\.png' cannot be used .*it has 3000 x 1 pixels, one side more than 100 times the other; resized to 256 pixels it "
        r"would have 768000 x 256",
    ),
    "empty": (lambda file: file.write_bytes(b""), r"z\.png' cannot be used .* It has 0 bytes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_used_is_named_or_skipped(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    spoil, message = BAD[kind]
    save(Image.new("RGB", (300, 300)), tmp_path / "cat" / "ok.png")
    spoil(tmp_path / "cat" / "z.png")
    settings = {"resize": 256, "crop": 224, "by_class": True}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(stream(tmp_path, **settings))
    with pytest.warns(UserWarning, match=r"1 of 2 files in .* are skipped: cat/z\.png"):
        made = stream(tmp_path, on_error="skip", **settings)
    assert len(list(made)) == 1
    assert made.describe()["domains"][tmp_path.name]["skipped"] == ["cat/z.png"]
    with pytest.warns(UserWarning, match="1 of 2 files"):
        assert len(catalog.source_images(str(tmp_path), {"input_size": [224, 224]}, on_error="skip")) == 1


def test_the_manifest_does_not_wait_for_a_pipe(tmp_path):
    save(Image.new("RGB", (30, 30)), tmp_path / "cat" / "ok.png")
    os.mkfifo(tmp_path / "cat" / "z.png")
    with pytest.raises(ValueError, match="named pipe"):
        stream(tmp_path).describe()


def test_pillows_warning_of_a_bomb_is_an_error_of_the_file_where_warnings_are(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # a warning from here, an error from twice this
    save(Image.new("RGB", (15, 15)), tmp_path / "cat" / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"a\.png' cannot be used as an image: Image size \(225 pixels\)"):
            list(stream(tmp_path))
    with pytest.warns(Image.DecompressionBombWarning):
        assert len(list(stream(tmp_path))) == 1


def test_long_strips_are_left_alone_where_nothing_is_resized(tmp_path):
    save(Image.new("RGB", (3000, 1)), tmp_path / "a" / "0.png")
    assert images_of(stream(tmp_path)).shape == (1, 3, 1, 3000)
    save(Image.new("RGB", (1000, 10)), tmp_path / "a" / "0.png")  # a panorama
    assert images_of(stream(tmp_path, resize=20)).shape == (1, 3, 20, 2000)


# ---------------------------------------------------------------------- links between folders


def touch(*files):
    for file in files:
        save(Image.new("RGB", (9, 9)), file)


def names(files):
    return sorted(os.fsdecode(name) for name in files.names.tolist())


@pytest.mark.parametrize("target", ["..", ".", "../..", "../cat", "../dog"])
def test_a_link_back_up_or_to_another_class_adds_no_picture(tmp_path, target):
    root = tmp_path / "pets"
    touch(root / "cat" / "a.png", root / "cat" / "deep" / "b.png", root / "dog" / "c.png")
    (root / "cat" / "loop").symlink_to(target)
    assert names(list_images(root, ["cat", "dog"])) == ["cat/a.png", "cat/deep/b.png", "dog/c.png"]


@pytest.mark.parametrize("target", [".", "..", "../pets"])
def test_a_link_back_up_is_no_class(tmp_path, target):
    root = tmp_path / "pets"
    touch(root / "cat" / "a.png", root / "dog" / "c.png")
    (root / "again").symlink_to(target)
    assert subfolders(root) == ["cat", "dog"]
    assert names(list_flat(root)) == ["cat/a.png", "dog/c.png"]


def test_linked_folders_are_searched_once(tmp_path):
    root, store = tmp_path / "pets", tmp_path / "store"
    touch(store / "a.png", store / "inner" / "b.png", root / "dog" / "real" / "c.png")
    (store / "round").symlink_to(store)
    (root / "cat").symlink_to(store)
    (root / "dog" / "alias").symlink_to("real")  # before the folder itself in the alphabet
    (root / "dog" / "more").symlink_to(store)
    (root / "dog" / "same").symlink_to(store / "inner")
    assert names(list_images(root, ["cat", "dog"])) == [
        "cat/a.png",
        "cat/inner/b.png",
        "dog/real/c.png",
        "dog/same/b.png",
    ]
    assert stream(root).samples == 4


# ---------------------------------------------------------------------- folders named by numbers


@pytest.fixture
def numbered(tmp_path):
    """Classes 1 to 11, each with a picture of its own grey level."""
    for number in range(1, 12):
        save(Image.new("RGB", (4, 4), (number,) * 3), tmp_path / "night" / str(number) / "0.png")
    return tmp_path


def label_of_level(made):
    return {
        int(image[0, 0, 0] * 255 + 0.5): int(label)
        for b in made
        for image, label in zip(b.images, b.labels, strict=True)
    }


TEXT = {1: 0, 10: 1, 11: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["imagefolder", "imagefolder-c"])
def test_class_folders_that_are_numbers_need_an_order(numbered, name, nested):
    if name == "imagefolder-c" and nested:
        pytest.skip("imagefolder-c has no domains")
    where = {"root": numbered, "domains": ["night"]} if nested else {"root": numbered / "night"}

    def made(**settings):
        one = tta.stream(name, **AS_STORED, **where, **settings)
        return one.clean() if name == "imagefolder-c" else one

    both = r"11 class folders are numbers.* order 1, 10, 11, 2, 3 and 6 more; as numbers 1, 2, 3, 4, 5 and 6 more.*class_order="
    with pytest.warns(ClassOrderWarning, match=both):
        assert label_of_level(made()) == TEXT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert label_of_level(made(class_order="text")) == TEXT
        assert label_of_level(made(class_order="number")) == {number: number - 1 for number in range(1, 12)}
        mapped = made(class_map={str(number): number for number in range(1, 12)}, mask=False)
        assert label_of_level(mapped) == {number: number for number in range(1, 12)}
    numbers = {name: made(class_order=name).domains[0].index for name in ("text", "number")}
    assert torch.equal(numbers["text"], numbers["number"])  # the images' numbers seed their corruption


def test_source_images_have_the_labels_of_the_stream(numbered):
    with pytest.warns(ClassOrderWarning):
        catalog.source_images(str(numbered / "night"))
    source = catalog.source_images(str(numbered / "night"), class_order="number")
    assert {int(image[0, 0, 0]): label for image, label in (source[n] for n in range(11))} == {
        n: n - 1 for n in range(1, 12)
    }


def test_the_command_line_refuses_what_python_warns_of(numbered, capsys):
    run = [
        "run",
        "imagefolder",
        "source",
        "model=digits-cnn",
        f"stream.root={numbered / 'night'}",
        "stream.resize=null",
        "stream.crop=null",
    ]
    assert main(run) == 2
    assert "1, 10, 11, 2, 3 and 6 more; as numbers 1, 2, 3" in " ".join(capsys.readouterr().err.split())
    assert main([*run, "stream.class_order=alphabet"]) == 2
    assert "class_order is 'text' or 'number'; got 'alphabet'" in " ".join(capsys.readouterr().err.split())


def test_orders_that_agree_and_names_are_not_asked_about(tmp_path):
    for folders in (["0", "1", "9"], ["01", "02", "10"], ["3"], ["a2", "b10"], ["8", "9", "10", "x"]):
        root = tmp_path / "-".join(folders)
        touch(*(root / name / "0.png" for name in folders))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stream(root)
    with pytest.raises(
        ValueError, match=r"class_order='number' is for class folders that are numbers; these are not: 10, 8, 9, x"
    ):
        stream(root.with_name("8-9-10-x"), class_order="number")
    with pytest.raises(ValueError, match="class_map names the output of each folder: leave out class_order='text'"):
        stream(root.with_name("3"), class_map={"3": 0}, class_order="text")


def test_numbers_between_the_same_words_are_numbers(tmp_path):
    touch(*(tmp_path / f"class {number}" / "0.png" for number in (1, 2, 10)))
    with pytest.warns(
        ClassOrderWarning, match=r"order class 1, class 10, class 2; as numbers class 1, class 2, class 10\."
    ):
        stream(tmp_path)
    assert sorted(stream(tmp_path, class_order="number", by_class=True).domains[0].labels.tolist()) == [0, 1, 2]
    assert stream(tmp_path, class_order="number", by_class=True).domains[0].labels.tolist() == [0, 2, 1]
