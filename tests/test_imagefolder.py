"""``imagefolder`` and ``imagefolder-c``: folders of any user, their classes, and every kind of bad file."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

import tta
from tta.datasets import catalog
from tta.datasets.geometry import Geometry
from tta.datasets.imagenet_classes import WNIDS
from tta.engine import OnlineModule
from tta.labels import UNKNOWN

PUBLISHED = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])


def write(file, size=(300, 280), seed=0, mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size).convert(mode).save(file)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 4, 3 and 2 pictures of many sizes, among what else lies about in a folder."""
    root = tmp_path / "pets"
    for label, (name, count) in enumerate({"bird": 4, "cat": 3, "dog": 2}.items()):
        for number in range(count):
            write(root / name / f"{number}.jpg", (300 + 9 * number, 280 - 7 * label), 10 * label + number)
    (root / "cat" / "notes.txt").write_text("not a picture")
    (root / ".cache").mkdir()
    (root / "README").write_text("")
    return root


def stream(folder, name="imagefolder", **settings):
    return tta.stream(name, root=folder, **settings)


def test_images_are_those_of_torchvisions_folder_and_transforms(folder):
    batches = list(stream(folder, batch_size=4))
    assert [len(batch.images) for batch in batches] == [4, 4, 1]
    (folder / ".cache").rmdir()  # a class to torchvision
    reference = ImageFolder(folder, PUBLISHED)
    for batch in batches:
        for image, label, index in zip(batch.images, batch.labels, batch.index, strict=True):
            expected, target = reference[int(index)]
            assert label == target
            assert torch.equal(image, expected / 255)


def test_images_stay_uint8_until_the_device_and_workers_change_nothing(folder):
    one = stream(folder, batch_size=4)
    stored = list(one.loader())
    assert all(batch.images.dtype == torch.uint8 for batch in stored)
    for here, there in zip(stored, one.loader(2), strict=True):
        assert torch.equal(here.images, there.images)


def test_the_order_is_always_the_same_and_not_that_of_the_classes(folder):
    index = stream(folder).domains[0].index
    assert index.tolist() == stream(folder, seed=3).domains[0].index.tolist() != list(range(9))
    by_class = stream(folder, by_class=True).domains[0]
    assert by_class.index.tolist() == list(range(9))
    assert by_class.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert stream(folder, samples=4).domains[0].index.tolist() == index.tolist()[:4]


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_become_rgb(tmp_path, kind):
    write(tmp_path / "a" / f"0.{'jpg' if kind in ('L', 'CMYK') else 'png'}", mode=kind)
    (batch,) = stream(tmp_path)
    assert batch.images.shape == (1, 3, 224, 224)


def test_geometry_is_told_and_checked(folder):
    (domain,) = stream(folder, resize=64, crop=48).domains
    assert domain.images(torch.tensor([0, 5])).shape == (2, 3, 48, 48)
    assert domain.describe()["geometry"] == "shorter side to 64, middle 48 x 48"
    (squashed,) = stream(folder, resize=64, crop=None, squash=True).domains
    assert squashed.images(torch.tensor([1])).shape == (1, 3, 64, 64)
    assert str(Geometry()) == "as stored"
    for settings, message in [
        ({"resize": 200}, r"crop=224 does not fit into images resized to 200"),
        ({"resize": -1}, "resize is a number of pixels"),
        ({"resize": None, "squash": True}, "squash=true needs resize"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(folder, **settings)
    with pytest.raises(ValueError, match=r"pixels, '.*' has .* say resize= and crop="):
        list(stream(folder, resize=None, crop=None))
    with pytest.raises(ValueError, match=r"has 3\d\d x 2\d\d pixels, crop=290 needs more"):
        list(stream(folder, resize=None, crop=290))


def test_the_interpolation_is_chosen_and_told(folder):
    made = stream(folder, interpolation="bicubic", batch_size=9)
    (folder / ".cache").rmdir()  # a class to torchvision
    bicubic = transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC)
    reference = ImageFolder(folder, transforms.Compose([bicubic, *PUBLISHED.transforms[1:]]))
    for image, index in zip(next(iter(made)).images, made.domains[0].index, strict=True):
        assert torch.equal(image, reference[int(index)][0] / 255)
    assert made.domains[0].describe()["geometry"] == "shorter side to 256 (bicubic), middle 224 x 224"
    with pytest.raises(ValueError, match=r"interpolation is one of .*bicubic.*; got 'cubic'"):
        stream(folder, interpolation="cubic")


@pytest.mark.parametrize("name", ["imagefolder", "imagefolder-c"])
def test_pictures_that_are_cropped_already_are_not_enlarged_unnoticed(tmp_path, name, recwarn):
    write(tmp_path / "a" / "0.jpg", (224, 224))
    with pytest.warns(UserWarning, match=r"224 x 224 pixels and look cropped already.*resize=null crop=null"):
        stream(tmp_path, name)
    recwarn.clear()
    stream(tmp_path, name, resize=None, crop=None)
    stream(tmp_path, name, resize=224)
    write(tmp_path / "a" / "0.jpg", (224, 225))
    stream(tmp_path, name)
    assert not recwarn.list


def test_source_images_of_a_folder_are_what_the_weights_expect(tmp_path):
    write(tmp_path / "a" / "0.png", (300, 250))
    picture = Image.open(tmp_path / "a" / "0.png")

    def source(**preprocessing):
        return catalog.source_images(str(tmp_path), {"input_size": [64, 64], **preprocessing})[0][0]

    bicubic = transforms.Resize(73, interpolation=transforms.InterpolationMode.BICUBIC)(picture)
    cropped = transforms.functional.pil_to_tensor(transforms.CenterCrop(64)(bicubic))
    assert torch.equal(source(resize=73, interpolation="bicubic", crop="center"), cropped)
    assert torch.equal(source(interpolation="bicubic"), cropped)  # 8/7 of the input, where nobody says
    assert not torch.equal(source(resize=73), cropped)
    squashed = transforms.functional.pil_to_tensor(transforms.Resize((64, 64))(picture))
    assert torch.equal(source(resize=64, crop="squash"), squashed)
    assert catalog.source_images(str(tmp_path))[0][0].shape == (3, 250, 300)


def test_domains_are_folders_with_the_same_classes(folder, tmp_path):
    both = tmp_path / "all"
    for name in ("night", "rain"):
        for label in ("cat", "dog"):
            write(both / name / label / "0.jpg")
    made = stream(both, domains=["rain", "night"])
    assert [domain.name for domain in made.domains] == ["rain", "night"]
    assert made.classes.count == 2
    with pytest.raises(ValueError, match=r"two folders deep.*domains=\[night, rain\]"):
        stream(both)
    with pytest.raises(FileNotFoundError, match=r"no folder '.*fog'.*holds night, rain"):
        stream(both, domains=["night", "fog"])
    write(both / "rain" / "cow" / "0.jpg")
    with pytest.raises(ValueError, match=r"rain' has 3 class folders; expected 2\. Unknown: cow"):
        stream(both, domains=["night", "rain"])


def test_a_folder_without_labels_is_predicted_and_not_scored(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.png", seed=number)
    with pytest.raises(FileNotFoundError, match=r"holds no class folders.*labels=false"):
        stream(tmp_path)
    flat = stream(tmp_path, labels=False)
    assert [batch.labels.tolist() for batch in flat] == [[UNKNOWN] * 3]
    flat.check_logits(7)  # any model will do


# ---------------------------------------------------------------------- reading ahead


def test_workers_change_no_bit_of_what_is_learned(folder, cnn, device):
    def learned(num_workers):
        classes = {"bird": 0, "cat": 1, "dog": 2}
        made = stream(
            folder,
            "imagefolder-c",
            corruptions=["contrast", "spatter"],
            resize=36,
            crop=32,
            batch_size=4,
            class_map=classes,
            mask=False,
        )
        adapter = tta.adapt(cnn, "tent", lr=0.1)
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        tta.evaluate(adapter, made, progress=False, accelerator=accelerator, num_workers=num_workers)
        return adapter.state_dict()

    one, two = learned(0), learned(2)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned(folder):
    batches = list(stream(folder, batch_size=4).loader(2, pin_memory=True))
    assert all(batch.images.is_pinned() and batch.images.dtype == torch.uint8 for batch in batches)


RESIDENT = """
import multiprocessing, os, sys
from pathlib import Path
import tta
from tta.datasets.files import FileImages
from tta.datasets.geometry import Geometry
from tta.datasets.stream import Stream

def resident():
    processes = ["self", *(child.pid for child in multiprocessing.active_children())]
    pages = [int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

root = Path(sys.argv[1])
files = tta.stream("imagefolder", root=root, resize=None, crop=None).domains[0].files
domains = [FileImages(str(n), root, files, Geometry()) for n in range(15)]
print(*(resident() for _ in Stream("many", domains, batch_size=50).loader(1)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_many_files(tmp_path):
    """4 500 pictures that would take 220 MB: after the first fifth, no more than a tenth of that is added, worker included.

    In a process of its own: a worker forked from a process that already holds gigabytes copies pages of it as it runs. Its
    allocator gives every freed block back, else it may keep 50 MB of them: -2 to 0 MB are added so, 130 with a copy kept.
    """
    write(tmp_path / "a" / "0.jpg", (128, 128))
    for number in range(1, 300):
        os.link(tmp_path / "a" / "0.jpg", tmp_path / "a" / f"{number}.jpg")
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "32768"}
    command = [sys.executable, "-c", RESIDENT, tmp_path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | allocator)
    sizes = [float(size) for size in done.stdout.split()]
    assert len(sizes) == 90
    # The least of the last fifth: another process may take memory for a moment.
    assert min(sizes[-18:]) - sizes[18] < 22


# ---------------------------------------------------------------------- bad files


def break_files(folder):
    good = (folder / "cat" / "1.jpg").read_bytes()
    (folder / "cat" / "1.jpg").write_bytes(good[: len(good) // 2])
    (folder / "dog" / "0.jpg").write_text("<html>404</html>")


def test_a_broken_picture_is_named_when_it_comes(folder):
    break_files(folder)
    with pytest.raises(ValueError, match=r"(cat/1|dog/0)\.jpg' cannot be used as an image: .* bytes.*on_error=skip"):
        list(stream(folder))
    with pytest.raises(ValueError, match="on_error is 'raise' or 'skip'; got 'ignore'"):
        stream(folder, on_error="ignore")


def test_broken_pictures_are_skipped_counted_and_told(folder):
    whole = stream(folder)
    images = {int(i): image for batch in whole for i, image in zip(batch.index, batch.images, strict=True)}
    break_files(folder)
    with pytest.warns(UserWarning, match=r"2 of 9 files in .* are skipped: (cat/1|dog/0)\.jpg, (cat/1|dog/0)\.jpg"):
        rest = stream(folder, on_error="skip", batch_size=3)
    assert rest.samples == 7
    assert sorted(rest.domains[0].index.tolist()) == [0, 1, 2, 3, 4, 6, 8]  # numbers stay: the draws hang on them
    for batch in rest:
        assert all(torch.equal(images[int(i)], image) for i, image in zip(batch.index, batch.images, strict=True))
    assert sorted(rest.describe()["domains"]["pets"]["skipped"]) == ["cat/1.jpg", "dog/0.jpg"]
    assert "without 2 files" in rest.origins[0]


def test_a_file_that_vanishes_is_named(folder):
    made = stream(folder)
    (folder / "cat" / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no '.*cat/2\.jpg' \(any more\)"):
        list(made)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "empty").mkdir(), r"empty' holds no image \(\.jpg"),
        (lambda folder: folder.rename(folder.with_name("moved")), r"There is no folder '.*pets'.*stream\.root=PATH or"),
    ],
    ids=["empty class", "no folder"],
)
def test_absent_images_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(FileNotFoundError, match=message):
        stream(folder)


def test_the_manifest_hash_covers_names_sizes_and_bytes(folder):
    def content():
        return stream(folder).describe()["domains"]["pets"]["content"]

    before = content()
    assert content() == before
    file = folder / "dog" / "1.jpg"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    changed = content()
    assert changed != before
    file.rename(file.with_name("9.jpg"))
    assert content() not in (before, changed)


# ---------------------------------------------------------------------- classes


class Logits(torch.nn.Module):
    """As many logits as asked for."""

    def __init__(self, count):
        super().__init__()
        self.head = torch.nn.Linear(3, count)

    def forward(self, images):
        return self.head(images.mean((2, 3)))


def errors(model, made):
    return tta.evaluate(tta.adapt(model, "source"), made, progress=False, accelerator="cpu")


def test_a_model_of_other_classes_is_an_error(folder):
    errors(Logits(3), stream(folder))
    with pytest.raises(ValueError, match="Stream 'imagefolder' has 3 classes; the model gives 5 logits"):
        errors(Logits(5), stream(folder))
    (folder / ".cache").rmdir()
    with pytest.raises(ValueError, match=r"has the label 2; the model gives 2 logits"):
        errors(Logits(2), tta.stream({"own": ImageFolder(folder, PUBLISHED)}))


def test_a_class_map_selects_outputs_of_the_model(folder, tmp_path):
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"bird": 7, "cat": 2, "dog": 2, "cow": 0}))
    made = stream(folder, class_map=str(file), by_class=True)
    assert made.classes == (2, (2, 7), None)
    assert made.domains[0].labels.tolist() == [1] * 4 + [0] * 5
    assert made.describe()["classes"]["logits"] == (2, 7)
    with pytest.raises(ValueError, match=r"2 classes; the model gives 9 logits\. They are 2 of.*select_logits\(stream"):
        errors(Logits(9), made)
    open_world = stream(folder, class_map={"bird": 7, "cat": None, "dog": 2}, mask=False, by_class=True)
    assert open_world.domains[0].labels.tolist() == [7] * 4 + [UNKNOWN] * 3 + [2] * 2
    assert sum(row.samples for row in errors(Logits(9), open_world).rows) == 6
    with pytest.raises(ValueError, match=r"label 7; the model gives 7 logits"):
        errors(Logits(7), open_world)
    with pytest.raises(ValueError, match=r"does not name 1 of the 3 class folders: dog\. Give each"):
        stream(folder, class_map={"bird": 7, "cat": 1})
    with pytest.raises(FileNotFoundError, match=r"no class_map 'none\.json'\. It is 'imagenet'"):
        stream(folder, class_map="none.json")
    file.write_text("<html>")
    with pytest.raises(ValueError, match=r"map\.json' is no JSON file: Expecting value"):
        stream(folder, class_map=str(file))
    with pytest.raises(ValueError, match="class_map is 'imagenet', or maps folder names"):
        stream(folder, class_map={"bird": "seven", "cat": 1, "dog": 2})


def test_folders_of_wordnet_ids_select_imagenets_outputs(folder):
    for name, number in {"bird": 10, "cat": 281, "dog": 151}.items():
        (folder / name).rename(folder / WNIDS[number])
    made = stream(folder, class_map="imagenet", by_class=True)
    assert made.classes == (3, (10, 151, 281), 1000)
    assert made.domains[0].labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert stream(folder, class_map="imagenet", mask=False).classes == (1000, None, None)


def test_an_online_module_of_ones_own_loader_checks_nothing():
    assert OnlineModule(tta.adapt(Logits(3), "source")).check_logits is None


# ---------------------------------------------------------------------- corrupted on the fly


def test_corruptions_are_made_from_the_cropped_image(folder):
    made = stream(folder, "imagefolder-c", severity=3, corruptions=["contrast", "spatter"], seed=5, batch_size=9)
    (clean,) = stream(folder, batch_size=9)
    for batch, name in zip(made, ("contrast", "spatter"), strict=True):
        stored = (clean.images * 255).round().to(torch.uint8)
        expected = tta.datasets.corrupt(stored, name, severity=3, seed=5, recipe="imagenet", index=clean.index)
        assert torch.equal(batch.images, expected / 255)
    told = made.describe()["domains"]["spatter"]
    assert told["generated"] == {"severity": 3, "seed": 5, "recipe": "imagenet"}
    assert told["geometry"] == "shorter side to 256, middle 224 x 224"
    assert "generated by the imagenet recipe, severity 3, seed 5, from files read from" in made.origins[0]


def test_unfinished_batches_are_finished_where_the_images_are(folder):
    made = stream(folder, "imagefolder-c", corruptions=["contrast", "saturate"], batch_size=5)
    for whole, begun in zip(made.loader(), made.loader(unfinished=True), strict=True):
        assert not torch.equal(whole.images, begun.images)
        assert torch.equal(whole.images, made.finish(begun).images)


def test_severities_and_clean_images_are_there(folder):
    gradual = stream(folder, "imagefolder-c", severity=2, corruptions=["contrast"], protocol="gradual")
    assert [domain.name for domain in gradual.domains] == ["contrast-2", "contrast-1"]
    forgetting = stream(folder, "imagefolder-c", corruptions=["contrast"], protocol="forgetting", batch_size=9)
    assert [domain.name for domain in forgetting.domains] == ["contrast", "clean"]
    assert torch.equal(list(forgetting)[1].images, next(iter(stream(folder, batch_size=9))).images)


def test_what_there_is_not_is_refused_before_an_image_is_read(folder):
    for settings, message in [
        ({"corruptions": ["fogg"]}, "Did you mean 'fog'"),
        ({"severity": 6}, r"severity is 0 \(none\) to 5, in steps of 0.25; got 6"),
        ({"recipe": "imagenette"}, "No recipe"),
        ({"samples": 10}, "samples is between 1 and 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(folder, "imagefolder-c", **settings)
