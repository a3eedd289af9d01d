"""Speed of the corruptions: images/s of each, and milliseconds per image for the fifteen together.

    python benchmarks/corruptions.py                  # 32 px, half a minute on 2 cores
    python benchmarks/corruptions.py --size 224       # a minute

Each number is the best of several runs. Expect at most 1.8 ms per image for the fifteen at 32 px on one core, where the
published generator takes about 29 ms, and about 100 ms at 224 px.
"""

import argparse
import time

import torch

from tta.datasets import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="pixels along a side")
    parser.add_argument("--recipe", choices=["cifar", "imagenet"], help="default: imagenet from 100 px on, else cifar")
    parser.add_argument("--severity", type=int, default=5)
    parser.add_argument("--images", type=int, help="default: a million pixels in all")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    recipe = arguments.recipe or ("imagenet" if arguments.size >= 100 else "cifar")
    count = arguments.images or max(1, 2**20 // arguments.size**2)
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (arguments.size,) * 2, mode="bilinear")
    images = (smooth * 255).to(torch.uint8)

    best = {}
    for name in CORRUPTIONS + VALIDATION_CORRUPTIONS:
        corrupt(images[:1], name, arguments.severity, recipe=recipe)  # creates tables and textures, which are cached
        times = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            corrupt(images, name, arguments.severity, recipe=recipe)
            times.append(time.perf_counter() - start)
        best[name] = min(times) / count
        print(f"{name:<18} {1 / best[name]:9.0f} images/s {best[name] * 1e3:8.3f} ms", flush=True)
    total = sum(best[name] for name in CORRUPTIONS) * 1e3
    print(
        f"the fifteen: {total:.2f} ms per image ({arguments.size} px, {recipe}, severity {arguments.severity}, "
        f"{count} images, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
