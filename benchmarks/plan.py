"""Plan a large benchmark: hours of each method, of all together, and until the last cell ends on so many workers.

    python benchmarks/plan.py --model timm:resnet50 --images 750000 --seeds 3 --workers 32
    python benchmarks/plan.py --model timm:resnet50 --device cuda --batch-size 64 --images 750000 --seeds 3 --workers 32
    python benchmarks/plan.py --pilot runs/pilot --images 750000 --seeds 3 --workers 32

Two sources of the cost of an image, and the table says for each method which one it was:

* *measured*: images a second in the results of a small run of the same benchmark, on one worker of the cluster (``--pilot``);
* *extrapolated*: a forward and tent's step of the model are measured here, on random images. Their difference is the cost of a
  backward pass, and every other method costs its forwards and backward passes an image, as counted for docs/methods.md on
  the digits. Losses, views, filters and memories are not in it; ``--check`` measures some methods beside their extrapolation.

Hours are those of adapting and predicting alone: reading of images where it is slower, recording of source statistics, training
of parts that a method brings along, and starting a cell come on top. One thread is timed by its own processor time.
"""

import argparse
import heapq
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from speed import BATCH_SIZE, seconds  # beside this file

import tta
from tta import config
from tta.allocator import keep_freed_memory
from tta.results import Result


class Cost(NamedTuple):
    """Seconds an image, and whether they were measured."""

    seconds: float
    measured: bool


def median(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of the rounds after one that warms up."""
    return statistics.median([seconds(call, device) for _ in range(rounds + 1)][1:])


def classifiers() -> list[str]:
    """Methods that classify with one model."""
    return tta.list_methods(task="classification", two_towers=False)


def passes(method: str) -> tuple[float, float]:
    """Forwards and backward passes an image, as counted in configs/methods.yaml."""
    facts = config.load(".", "methods")[method]
    return facts["forwards"], facts["backwards"]


def extrapolated(method: str, forward: float, backward: float) -> float:
    """Seconds an image of the passes of a method, from the seconds of one of each."""
    forwards, backwards = passes(method)
    return forwards * forward + backwards * backward


def supported(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """The methods whose kinds of models, by configs/methods.yaml, include that of this one."""
    kinds = [type(layer).__name__ for layer in model.modules()]
    family = next((kind for kind in ("BatchNorm", "GroupNorm") if any(kind in name for name in kinds)), "ViT")
    return [name for name in names if family in config.load(".", "methods")[name]["models"]]


def from_model(arguments: argparse.Namespace) -> dict[str, Cost]:
    """Costs by the passes of each method that takes the model; a forward and tent's step are measured."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    x = torch.rand(arguments.batch_size, 3, arguments.size, arguments.size, device=device)
    model = tta.load_model(arguments.model, checkpoint=arguments.checkpoint, pretrained=False).to(device)

    def an_image(method: str) -> float:
        batch = x[: BATCH_SIZE.get(method, len(x))]
        adapter = tta.adapt(model, method, source=x)
        return median(lambda: adapter(batch), device, arguments.rounds) / len(batch)

    forward, step = an_image("source"), an_image("tent")
    backward = step - forward
    print(
        f"Measured: {arguments.model}, {arguments.size} pixels, batch {arguments.batch_size}, {device}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}: {1 / forward:.1f} images/s forward, tent {1 / step:.1f}; a backward pass is "
        f"{backward / forward:.2f} forwards.\n"
    )
    costs = {name: Cost(extrapolated(name, forward, backward), False) for name in supported(model, arguments.methods)}
    costs |= {name: Cost(cost, True) for name, cost in (("source", forward), ("tent", step)) if name in costs}
    for name in arguments.check:
        found = an_image(name)
        print(f"{name}: measured {found / forward:.2f} forwards, extrapolated {costs[name].seconds / forward:.2f}")
        costs[name] = Cost(found, True)
    return costs


def from_pilot(folder: Path) -> dict[str, Cost]:
    """Costs by the results of a small run, those of several seeds together.

    Raises:
        ValueError: the folder holds no results.
    """
    taken: dict[str, list[Result]] = {}
    for file in sorted(folder.glob("cells/*/result.json")):
        result = Result.load(file.parent)
        taken.setdefault(result.method, []).append(result)
    if not taken:
        raise ValueError(f"'{folder}' holds no results of a benchmark: expected cells/*/result.json.")
    return {
        method: Cost(sum(r.seconds for r in results) / sum(r.samples for r in results), True)
        for method, results in taken.items()
    }


def until_the_end(cells: Sequence[float], workers: int) -> float:
    """Time until the last of the cells ends, each taken in turn by the first worker that is free."""
    free = [0.0] * workers
    for cell in cells:
        heapq.heapreplace(free, free[0] + cell)
    return max(free)


def plan(costs: dict[str, Cost], images: int, seeds: int, workers: int) -> str:
    """The table, and a sentence on the whole."""
    hours = {method: cost.seconds * images / 3600 for method, cost in costs.items()}
    lines = ["| method | images/s | hours a cell | hours | source |", "|---|--:|--:|--:|---|"]
    for method, cost in sorted(costs.items(), key=lambda item: item[1].seconds):
        kind = "measured" if cost.measured else "extrapolated"
        lines.append(
            f"| `{method}` | {1 / cost.seconds:.3g} | {hours[method]:.3g} | {seeds * hours[method]:.3g} | {kind} |"
        )
    total, longest = seeds * sum(hours.values()), max(hours, key=lambda method: hours[method])
    ordered = list(hours.values()) * seeds  # as a benchmark starts them: stream by stream, one for each seed
    lines += [
        "",
        f"{len(costs)} methods x {seeds} seeds x {images} images: {total:.4g} hours of one worker. With {workers} workers the last "
        f"cell ends after {until_the_end(ordered, workers):.4g} hours, the longest first after "
        f"{until_the_end(sorted(ordered, reverse=True), workers):.4g}; less than a cell of `{longest}`, {hours[longest]:.4g} hours, "
        "no number of workers reaches.",
    ]
    if "source" in costs:
        forwards = total * 3600 / costs["source"].seconds
        lines.append(
            f"That is {forwards:.3g} images forward through the source model: divide by those of a device in a second."
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, required=True, help="of a cell: of ImageNet-C 15 x 50 000")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="cells at once: GPUs, or cores")
    parser.add_argument("--pilot", type=Path, metavar="DIR", help="folder of a small run of the same benchmark")
    parser.add_argument("--model", help="a spec of tta.load_model, with random weights")
    parser.add_argument("--checkpoint", help="its weights")
    parser.add_argument("--methods", nargs="*", default=classifiers(), choices=classifiers(), metavar="METHOD")
    parser.add_argument("--check", nargs="*", default=[], metavar="METHOD", help="measured beside their extrapolation")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if not (arguments.model or arguments.pilot):
        parser.error("give --model, --pilot, or both: then what the pilot lacks is extrapolated")
    return arguments


def main() -> None:
    arguments = parsed()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    costs = from_model(arguments) if arguments.model else {}
    if arguments.pilot:
        costs |= {name: cost for name, cost in from_pilot(arguments.pilot).items() if name in arguments.methods}
    print(plan(costs, arguments.images, arguments.seeds, arguments.workers))


if __name__ == "__main__":
    main()
