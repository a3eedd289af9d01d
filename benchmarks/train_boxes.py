"""Train the embedded source model of digits-boxes, `digits-ssd`, on clean canvases.

    python benchmarks/train_boxes.py     # about 5 minutes on one core; writes tta/weights/digits_ssd.safetensors

The same machine gives the same bytes again. None of the benchmark's corruptions is used.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import tta
from tta.datasets import digits_boxes
from tta.models import HALF, ImageClassifier
from tta.models.networks import digits_ssd

BATCH, LEARNING_RATE = 32, 5e-3


def learn(model: ImageClassifier, source: digits_boxes.SourceBoxes, epochs: int) -> None:
    """Minimise the detector's own loss, of classes and of places."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    steps = epochs * -(-len(source) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(source), generator=generator).split(BATCH):
            images, boxes = zip(*(source[int(position)] for position in batch), strict=True)
            pictures = (torch.stack(images) / 255 - model.mean) / model.std
            loss = torch.stack(list(model.model(list(pictures), list(boxes)).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def held_out(model: nn.Module) -> float:
    """mAP@50 on the clean canvases of the stream, in percent."""
    clean = tta.stream("digits-boxes", corruptions=["gaussian_noise"], batch_size=32).clean()
    return tta.evaluate(tta.adapt(model, "source"), clean, progress=False).score.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(__file__).parents[1] / "tta" / "weights" / "digits_ssd.safetensors"
    parser.add_argument("--out", type=Path, default=home)
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that the bytes are always the same
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = ImageClassifier(digits_ssd(), HALF, HALF, "digits-ssd", (64, 64))
    learn(model, digits_boxes.source_images(), arguments.epochs)
    state = {key: value for key, value in model.model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, arguments.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"digits-ssd: {parameters} parameters, clean held-out mAP@50 {held_out(model):.2f} %")


if __name__ == "__main__":
    main()
