"""Cost of the methods for vision-language models: time of an image in zero-shot forwards, the shortest of some turns.

Time is the processor's, on one core: on a machine that others use, too, a long call waits oftener than a short one.

    python benchmarks/towers_cost.py                  # the embedded model, 64 views
    python benchmarks/towers_cost.py --size vit-b32   # random towers of the size of CLIP's ViT-B/32, one image

A zero-shot forward is the image alone with the text features of the classes known. The text tower's texts are counted: once a step
for all classes, whatever the number of views.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

import tta
from tta.towers import ImageTower, TextTower, TwoTowers, WordTokenizer, towers_of

DIGITS = "zero one two three four five six seven eight nine"


def of_size(size: str) -> tuple[nn.Module, torch.Tensor]:
    """A model and one image."""
    generator = torch.Generator().manual_seed(0)
    if size == "digits":
        return tta.load_model("digits-clip"), torch.rand(1, 3, 32, 32, generator=generator)
    torch.manual_seed(0)
    image, text = ImageTower(224, 32, 768, 12, 12, 512), TextTower(49408, 77, 512, 12, 8, 512)
    words = WordTokenizer(["<pad>", "a", "photo", "of", ".", *DIGITS.split(), "<start>", "<end>"], 77)
    model = TwoTowers(image, text, words, DIGITS.split())
    return model.eval(), torch.rand(1, 3, 224, 224, generator=generator)


def seconds(run: Callable[[torch.Tensor], object], image: torch.Tensor) -> float:
    """Processor time of one call."""
    start = time.process_time()
    run(image)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["digits", "vit-b32"], default="digits")
    parser.add_argument("--methods", nargs="*", default=tta.list_methods(two_towers=True))
    parser.add_argument("--repeats", type=int, help="default: 20 of the embedded model, 3 of the large one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, image = of_size(arguments.size)
    repeats = arguments.repeats or (20 if arguments.size == "digits" else 3)
    print(
        f"{'method':14s}{'forwards':>10s}{'texts':>8s}   (time of an image in zero-shot forwards; texts read by the text tower)"
    )
    source = tta.adapt(model, "source")
    for method in arguments.methods:
        adapter = tta.adapt(model, method)
        texts = [0]

        def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor, texts: list[int] = texts) -> None:
            texts[0] += len(args[0])

        handle = towers_of(adapter.model, method).text.register_forward_hook(count)
        adapter(image)
        handle.remove()
        source(image)
        times = [(seconds(adapter, image), seconds(source, image)) for _ in range(repeats)]
        ratio = min(ours for ours, _ in times) / min(theirs for _, theirs in times)
        print(f"{method:14s}{ratio:10.1f}{texts[0]:8d}", flush=True)


if __name__ == "__main__":
    main()
