"""Write the two tables of docs/performance.md: what a step costs, how far that is from the floor, and how it grows.

    python benchmarks/performance.py                                   # a quarter of an hour on two free cores
    python benchmarks/performance.py --compile norm tent sar           # these compiled too, a minute or two more each
    python benchmarks/performance.py --beside released.py              # and other programs, in the same rounds

A file given with ``--beside`` is a Python file with ``STEPS = {method: build}``, where ``build(model, source)`` gives a function
that adapts a copy of the model to a batch and returns its logits: the papers' released code, from wherever it was fetched.
`plain.py` is an example. Only what stands between the markers of the page is written; its text is edited there.

Frozen forward, eager step, compiled step and the other program's step run one after another in every round; a ratio is one of
medians of these rounds. A busy machine lengthens them alike; the medians of two runs differ by about 3 %.
"""

import argparse
import importlib.util
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from speed import BATCH_SIZE, peak_bytes, resnet20, seconds  # beside this file
from torch import Tensor, nn

import tta
from tta.allocator import keep_freed_memory

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
CPU = torch.device("cpu")
# Forwards and backward passes of a step, each as long as a frozen forward channels last. A backward pass to the maps alone is
# as long as a forward, one to convolution weights too twice that.
PASSES = {"norm": 1, "tent": 2, "eata": 2, "sar": 4, "deyo": 3, "actmad": 3, "rotta": 4, "stamp": 19, "cotta": 37}
GROWTH = {"batch": (25, 50, 100, 200), "side": (16, 32, 64)}


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
    return found, peak_bytes(lambda: adapter(x), CPU) - peak_bytes(frozen(model, x), CPU)


def table(rows: dict[str, tuple[dict[str, float], int]]) -> str:
    """One row a method, in frozen forwards."""
    lines = [
        "| method | step | compiled | other program | step / other | compiled / other | floor | step / floor | MB above |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method, (found, memory) in rows.items():
        unit, floor = found["frozen"], PASSES[method] * found["last"]

        def shown(name: str, by: float, found: dict[str, float] = found) -> str:
            return f"{found[name] / by:.2f}" if name in found and by else ""

        other = found.get("beside", 0.0)
        cells = [shown("eager", unit), shown("compiled", unit), shown("beside", unit), shown("eager", other)]
        cells += [shown("compiled", other), f"{floor / unit:.2f}", shown("eager", floor), f"{memory / 1e6:.0f}"]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    return statistics.linear_regression(x, y).slope


def growth(model: nn.Module, methods: Sequence[str], rounds: int) -> str:
    """Growth of the time of a step: a table of fitted exponents, and the cost of a view of cotta."""
    lines = ["| method | batch | side of the images |", "|---|--:|--:|"]
    for method in methods:
        fits = []
        for axis, sizes in GROWTH.items():
            calls = {}
            for size in sizes:
                x = torch.rand(*((size, 3, 32, 32) if axis == "batch" else (50, 3, size, size)))
                adapter = tta.adapt(model, method, source=x)
                calls[str(size)] = lambda adapter=adapter, x=x: adapter(x)
            fits.append(exponent(sizes, list(medians(calls, rounds).values())))
        lines.append(f"| `{method}` | {' | '.join(f'{fit:.2f}' for fit in fits)} |")
    x = torch.rand(50, 3, 32, 32)
    calls = {"frozen": frozen(model, x)}
    for views in (2, 10):
        adapter = tta.adapt(model, "cotta", views=views, ap=1.0)
        calls[str(views)] = lambda adapter=adapter: adapter(x)
    found = medians(calls, rounds)
    each = (found["10"] - found["2"]) / 8 / found["frozen"]
    return "\n".join([*lines, "", f"A view of `cotta` costs {each:.2f} frozen forwards."])


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
    parser.add_argument("--methods", nargs="*", default=list(PASSES), choices=list(PASSES))
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
    rows = {}
    for method in arguments.methods:
        rows[method] = measure(model, method, images, arguments.rounds, method in arguments.compile, others.get(method))
        print(
            method,
            {name: round(value / rows[method][0]["frozen"], 2) for name, value in rows[method][0].items()},
            flush=True,
        )
    words = [word if word != arguments.beside else "released.py" for word in sys.argv[1:]]
    threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    steps = f"""\
```bash
{shlex.join(["python", "benchmarks/performance.py", *words])}
```

ResNet-20 for 32-pixel images, random weights: {threads}, batch {arguments.batch_size}, {arguments.rounds} rounds, torch {torch.__version__}.

{table(rows)}"""
    page = written(arguments.page.read_text(encoding="utf-8"), "steps", steps)
    page = written(page, "growth", growth(model, ["norm", "tent"], arguments.rounds))
    arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
