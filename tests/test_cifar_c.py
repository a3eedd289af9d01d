"""``cifar10-c``, ``cifar100-c``, ``cifar10.1``: the published formats, clean images to corrupt, and every kind of bad file."""

import os
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.io import write_png

import tta
from tta.datasets.cifar_c import CLASSES

BLOCK = 10_000


def sparse(file, shape, dtype=np.uint8):
    """A file of zeros that takes no room on the disk."""
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


@pytest.fixture
def published(tmp_path):
    """CIFAR-10-C as published, with two corruptions; the first image of each block holds the block's number."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for name in ("fog", "snow"):
        array = sparse(folder / f"{name}.npy", (5 * BLOCK, 32, 32, 3))
        for severity in range(1, 6):
            array[(severity - 1) * BLOCK, 0, 1, 2] = 40 + severity
    labels = sparse(folder / "labels.npy", (5 * BLOCK,), np.int64)
    labels[:] = np.arange(5 * BLOCK) % BLOCK % 10
    return tmp_path


@pytest.fixture
def image_files(tmp_path, monkeypatch):
    """Clean CIFAR-10 as image files, 4 a class."""
    monkeypatch.setattr("tta.datasets.cifar_c.IMAGES", 40)
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(4):
            image = torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)
            image[0] = label
            write_png(image, str(tmp_path / "test" / name / f"{number:04d}.png"))
    return tmp_path


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("severity", [1, 5])
def test_published_files_are_read_in_blocks_of_severity(published, severity, inside):
    root = published / "CIFAR-10-C" if inside else published
    stream = tta.stream(
        "cifar10-c", root=root, severity=severity, corruptions=["snow", "fog"], samples=30, batch_size=20
    )
    assert [domain.name for domain in stream.domains] == ["snow", "fog"]
    batches = list(stream)
    assert [len(batch.images) for batch in batches] == [20, 10, 20, 10]
    assert batches[2].images.shape == (20, 3, 32, 32)
    assert batches[2].images[0, 2, 0, 1] == pytest.approx((40 + severity) / 255)
    assert batches[2].labels.tolist() == [n % 10 for n in range(20)]
    assert "read from" in stream.origins[0]


def test_published_files_are_memory_mapped_and_whole_by_default(published):
    stream = tta.stream("cifar10-c", root=published, corruptions=["fog"], batch_size=200)
    assert stream.samples == BLOCK
    assert isinstance(stream.domains[0]._block, np.memmap)


def test_content_hash_covers_what_is_used(published):
    def content():
        stream = tta.stream("cifar10-c", root=published, severity=2, corruptions=["fog"], samples=5)
        return stream.describe()["domains"]["fog"]["content"]

    before = content()
    array = np.load(published / "CIFAR-10-C" / "fog.npy", mmap_mode="r+")
    array[BLOCK + 4, 31, 31, 2] += 1
    assert content() != before


def test_published_images_are_there_at_every_severity(published):
    stream = tta.stream("cifar10-c", root=published, corruptions=["snow", "fog"], samples=3, protocol="gradual")
    assert [domain.name for domain in stream.domains][:8] == [f"snow-{s}" for s in (5, 4, 3, 2, 1)] + [
        *("fog-1", "fog-2", "fog-3")
    ]
    for domain, batch in zip(stream.domains, stream, strict=True):
        assert batch.images[0, 2, 0, 1] == pytest.approx((40 + domain.severity) / 255)
        assert batch.labels.tolist() == [0, 1, 2]


def test_clean_images_lie_beside_the_published_ones(published, monkeypatch):
    settings = {"root": published, "corruptions": ["snow", "fog"], "samples": 30, "protocol": "forgetting"}
    with pytest.raises(FileNotFoundError, match=r"No clean CIFAR-10 in .*tta download cifar10 --root"):
        tta.stream("cifar10-c", **settings)
    images, labels = torch.randint(0, 256, (BLOCK, 3, 32, 32), dtype=torch.uint8), torch.arange(BLOCK) % 10
    monkeypatch.setattr(
        "tta.datasets.cifar_c.clean_images", lambda folder, kind: (images, labels, f"clean CIFAR-10 in {folder}")
    )
    stream = tta.stream("cifar10-c", **settings)
    assert [domain.name for domain in stream.domains] == ["snow", "clean", "fog", "clean@2"]
    assert torch.equal(stream[1].images, images[:30])
    assert str(published) in stream.origins[1]
    labels += 1
    with pytest.raises(ValueError, match="the images come in another order"):
        tta.stream("cifar10-c", **settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "fog.npy").unlink(), r"There is no '.*fog\.npy'. That folder holds: snow"),
        (
            lambda folder: os.truncate(folder / "fog.npy", 10**6),
            r"fog\.npy' cannot be read as uint8 \(50000, 32, 32, 3\): it has 1000000 bytes.*153600000.*truncated",
        ),
        (lambda folder: (folder / "fog.npy").write_text("<html>"), r"fog\.npy' cannot be read.*it has 6 bytes"),
        (
            lambda folder: np.save(folder / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8)),
            r"fog\.npy' holds uint8 \(10, 32, 32, 3\); expected uint8 \(50000, 32, 32, 3\)",
        ),
        (lambda folder: sparse(folder / "fog.npy", (50000, 32, 32, 3), np.float32), r"holds float32 \(50000"),
        (
            lambda folder: np.save(folder / "labels.npy", np.zeros(10_000, np.int64)),
            r"labels\.npy' holds int64 \(10000,\); expected integers \(50000,\)",
        ),
    ],
    ids=["missing", "truncated", "html", "shape", "dtype", "labels"],
)
def test_a_bad_file_is_named_with_what_was_found_and_expected(published, spoil, message):
    spoil(published / "CIFAR-10-C")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tta.stream("cifar10-c", root=published, corruptions=["fog"])


def test_absent_data_say_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"download cifar10-c.*download cifar10`.*stream\.root=PATH or the environment variable"
    ):
        tta.stream("cifar10-c", root=tmp_path)
    monkeypatch.setenv("TTA_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        tta.stream("cifar10-c")


def test_corruptions_are_generated_from_image_files(image_files):
    stream = tta.stream(
        "cifar10-c", root=image_files, severity=3, corruptions=["contrast", "fog"], seed=7, batch_size=40
    )
    contrast, fog = list(stream)
    assert "generated by the cifar recipe, severity 3, seed 7, from clean image files" in stream.origins[0]
    assert contrast.labels.bincount().tolist() == [4] * 10
    assert len(set(contrast.labels[:10].tolist())) > 3  # shuffled: the classes do not come one after another
    assert torch.equal(contrast.labels, fog.labels)
    clean = stream.domains[0].stored(torch.arange(40))
    assert torch.equal(clean[:, 0, 0, 0].long(), contrast.labels)
    expected = tta.datasets.corrupt(clean, "fog", severity=3, seed=7)
    assert torch.equal(fog.images, expected.float() / 255)


def test_generated_images_do_not_hang_on_samples_batches_or_workers(image_files):
    def images(num_workers=0, **settings):
        stream = tta.stream("cifar10-c", root=image_files, corruptions=["snow"], **settings)
        return torch.cat([batch.images for batch in stream.loader(num_workers)])

    whole = images(batch_size=40)
    assert torch.equal(images(batch_size=7), whole)
    assert torch.equal(images(batch_size=7, num_workers=2), whole)
    assert torch.equal(images(batch_size=5, samples=13), whole[:13])


def test_what_worker_processes_make_is_kept_for_the_next_run(image_files, monkeypatch):
    stream = tta.stream("cifar10-c", root=image_files, corruptions=["snow"], batch_size=8)
    stream.domains[0].images(torch.tensor([], dtype=torch.int64))
    made = torch.cat([batch.images for batch in stream.loader(2)])
    monkeypatch.setattr("tta.datasets.domains.corrupt", None)  # nothing is left to be made
    assert torch.equal(torch.cat([batch.images for batch in stream.loader()]), made)


def test_unfinished_batches_are_finished_where_the_images_are(image_files):
    stream = tta.stream("cifar10-c", root=image_files, corruptions=["fog", "pixelate"], batch_size=16)
    for whole, begun in zip(stream.loader(), stream.loader(unfinished=True), strict=True):
        assert not torch.equal(whole.images, begun.images)
        assert torch.equal(whole.images, stream.finish(begun).images)


def test_torchvisions_layout_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tta.datasets.cifar_c.IMAGES", 40)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [n % 10 for n in range(40)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for root in (tmp_path, folder):
        domain = tta.stream("cifar10-c", root=root, corruptions=["fog"]).domains[0]
        assert torch.equal(domain.stored(torch.tensor([3]))[0].flatten(), torch.from_numpy(data[3]))
        assert domain.labels[:12].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda test: (test / "cat" / "0001.png").unlink(), "holds 39 images .*expected 40"),
        (lambda test: (test / "zebra").mkdir(), "expected one a class: airplane, automobile"),
        (lambda test: (test / "cat" / "0001.png").write_bytes(b"nothing"), r"cat/0001\.png' is not an image"),
        (
            lambda test: write_png(torch.zeros(3, 16, 32, dtype=torch.uint8), str(test / "cat" / "0001.png")),
            r"cat/0001\.png' is 16 x 32 pixels; expected 32 x 32",
        ),
    ],
    ids=["count", "folder", "no image", "size"],
)
def test_a_bad_image_folder_is_named(image_files, spoil, message):
    spoil(image_files / "test")
    with pytest.raises(ValueError, match=message):
        tta.stream("cifar10-c", root=image_files)


@pytest.mark.parametrize(
    ("settings", "message"), [({"severity": 0}, "severity is 1, 2, 3, 4 or 5; got 0"), ({"samples": 0}, "samples is")]
)
def test_settings_out_of_range_are_named(image_files, settings, message):
    with pytest.raises(ValueError, match=message):
        tta.stream("cifar10-c", root=image_files, **settings)


# ---------------------------------------------------------------------- CIFAR-100-C


def test_cifar100_c_is_read_like_cifar10_c(published):
    (published / "CIFAR-10-C").rename(published / "CIFAR-100-C")
    labels = np.load(published / "CIFAR-100-C" / "labels.npy", mmap_mode="r+")
    labels[:] = np.arange(5 * BLOCK) % BLOCK % 100
    stream = tta.stream("cifar100-c", root=published, severity=2, corruptions=["fog"], samples=150, batch_size=150)
    (batch,) = stream
    assert stream.classes.count == 100
    assert batch.labels.tolist() == [n % 100 for n in range(150)]
    assert batch.images[0, 2, 0, 1] == pytest.approx(42 / 255)
    assert stream.domains[0].at(4).images(torch.tensor([0]))[0, 2, 0, 1] == 44
    with pytest.raises(
        ValueError, match=r"labels\.npy' holds labels from 0 to 99; expected 0 to 9: .* not .* CIFAR-10-C"
    ):
        tta.stream("cifar10-c", root=published / "CIFAR-100-C")
    with pytest.raises(FileNotFoundError, match=r"`tta download cifar100-c`.*`tta download cifar100`"):
        tta.stream("cifar100-c", root=published / "CIFAR-100-C" / "nowhere")


def test_cifar100_is_corrupted_where_only_the_clean_images_are(tmp_path, monkeypatch):
    monkeypatch.setattr("tta.datasets.cifar_c.IMAGES", 40)
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    (folder / "test").write_bytes(pickle.dumps({"data": data, "fine_labels": [n % 100 for n in range(40)]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(n) for n in range(100)]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    (domain,) = tta.stream("cifar100-c", root=tmp_path, corruptions=["fog"]).domains
    assert domain.classes.count == 100
    assert domain.labels.tolist() == list(range(40))
    assert torch.equal(domain.stored(torch.tensor([3]))[0].flatten(), torch.from_numpy(data[3]))


# ---------------------------------------------------------------------- CIFAR-10.1


def write_cifar10_1(folder, version, counts):
    folder.mkdir(exist_ok=True)
    labels = np.repeat(np.arange(10, dtype=np.int32), counts)
    images = sparse(folder / f"cifar10.1_{version}_data.npy", (len(labels), 32, 32, 3))
    images[5, 0, 1, 2] = 77
    np.save(folder / f"cifar10.1_{version}_labels.npy", labels)


@pytest.mark.parametrize(
    ("version", "counts"), [("v6", [200] * 10), ("v4", [208, 212, 202, 212, 204, 218, 192, 210, 161, 202])]
)
@pytest.mark.parametrize("inside", ["", "CIFAR-10.1"])
def test_both_versions_of_cifar10_1(tmp_path, version, counts, inside):
    write_cifar10_1(tmp_path / inside, version, counts)
    stream = tta.stream("cifar10.1", root=tmp_path, version=version, batch_size=100)
    assert [domain.name for domain in stream.domains] == [f"cifar10.1-{version}"]
    assert stream.samples == sum(counts)
    assert stream.classes.count == 10
    assert stream[0].images.dtype == torch.uint8
    assert stream[0].images[5, 2, 0, 1] == 77
    assert torch.cat([stream[n].labels for n in range(len(stream))]).bincount().tolist() == counts
    assert tta.stream("cifar10.1", root=tmp_path, version=version, samples=30).samples == 30


def test_a_bad_cifar10_1_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No CIFAR-10\.1/ or .*cifar10\.1_v6_data\.npy.*github"):
        tta.stream("cifar10.1", root=tmp_path)
    with pytest.raises(ValueError, match="version is 'v4' or 'v6'; got 'v5'"):
        tta.stream("cifar10.1", root=tmp_path, version="v5")
    write_cifar10_1(tmp_path, "v6", [200] * 9 + [199])
    with pytest.raises(ValueError, match=r"v6_data\.npy' holds uint8 \(1999, 32, 32, 3\); expected uint8 \(2000, 32"):
        tta.stream("cifar10.1", root=tmp_path)
    write_cifar10_1(tmp_path, "v6", [201, 199] + [200] * 8)
    with pytest.raises(ValueError, match=r"v6_labels\.npy' counts 201, 199, 200.*expected 200, 200"):
        tta.stream("cifar10.1", root=tmp_path)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.zeros(2021, np.int32))
    with pytest.raises(ValueError, match=r"v6_labels\.npy' holds int32 \(2021,\); expected integers \(2000,\)"):
        tta.stream("cifar10.1", root=tmp_path)
