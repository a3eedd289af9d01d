"""Train the embedded source model of digits-mosaic, `digits-maps`, on clean canvases.

    python benchmarks/train_mosaics.py     # about 2 minutes on one core; writes tta/weights/digits_maps.safetensors

Expect a clean held-out mIoU of about 94 %. The same machine gives the same bytes again. None of the benchmark's corruptions
is used.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tta.datasets import digits_mosaic
from tta.models import HALF, ImageClassifier
from tta.models.networks import DigitsFCN
from tta.tasks import SEGMENTATION, confusion, mean_iou

BATCH, LEARNING_RATE = 32, 5e-3


def maps(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of the pixels, enlarged as the adapters do."""
    return SEGMENTATION.read(model(images.float() / 255), images)


def learn(model: nn.Module, images: Tensor, masks: Tensor, epochs: int) -> None:
    """Minimise the cross-entropy of the pixels, void left out."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(maps(model, images[batch]), masks[batch], ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """mIoU on the clean canvases of the stream, in percent."""
    images, masks, _ = digits_mosaic.mosaics("test", digits_mosaic.CANVASES)
    predicted = maps(model, images).argmax(1)
    return mean_iou(confusion(predicted, masks, digits_mosaic.CLASSES).sum(0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(__file__).parents[1] / "tta" / "weights" / "digits_maps.safetensors"
    parser.add_argument("--out", type=Path, default=home)
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that the bytes are always the same
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = ImageClassifier(DigitsFCN(), HALF, HALF, "digits-maps", (digits_mosaic.SIDE, digits_mosaic.SIDE))
    learn(model, *digits_mosaic.source_images().tensors, arguments.epochs)
    state = {key: value for key, value in model.model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, arguments.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"digits-maps: {parameters} parameters, clean held-out mIoU {held_out(model):.2f} %")


if __name__ == "__main__":
    main()
