"""The generated corruptions cost a trained model what the published ones do.

Needs CIFAR-10 as JPEG files and a ResNet-20 trained on them: the folder that TTA_TEST_DATA names, else ``shared/data``
beside the repository. All images and severities, as a table:

    python tests/test_source_errors.py                # half an hour on 2 cores
"""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tta
from tta.datasets import CORRUPTIONS, corrupt

pytestmark = [
    pytest.mark.slow,
    # torchvision announces the move of its codecs to TorchCodec, which the oldest supported release does not know
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning"),
]

DATA = Path(os.environ.get("TTA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
IMAGES, WEIGHTS = DATA / "cifar10_jpeg_test.tar.gz", DATA / "cifar10_resnet20.safetensors"

# Errors, %, under the published generator: all 10 000 images at severity 5, and the mean over the fifteen by severity.
PUBLISHED = {
    "gaussian_noise": 47.8,
    "shot_noise": 45.0,
    "impulse_noise": 58.0,
    "defocus_blur": 37.3,
    "glass_blur": 45.1,
    "motion_blur": 40.7,
    "zoom_blur": 35.3,
    "snow": 27.7,
    "frost": 30.7,
    "fog": 43.3,
    "brightness": 19.5,
    "contrast": 76.8,
    "elastic_transform": 31.5,
    "pixelate": 42.3,
    "jpeg_compression": 17.2,
}
PUBLISHED_MEANS = {1: 15.3, 2: 18.8, 3: 24.1, 4: 30.8, 5: 39.9}
CLEAN = 11.25


def source_model() -> nn.Module:
    return tta.load_model("cifar-resnet20", checkpoint=WEIGHTS).requires_grad_(False)


def jpeg_images() -> tuple[Tensor, Tensor]:
    """uint8 (10000, 3, 32, 32) and labels, sorted by file name: class by class."""
    with tarfile.open(IMAGES) as archive:
        files = sorted((member for member in archive if member.name.endswith(".jpg")), key=lambda member: member.name)
        pictures = [np.array(Image.open(io.BytesIO(archive.extractfile(file).read()))) for file in files]  # type: ignore[union-attr]
    folders = [Path(file.name).parent.name for file in files]
    classes = sorted(set(folders))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([classes.index(folder) for folder in folders])


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    # 50 at a time stay in cache: a fifth faster than 200
    wrong = sum(
        int((model(x.float() / 255).argmax(1) != y).sum())
        for x, y in zip(images.split(50), labels.split(50), strict=True)
    )
    return 100 * wrong / len(labels)


def errors(
    model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, severity: int, names: Iterable[str] = CORRUPTIONS
) -> dict[str, float]:
    return {name: error(model, corrupt(images, name, severity, index=index), labels) for name in names}


@pytest.fixture(scope="module")
def cifar() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model and every fifth image, 200 of each class: images, labels, numbers."""
    missing = [file.name for file in (IMAGES, WEIGHTS) if not file.exists()]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} in '{DATA}'; TTA_TEST_DATA names another folder")
    images, labels = jpeg_images()
    index = torch.arange(0, 10_000, 5)
    return source_model(), images[index], labels[index], index


def test_severity_5_costs_what_the_published_corruptions_cost(cifar: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    measured = errors(*cifar, severity=5)
    far = {name: (value, PUBLISHED[name]) for name, value in measured.items() if abs(value - PUBLISHED[name]) > 3}
    assert not far
    assert abs(sum(measured.values()) / 15 - PUBLISHED_MEANS[5]) < 2.5


# Mean grey level and PSNR in dB of the released make_cifar_c.py with its photographs: every 250th image by name, 8 draws.
FROST = {1: (150.4, 18.24), 2: (165.9, 14.70), 3: (167.9, 14.27), 4: (166.1, 14.48), 5: (162.8, 14.83)}


@pytest.mark.parametrize("severity", FROST)
def test_frost_is_as_strong_as_the_published_photographs(
    cifar: tuple[nn.Module, Tensor, Tensor, Tensor], severity: int
) -> None:
    images = cifar[1][::50].repeat(
        100, 1, 1, 1
    )  # 4000 draws: a standard error of .06 dB; of the published, .2 dB and .9
    frozen = corrupt(images, "frost", severity, seed=1).double()
    psnr = 10 * torch.log10(255**2 / (frozen - images).square().mean((1, 2, 3)))
    assert frozen.mean().item() == pytest.approx(FROST[severity][0], abs=3)
    assert psnr.mean().item() == pytest.approx(FROST[severity][1], abs=0.5)


@pytest.mark.parametrize("severity", [1, 2, 3, 4])
def test_the_mean_grows_with_severity_as_published(
    cifar: tuple[nn.Module, Tensor, Tensor, Tensor], severity: int
) -> None:
    model, images, labels, index = cifar
    measured = errors(model, images[::4], labels[::4], index[::4], severity)
    assert abs(sum(measured.values()) / 15 - PUBLISHED_MEANS[severity]) < 2.5


def main() -> None:
    model, (images, labels) = source_model(), jpeg_images()
    index = torch.arange(len(images))
    print(f"clean {error(model, images, labels):.2f}, published {CLEAN}")
    for severity in (5, 1, 2, 3, 4):
        measured = {}
        for name in CORRUPTIONS:
            measured.update(errors(model, images, labels, index, severity, [name]))
            beside = f" published {PUBLISHED[name]:5.1f}" if severity == 5 else ""
            print(f"severity {severity} {name:<18} {measured[name]:5.2f}{beside}", flush=True)
        print(
            f"severity {severity} mean {sum(measured.values()) / 15:.2f}, published {PUBLISHED_MEANS[severity]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
