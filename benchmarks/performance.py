"""Write the tables of docs/performance.md: what a step costs, how far that is from the floor, how it grows, what memory it takes.

    python benchmarks/performance.py                                   # every method that takes the model; an hour on a free core
    python benchmarks/performance.py --compile norm tent sar           # these compiled too, a minute or two more each
    python benchmarks/performance.py --beside released.py              # and other programs, in the same rounds
    python benchmarks/performance.py --tables steps --methods roid     # one row; the others stay

A file given with ``--beside`` is a Python file with ``STEPS = {method: build}``, where ``build(model, source)`` gives a function
that adapts a copy of the model to a batch and returns its logits: the papers' released code, from wherever it was fetched.
`plain.py` is an example. Only what stands between the markers of the page is written; its text is edited there. Rows that
are kept were measured by an earlier command, on the same number of threads, batch, rounds and torch version: others are
refused.

Frozen forward, eager step, compiled step and the other program's step run one after another in every round; a ratio is one of
medians of these rounds. A busy machine lengthens them alike; the medians of two runs differ by about 3 %. With
``--threads 1`` they are times of the processor, not of the clock on the wall. A row is written as soon as it is measured.
"""

import argparse
import importlib.util
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import BATCH_SIZE, peak_bytes, resnet20, seconds  # beside this file
from torch import Tensor, nn

import tta
from tta.allocator import keep_freed_memory
from tta.models.networks import CifarResNet, WideResNet
from tta.results.cost import Passes

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
CPU = torch.device("cpu")
# Forwards and backward passes of a step, each as long as a frozen forward channels last. A backward pass to the maps alone is
# as long as a forward, one to convolution weights too twice that. None: each forward that the step is seen to make has a
# backward pass, and their number depends on what a filter keeps. Other methods have no floor in the table.
PASSES = {
    **{"norm": 1, "tent": 2, "eata": 2, "sar": 4, "deyo": 3, "roid": None, "actmad": 3, "rotta": 4, "stamp": 19},
    "cotta": 37,
}
METHODS = tta.list_methods(task="classification", two_towers=False)
TABLES = ("steps", "growth", "memory")
GROWING = ("norm", "tent", "sar", "t3a")


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, by name: the median of interleaved rounds, after two that warm up (the second compiles)."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            found = seconds(call, CPU)
            if number > 1:
                taken[name].append(found)
    return {name: statistics.median(values) for name, values in taken.items()}


def frozen(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(x))


def passes(adapter: tta.Adapter, method: str, x: Tensor) -> float:
    """Number of passes of a step, see PASSES."""
    known = PASSES[method]
    if known is not None:
        return known
    counter = Passes()
    counter.attach(adapter)
    adapter(x)
    counter.detach()
    return 2 * counter.forwards / len(x)


def measure(
    model: nn.Module, method: str, images: Tensor, rounds: int, compiled: bool, other: Any
) -> tuple[dict[str, float], int]:
    """Seconds by column, and the peak of memory above a frozen forward's, bytes."""
    x = images[: BATCH_SIZE.get(method, len(images))]
    last = tta.adapt(model, "source").model  # the same model channels last: the floor of a forward
    adapter = tta.adapt(model, method, source=images)
    calls: dict[str, Callable[[], object]] = {
        "frozen": frozen(model, x),
        "last": frozen(last, x.to(memory_format=torch.channels_last)),
        "eager": lambda: adapter(x),
    }
    if compiled:
        fast = tta.adapt(model, method, source=images, compile=True)
        calls["compiled"] = lambda: fast(x)
    if other is not None:
        beside = other(model, images)
        calls["beside"] = lambda: beside(x)
    found = medians(calls, rounds)
    last_forward = found.pop("last")
    if method in PASSES:
        found["floor"] = passes(adapter, method, x) * last_forward
    return found, peak_bytes(lambda: adapter(x), CPU) - peak_bytes(frozen(model, x), CPU)


def table(rows: dict[str, tuple[dict[str, float], int]]) -> str:
    """One row a method, in frozen forwards."""
    lines = [
        "| method | step | compiled | other program | step / other | compiled / other | floor | step / floor | MB above |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method, (found, memory) in rows.items():
        unit, floor = found["frozen"], found.get("floor", 0.0)

        def shown(name: str, by: float, found: dict[str, float] = found) -> str:
            return f"{found[name] / by:.2f}" if name in found and by else ""

        other = found.get("beside", 0.0)
        cells = [shown("eager", unit), shown("compiled", unit), shown("beside", unit), shown("eager", other)]
        cells += [shown("compiled", other), shown("floor", unit), shown("eager", floor), f"{memory / 1e6:.0f}"]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    return statistics.linear_regression(x, y).slope


def sizes() -> dict[str, list[tuple[float, Callable[[], nn.Module], tuple[int, ...]]]]:
    """Sizes of each kind that grows, with the model and the shape of the batch of each."""

    def model(**changes: int) -> Callable[[], nn.Module]:
        return lambda: CifarResNet(**changes).eval()

    def wide(width: int) -> Callable[[], nn.Module]:
        return lambda: WideResNet(16, width).eval()

    return {
        "batch": [(size, model(), (size, 3, 32, 32)) for size in (25, 50, 100, 200)],
        "side of the images": [(size, model(), (50, 3, size, size)) for size in (16, 32, 64)],
        "classes, 10 to 1000": [(size, model(num_classes=size), (50, 3, 32, 32)) for size in (10, 100, 1000)],
        "depth, 20 to 56 layers": [(depth, model(depth=depth), (50, 3, 32, 32)) for depth in (20, 32, 44, 56)],
        "width, 1 to 4 times": [(width, wide(width), (25, 3, 32, 32)) for width in (1, 2, 4)],
    }


def growth(model: nn.Module, rounds: int) -> str:
    """Growth of the time of a step: a table of fitted exponents, and the cost of a view of cotta."""
    kinds = sizes()
    lines = [f"| method | {' | '.join(kinds)} |", f"|---|{'--:|' * len(kinds)}"]
    for method in ("frozen", *GROWING):
        fits = []
        for grown in kinds.values():
            calls = {}
            for size, build, shape in grown:
                x, network = torch.rand(*shape), build()
                adapter = frozen(network, x) if method == "frozen" else partial(tta.adapt(network, method, source=x), x)
                calls[str(size)] = adapter
            fits.append(exponent([size for size, *_ in grown], list(medians(calls, rounds).values())))
        lines.append(
            f"| {f'`{method}`' if method in GROWING else 'frozen forward'} | {' | '.join(f'{fit:.2f}' for fit in fits)} |"
        )
        print(lines[-1], flush=True)
    x = torch.rand(50, 3, 32, 32)
    calls = {"frozen": frozen(model, x)}
    for views in (2, 10):
        adapter = tta.adapt(model, "cotta", views=views, ap=1.0)
        calls[str(views)] = lambda adapter=adapter: adapter(x)
    found = medians(calls, rounds)
    each = (found["10"] - found["2"]) / 8 / found["frozen"]
    return "\n".join([*lines, "", f"A view of `cotta` costs {each:.2f} frozen forwards."])


def memory(model: nn.Module, images: Tensor, others: dict[str, Any]) -> str:
    """Peak of memory of every method that takes the model, from building it through two steps, above a frozen forward's."""
    lines = ["| method | MB above | other program | ratio |", "|---|--:|--:|--:|"]
    refused = []

    def above(build: Callable[[], Callable[[Tensor], object]], x: Tensor) -> float:
        def two_steps() -> object:
            step = build()
            step(x)
            step(x)
            return step  # held until the peak is taken

        return (peak_bytes(two_steps, CPU) - peak_bytes(frozen(model, x), CPU)) / 1e6

    for method in METHODS:
        x = images[: BATCH_SIZE.get(method, len(images))]
        try:
            own = above(lambda method=method: tta.adapt(model, method, source=images), x)
        except (TypeError, ValueError) as error:
            refused.append(method)
            print(f"{method} did not run: {str(error).splitlines()[0]}", flush=True)
            continue
        other = above(lambda method=method: others[method](model, images), x) if method in others else None
        beside = " | " if other is None else f"{other:.0f} | {own / other:.2f}"
        lines.append(f"| `{method}` | {own:.0f} | {beside} |")
        print(lines[-1], flush=True)
    if refused:
        lines += [
            "",
            f"Not on this model, or not without more than images: {', '.join(f'`{name}`' for name in refused)}.",
        ]
    return "\n".join(lines)


ROW = re.compile(r"^\| `(\w+)` \|.*$", re.MULTILINE)


def merged(block: str, command: str, conditions: str, rows: str) -> str:
    """The block of steps with the rows of a table put into it, and the command that measured them added to its commands."""
    new = {found[1]: found[0] for found in ROW.finditer(rows)}
    old = {found[1]: found[0] for found in ROW.finditer(block)}
    head, _, _ = rows.partition("| `")
    commands = block.partition("```bash\n")[2].partition("```")[0].splitlines()
    commands = [*(line for line in commands if line != command), command]
    both = {**old, **new}
    ordered = "\n".join(both[method] for method in sorted(both))
    return steps("\n".join(commands), conditions, head + ordered)


def steps(commands: str, conditions: str, rows: str) -> str:
    """A block of the page: how it was measured, and its table."""
    return f"```bash\n{commands}\n```\n\n{conditions}\n\n{rows}"


def between(page: str, name: str) -> str:
    """Text between the markers of a name."""
    return page.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0].strip()


def written(page: str, name: str, text: str) -> str:
    """The page with a text between its markers ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ValueError(f"The page has no markers {first} and {last}, in this order.")
    return f"{before}{first}\n\n{text}\n\n{last}{after}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--compile", nargs="*", default=[], metavar="METHOD", help="methods to measure compiled too")
    parser.add_argument("--beside", help="a Python file with STEPS, see above")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--page", type=Path, default=PAGE, help="a page with the markers")
    return parser.parse_args()


def steps_of(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    spec = importlib.util.spec_from_file_location("beside", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    steps: dict[str, Any] = module.STEPS
    return steps


def main() -> None:
    arguments = parsed()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    others = steps_of(arguments.beside)
    images = torch.rand(arguments.batch_size, 3, 32, 32)
    model = resnet20(images)
    words = [word if word != arguments.beside else "released.py" for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/performance.py", *words])
    threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    conditions = (
        f"ResNet-20 for 32-pixel images, random weights: {threads}, batch {arguments.batch_size}, {arguments.rounds} rounds, "
        f"torch {torch.__version__}."
    )

    def block(name: str) -> str:
        return between(arguments.page.read_text(encoding="utf-8"), name)

    def write(name: str, text: str) -> None:
        page = arguments.page.read_text(encoding="utf-8")  # read again: it may have been edited meanwhile
        arguments.page.write_text(written(page, name, text), encoding="utf-8")

    if "steps" in arguments.tables:
        is_whole = set(arguments.methods) == set(METHODS)
        if not is_whole and conditions not in block("steps"):
            sys.exit(
                f"The rows of {arguments.page} that would stay were not measured as these would be ({conditions.removesuffix('.')}). "
                "Give the settings that stand there, or measure every method."
            )
        text = "" if is_whole else block("steps")
        for method in arguments.methods:
            compiled = method in arguments.compile
            try:
                row = measure(model, method, images, arguments.rounds, compiled, others.get(method))
            except (TypeError, ValueError) as error:
                print(f"{method} did not run: {str(error).splitlines()[0]}", flush=True)
                continue
            print(method, {name: round(value / row[0]["frozen"], 2) for name, value in row[0].items()}, flush=True)
            text = merged(text, command, conditions, table({method: row}))
            write("steps", text)
    if "memory" in arguments.tables:
        write("memory", f"{steps(command, conditions, memory(model, images, others))}")
    if "growth" in arguments.tables:
        write("growth", f"{steps(command, conditions, growth(model, arguments.rounds))}")


if __name__ == "__main__":
    main()
