"""Cost of adaptation: time of an adapt-and-predict step relative to the frozen forward, and additional memory.

    python benchmarks/speed.py                              # every method that takes the model; minutes on 2 cores
    python benchmarks/speed.py --methods norm tent --rounds 15 --threads 2
    python benchmarks/speed.py --methods norm tent --precision bf16-mixed    # steps under autocast, the frozen forward as before
    python benchmarks/speed.py --model timm:resnet50 --checkpoint FILE --preset imagenet-c --size 224 --batch-size 64 --device cuda

The frozen forward is the same model in eval(), float32, channels first, no gradient, on the same batch. The two run
alternately, and each round gives a ratio; quote the medians. The released code of the papers, measured in the same way on
2 cores of another machine: norm 1.4, tent 1.8, eata 1.95, sar 4.0, actmad 3.5, rotta 12.6, cotta 105. The column "plain"
shows the influence of the machine: a step of the method without any optimisation (`plain.py`), in the same rounds (with
default settings, so not with --preset). Ratios rise on a busy machine: a step waits more for memory than a forward does.

Memory is the peak of PyTorch's allocations from building the adapter (with its copy of the model) through three steps,
minus the peak of the frozen forward. On a GPU that is the allocator's own count; on a CPU it is summed from the profiler's
record of every allocation, which does not include the scratch memory inside a kernel.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from plain import STEPS  # beside this file
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tta
from tta import config
from tta.allocator import keep_freed_memory

RELEASED = {"norm": 1.4, "tent": 1.8, "eata": 1.95, "sar": 4.0, "actmad": 3.5, "rotta": 12.6, "cotta": 105.0}
BATCH_SIZE = {"rotta": 64}  # its memory holds 64 and it updates every 64: one update a step


@torch.no_grad()
def resnet20(images: Tensor) -> nn.Module:
    """The ResNet-20 of CIFAR with random weights, its classifier scaled so that predictions spread over the classes.

    Logits have a standard deviation of 2, by stored statistics and by the batch's: a quarter of the predictions are sure enough
    to teach, cotta averages over its views, and rotta's memory fills.
    """
    torch.manual_seed(0)
    model = tta.load_model("cifar-resnet20", pretrained=False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the stored statistics become those of the images
    model.train()(images)
    model.eval()
    classifier = model.model.linear
    features: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    model(images)
    handle.remove()
    std, mean = torch.std_mean(features[0], dim=0)
    classifier.weight /= std + 1e-6
    classifier.bias.copy_(-classifier.weight @ mean)
    scale = 2 / model(images).std()
    classifier.weight *= scale
    classifier.bias *= scale
    return model


def build(model: nn.Module, method: str, source: Tensor, preset: str | None) -> tta.Adapter:
    return tta.adapt(model, method, source=source, preset=preset if preset in config.load("method", method) else None)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of a call. On one thread of a CPU it is the processor's own time, to which other programs add little."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory that ``call`` allocates."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Measured(NamedTuple):
    """A method's steps: milliseconds, ratios to the frozen forward (also of the plain method), and additional memory."""

    batch: int
    milliseconds: list[float]
    ratios: list[float]
    of_plain: list[float]
    memory: int


def measure(
    model: nn.Module, method: str, x: Tensor, source: Tensor, rounds: int, preset: str | None, precision: str
) -> Measured:
    def step(adapter: tta.Adapter) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            adapter(x)

    def frozen() -> None:
        with torch.no_grad():
            model(x)

    def three_steps() -> tta.Adapter:
        adapter = build(model, method, source, preset)
        for _ in range(3):
            step(adapter)
        return adapter

    frozen()
    memory = peak_bytes(three_steps, x.device) - peak_bytes(frozen, x.device)
    adapter = build(model, method, source, preset)
    plain = STEPS[method](model, source) if method in STEPS and not preset else None
    found = Measured(len(x), [], [], [], memory)
    for number in range(rounds + 1):
        forward = seconds(frozen, x.device)
        taken = seconds(lambda: step(adapter), x.device)
        of_plain = seconds(lambda: plain(x), x.device) / forward if plain else None
        if number:  # the first round warms up
            found.milliseconds.append(1e3 * taken)
            found.ratios.append(taken / forward)
            found.of_plain.extend([] if of_plain is None else [of_plain])
    return found


def table(measured: dict[str, Measured], title: str) -> Table:
    """One row per method."""
    found = Table(title=title)
    for column in (
        "method",
        "batch",
        "images/s",
        "step, ms",
        "x frozen forward",
        "lowest",
        "highest",
        "plain",
        "released code",
        "MB above it",
    ):
        found.add_column(column, justify="left" if column == "method" else "right")
    for method, steps in measured.items():
        milliseconds, ratios = statistics.median(steps.milliseconds), steps.ratios
        found.add_row(
            method,
            str(steps.batch),
            f"{1e3 * steps.batch / milliseconds:.0f}",
            f"{milliseconds:.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            f"{statistics.median(steps.of_plain):.2f}" if steps.of_plain else "",
            str(RELEASED.get(method, "")),
            f"{steps.memory / 1e6:.1f}",
        )
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a spec of tta.load_model; default: a ResNet-20 of CIFAR with random weights")
    parser.add_argument("--checkpoint", help="its weights")
    parser.add_argument("--methods", nargs="*", default=tta.list_methods(task="classification", two_towers=False))
    parser.add_argument("--preset", help="published settings, for the methods that have them; default: their defaults")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"], help="of the steps")
    arguments = parser.parse_args()
    presets = {name for method in arguments.methods for name in config.load("method", method)}
    if arguments.preset and arguments.preset not in presets:
        parser.error(f"no method here has the preset '{arguments.preset}'; there are: {', '.join(sorted(presets))}")
    return arguments


def main() -> None:
    arguments = parsed()
    keep_freed_memory()  # as the commands do; otherwise pages that the system maps again make the ratios noisy
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    images = torch.rand(max(arguments.batch_size, 64), 3, arguments.size, arguments.size)
    spec, checkpoint = arguments.model, arguments.checkpoint
    model = (tta.load_model(spec, checkpoint=checkpoint) if spec else resnet20(images)).to(device)
    images = images.to(device)

    measured, refused = {}, {}
    for method in arguments.methods:  # one after another: thirty adapters of a large model at once fill any GPU
        x = images[: BATCH_SIZE.get(method, arguments.batch_size)]
        try:
            measured[method] = measure(
                model, method, x, images, arguments.rounds, arguments.preset, arguments.precision
            )
            ratio = statistics.median(measured[method].ratios)
            # Printed at once, so that an interrupted run has shown something.
            print(f"{method}: {ratio:.2f} frozen forwards", file=sys.stderr, flush=True)
        except (TypeError, ValueError, torch.OutOfMemoryError) as error:
            refused[method] = str(error).splitlines()[0]

    title = f"{spec or 'ResNet-20'}, {device}, {arguments.threads} threads, {arguments.rounds} rounds, {arguments.precision}"
    Console(width=None if sys.stdout.isatty() else 120).print(table(measured, title))
    for method, reason in refused.items():
        print(f"{method} did not run: {reason}")


if __name__ == "__main__":
    main()
