"""Contact sheets of all corruptions at all severities: docs/corruptions_cifar.jpg, docs/corruptions_imagenet.jpg.

    python benchmarks/contact_sheet.py docs           # half a minute

One row per corruption, one column per severity, the clean image first. The images are cropped from scikit-learn's two
samples: china.jpg by danielbuechele and flower.jpg by vultilion on Flickr, both CC BY 2.0.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from tta.datasets import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt

CELL = {"cifar": 64, "imagenet": 112}  # pixels along a side on the sheet
SIDE = {"cifar": 32, "imagenet": 224}
LABEL = 120


def sample(name: str, side: int) -> torch.Tensor:
    """The middle square of a sample image, uint8 (3, side, side)."""
    picture = Image.fromarray(load_sample_image(name))
    room = (picture.width - picture.height) // 2
    square = picture.crop((room, 0, room + picture.height, picture.height)).resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def sheet(recipe: str) -> Image.Image:
    """All corruptions of both samples, five severities each."""
    cell, names = CELL[recipe], CORRUPTIONS + VALIDATION_CORRUPTIONS
    images = torch.stack([sample(name, SIDE[recipe]) for name in ("china.jpg", "flower.jpg")])
    page = Image.new("RGB", (LABEL + 12 * cell, len(names) * cell), "white")
    write = ImageDraw.Draw(page)
    for row, name in enumerate(names):
        write.text((4, row * cell + cell // 2 - 6), name, fill="black")
        columns = [images, *(corrupt(images, name, severity, recipe=recipe) for severity in range(1, 6))]
        for severity, damaged in enumerate(columns):
            for number, image in enumerate(damaged):
                tile = Image.fromarray(image.permute(1, 2, 0).numpy())
                tile = tile.resize(
                    (cell, cell), Image.Resampling.NEAREST if recipe == "cifar" else Image.Resampling.BOX
                )
                page.paste(tile, (LABEL + (6 * number + severity) * cell, row * cell))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in CELL:
        sheet(recipe).save(folder / f"corruptions_{recipe}.jpg", quality=75)


if __name__ == "__main__":
    main()
