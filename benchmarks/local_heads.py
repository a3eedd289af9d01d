"""Local heads against the global head and the votes of the neighbours, by the size of the model: docs/reproduce/ttt_head.md.

    python benchmarks/local_heads.py digits                                        # 2 minutes on one core
    python benchmarks/local_heads.py cifar --root data --checkpoint resnet20.safetensors

``digits`` trains CNNs of several widths on the clean digits of digits-c. ``cifar`` takes the features of one ResNet-20
(64 numbers) for CIFAR-10 images in folders ``train/CLASS`` and ``test/CLASS``, and makes the model smaller by keeping their
first principal components: a new global head is trained on those. Both are scored on clean and on corrupted test images.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import tta
from tta import taps
from tta.datasets import catalog, digits

WIDTHS = {"digits": (4, 8, 16), "cifar": (2, 4, 8, 64)}
CORRUPTION, SEVERITY = "gaussian_noise", 3
METHODS = {
    "global": ("source", {}),
    "local": ("ttt_head", {}),
    "votes": ("ttt_head", {"local": "votes"}),
    "local, 200 neighbours, 200 steps": ("ttt_head", {"neighbours": 200, "steps": 200}),
}


class Case(NamedTuple):
    """A model, labelled source images, and test images by domain."""

    model: nn.Module
    source: Dataset
    test: dict[str, TensorDataset]
    clean_train_error: float


def smaller_cnn(width: int) -> nn.Module:
    """Two convolutions and a linear head on 16 * width features, for digits of 32 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10),
    )  # fmt: skip


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 60) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def digits_cases() -> Iterator[tuple[int, Case]]:
    images, labels, _ = digits.split("train")
    test, truth, index = digits.split("test")
    shifted = tta.datasets.corrupt(test, CORRUPTION, severity=SEVERITY, index=index)
    domains = {name: TensorDataset(x.float() / 255, truth) for name, x in (("clean", test), (CORRUPTION, shifted))}
    images = images.float() / 255
    for width in WIDTHS["digits"]:
        torch.manual_seed(0)
        model = trained(smaller_cnn(width), images, labels)
        yield 16 * width, Case(model, TensorDataset(images, labels), domains, error(model, images, labels))


@torch.no_grad()
def features(model: nn.Module, data: Dataset, corrupted: bool = False) -> tuple[Tensor, Tensor]:
    """Features (images, width, 1, 1), which a model of one linear layer takes as images, and labels."""
    head, found = taps.head(model), []
    for images, labels in track(DataLoader(data, 250), "features", transient=True):
        if corrupted:
            offset = sum(len(y) for _, y in found)
            index = torch.arange(offset, offset + len(images))
            pixels = (images * 255).round().byte() if images.is_floating_point() else images
            images = tta.datasets.corrupt(pixels, CORRUPTION, severity=SEVERITY, index=index)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        found.append((taps.look(model, head, images)[0], labels))
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x[:, None, None], y


def cifar_cases(root: Path, checkpoint: Path, train_images: int, test_images: int) -> Iterator[tuple[int, Case]]:
    model = tta.load_model("cifar-resnet20", checkpoint=checkpoint).eval()
    train, test = (
        Subset(data, range(min(len(data), count)))
        for data, count in (
            (catalog.source_images(str(root / "train")), train_images),
            (catalog.source_images(str(root / "test")), test_images),
        )
    )
    known, labels = features(model, train)
    domains = {"clean": features(model, test), CORRUPTION: features(model, test, corrupted=True)}
    flat = known.flatten(1)
    _, _, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for width in WIDTHS["cifar"]:
        basis = directions[:width]
        head = LogisticRegression(C=10.0, max_iter=1000).fit((flat - flat.mean(0)) @ basis.T, labels)
        small = nn.Sequential(nn.Flatten(), nn.Linear(flat.shape[1], width), nn.Linear(width, 10))
        values = (basis, -basis @ flat.mean(0), torch.tensor(head.coef_), torch.tensor(head.intercept_))
        for parameter, value in zip(small.parameters(), values, strict=True):
            parameter.data.copy_(value)
        data = {name: TensorDataset(*domain) for name, domain in domains.items()}
        yield width, Case(small.eval(), TensorDataset(known, labels), data, error(small, known, labels))


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(1) != labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=WIDTHS)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--checkpoint", type=Path, default=Path("resnet20.safetensors"))
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=1_000)
    arguments = parser.parse_args()
    sizes = (arguments.train_images, arguments.test_images)
    cases = digits_cases() if arguments.data == "digits" else cifar_cases(arguments.root, arguments.checkpoint, *sizes)
    chosen = dict(METHODS)
    if arguments.data == "cifar":
        chosen.popitem()  # more neighbours and steps cost ten times as much as the others
    table = Table("features", "images", "global, on its training images", *chosen, title="error, %")
    for width, case in cases:
        found = {name: tta.adapt(case.model, m, source=case.source, **given) for name, (m, given) in chosen.items()}
        stream = tta.stream(case.test, batch_size=100)
        errors = {name: tta.evaluate(adapter, stream, progress=False).errors for name, adapter in found.items()}
        for domain in case.test:
            cells = [f"{errors[name][domain]:.1f}" for name in chosen]
            table.add_row(str(width), domain, f"{case.clean_train_error:.1f}", *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
