"""Guarded and unguarded adapters where methods collapse, and where they are healthy; the false alarms of the guard.

    python benchmarks/reliability.py guard                                # on the embedded digits; minutes on 2 cores
    python benchmarks/reliability.py guard --cifar data --checkpoint resnet20.safetensors
    python benchmarks/reliability.py healthy --cifar data --checkpoint resnet20.safetensors
    python benchmarks/reliability.py alarms                               # 200 healthy streams of digits
    python benchmarks/reliability.py answers                              # the guard with feedback, on digits
    python benchmarks/reliability.py answers --cifar data --checkpoint resnet20.safetensors
    python benchmarks/reliability.py cost --cifar data --checkpoint resnet20.safetensors --methods norm tent

``--cifar`` is a folder test/CLASS/*.jpg of CIFAR-10 images, from which the corruptions are generated, and ``--checkpoint``
the weights of the ResNet-20 for it. Each number is appended to ``--out`` as soon as it is known; what is there is not run again.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import tta
from tta import config, methods
from tta.adapter import config_class
from tta.datasets import digits
from tta.datasets.stream import Asked
from tta.oracle import Oracle

METHODS = ("tent", "eata", "sar", "rotta", "cotta", "roid", "actmad", "auto")
VIEWS = {"cotta": {"views": 4}}  # of 32, for time
RECURRING = ("gaussian_noise", "defocus_blur", "snow", "contrast", "jpeg_compression")


class Step(NamedTuple):
    """A batch of a scenario: images, labels if its predictions count, and whether the adapter may learn."""

    images: Tensor
    labels: Tensor | None
    learn: bool = True


class Data(NamedTuple):
    """A source model, its source images for methods that need some, what makes a stream of its data, and its clean images."""

    model: nn.Module
    source: Tensor
    stream: Callable[..., tta.datasets.Stream]
    clean: int


def to_float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def of_digits() -> Data:
    return Data(tta.load_model("digits-cnn"), digits.split("train")[0], lambda **s: tta.stream("digits-c", **s), 800)


def cifar(root: str, checkpoint: str) -> Data:
    model = tta.load_model("cifar-resnet20", checkpoint=checkpoint)
    clean = tta.stream("cifar10-c", root=root, severity=5, samples=3000, batch_size=512).clean()
    source = torch.cat([batch.images for batch in clean])[-512:]
    settings = {"root": root, "severity": 5, "samples": 400}
    return Data(model, to_float(source), lambda **s: tta.stream("cifar10-c", **{**settings, **s}), 1000)


# ---------------------------------------------------------------------- scenarios


def plain(data: Data, **settings: Any) -> Iterator[Step]:
    for batch in data.stream(**settings):
        yield Step(batch.images, batch.labels)


def sorted_labels(data: Data, steps: int, batch_size: int, **settings: Any) -> Iterator[Step]:
    """All corruptions, each sorted by class, again and again."""
    seeds = itertools.chain.from_iterable(
        plain(data, protocol="correlated", delta=0.0, batch_size=batch_size, seed=seed, **settings)
        for seed in itertools.count()
    )
    return itertools.islice(seeds, steps)


def clean_images(data: Data) -> Iterator[Step]:
    """Clean images, predicted without learning."""
    for batch in data.stream(batch_size=100, samples=data.clean).clean():
        yield Step(batch.images, batch.labels, learn=False)


def same_frame(data: Data) -> Iterator[Step]:
    frame = to_float(next(clean_images(data)).images[:1])
    noise = torch.Generator().manual_seed(0)
    for _ in range(500):
        yield Step(frame + 1e-3 * torch.randn(4, *frame.shape[1:], generator=noise), None)
    yield from clean_images(data)


def black_frames(data: Data) -> Iterator[Step]:
    for _ in range(30):
        yield Step(torch.zeros(16, 3, *next(clean_images(data)).images.shape[2:]), None)
    yield from clean_images(data)


def broken_sensor(data: Data) -> Iterator[Step]:
    """A hundred batches of NaN in the midst of a stream."""
    for number, step in enumerate(plain(data, batch_size=64)):
        if number == 40:
            yield from itertools.repeat(Step(torch.full(step.images.shape, torch.nan), None), 100)
        yield step


def alternating(data: Data) -> Iterator[Step]:
    """Two domains that take turns every five batches."""
    two = [list(plain(data, corruptions=[name], batch_size=64)) for name in ("gaussian_noise", "contrast")]
    for start in range(0, min(map(len, two)), 5):
        for steps in two:
            yield from steps[start : start + 5]


def recurring(data: Data) -> Iterator[Step]:
    yield from plain(data, protocol="recurring", rounds=20, corruptions=list(RECURRING), samples=200, batch_size=64)


def scenarios(
    digits_data: Data, cifar_data: Data | None
) -> dict[str, tuple[Data, Callable[[Data], Iterator[Step]], float]]:
    """Name -> (data, batches, factor of the learning rate)."""
    data = cifar_data or digits_data
    found: dict[str, tuple[Data, Callable[[Data], Iterator[Step]], float]] = {
        "label-sorted digits, 3 000 steps": (digits_data, lambda d: sorted_labels(d, 3000, 16), 1)
    }
    if cifar_data:
        found["label-sorted CIFAR"] = (cifar_data, lambda d: sorted_labels(d, 235, 64, samples=1000), 1)
    return found | {
        "same frame 500 times": (data, same_frame, 1),
        "black frames": (data, black_frames, 1),
        "batch of one": (data, lambda d: plain(d, batch_size=1, samples=100), 1),
        "rate x 100": (data, lambda d: plain(d, batch_size=64), 100),
        "NaN sensor for a while": (data, broken_sensor, 1),
        "alternating domains": (data, alternating, 1),
        "20 recurring rounds": (data, recurring, 1),
    }


# ---------------------------------------------------------------------- runs


def adapter_of(data: Data, method: str, factor: float, guard: bool) -> tta.Adapter | None:
    """The adapter; None if its learning rate cannot be scaled."""
    settings = dict(VIEWS.get(method, {}))
    if factor != 1:
        rate = getattr(config.build(config_class(methods.find(method)), {}, {}), "lr", None)
        if rate is None:
            return None
        settings["lr"] = factor * rate
    return tta.adapt(data.model, method, source=data.source, on_bad="skip", guard=guard, **settings)


def measure(adapter: tta.Adapter, steps: Iterable[Step]) -> dict[str, Any]:
    """Error in % over the batches that count, and the guard's counts."""
    wrong = scored = batches = 0
    first_alarm = None
    for step in steps:
        images = to_float(step.images)
        if step.learn:
            logits = adapter(images)
            batches += 1
        else:
            with adapter.paused():
                logits = adapter(images)
        if step.labels is not None:
            wrong += int((logits.argmax(1) != step.labels).sum())
            scored += len(step.labels)
        if first_alarm is None and adapter.guard is not None and adapter.guard.counts["alarms"]:
            first_alarm = batches
    counts = {} if adapter.guard is None else adapter.guard.counts
    return {"error": 100 * wrong / scored, "batches": batches, "first_alarm": first_alarm, **counts}


class Log:
    """Numbers by key, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = dict(tuple(json.loads(line)) for line in lines)

    def get(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The numbers of a key, run if they are not there."""
        if key not in self.found:
            self.found[key] = run()
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.found[key]]) + "\n")
        return self.found[key]


class Scenario:
    """The batches of a stream, made when they are first needed and kept for the next method."""

    def __init__(self, make: Callable[[], Iterator[Step]]) -> None:
        self._make, self._steps = make, list[Step]()

    def __iter__(self) -> Iterator[Step]:
        self._steps = self._steps or list(self._make())
        return iter(self._steps)


def run_cell(
    log: Log, key: str, data: Data, steps: Scenario, method: str, factor: float = 1, guard: bool = False
) -> Any:
    def run() -> dict[str, Any]:
        adapter = adapter_of(data, method, factor, guard)
        return {} if adapter is None else measure(adapter, steps)

    return log.get(key, run)


def guard_table(log: Log, digits_data: Data, cifar_data: Data | None, names: list[str]) -> None:
    print("| scenario | source | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for name, (data, make, factor) in scenarios(digits_data, cifar_data).items():
        steps = Scenario(partial(make, data))
        source = run_cell(log, f"guard|{name}|source", data, steps, "source")
        cells = []
        for method in names:
            off, on = (
                run_cell(log, f"guard|{name}|{method}|{g}", data, steps, method, factor, g) for g in (False, True)
            )
            found = f"{off['error']:.1f} / {on['error']:.1f}" if on else "-"
            if on and on["alarms"]:
                found += f" ({on['alarms']}, {on['rollbacks']}, {on['first_alarm']})"
            cells.append(found)
        print(f"| {name} | {source['error']:.1f} | " + " | ".join(cells) + " |", flush=True)


HEALTHY = {
    "continual": {},
    "mixed": {"protocol": "mixed"},
    "gradual": {"protocol": "gradual"},
}


def healthy_table(log: Log, data: Data, names: list[str]) -> None:
    print("| stream | batch | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for (name, settings), batch_size in itertools.product(HEALTHY.items(), (64, 200)):
        steps = Scenario(partial(plain, data, batch_size=batch_size, **settings))
        cells = []
        for method in names:
            key = f"healthy|{name}|{batch_size}|{method}"
            off, on = (run_cell(log, f"{key}|{g}", data, steps, method, guard=g) for g in (False, True))
            cells.append(f"{on['error'] - off['error']:+.2f} ({1000 * on['alarms'] / on['batches']:.1f})")
        print(f"| {name} | {batch_size} | " + " | ".join(cells) + " |", flush=True)


def false_alarms(log: Log, data: Data, method: str, streams: int) -> None:
    """Share of healthy streams, each of one domain or several, of other order, severity and images, with an alarm."""
    alarmed = 0
    for seed in range(streams):
        settings = {"severity": 1 + seed % 5, "samples": 200, "batch_size": (16, 32, 64, 128)[seed % 4]}
        steps = Scenario(partial(plain, data, seed=seed, **settings))
        alarmed += run_cell(log, f"alarms|{method}|{seed}", data, steps, method, guard=True)["alarms"] > 0
    print(
        f"{method}: {alarmed} of {streams} healthy streams with an alarm ({100 * alarmed / streams:.1f} %); level 5 %"
    )


TOLD = {  # budget, delay and noise of the answers that the guard gets
    "guard": None,
    "1 a batch": (1, 0, 0.0),
    "3 a batch": (3, 0, 0.0),
    "3, a tenth wrong": (3, 0, 0.1),
    "3, a tenth wrong, 20 batches late": (3, 20, 0.1),
}
STREAMS = {  # method, settings of the method, settings of the stream, seeds; on digits, and on CIFAR
    "digits, lr=0.3": ("tent", {"lr": 0.3}, {"batch_size": 16, "samples": 160}, 6),
    "digits, lr=0.001": ("tent", {"lr": 1e-3}, {"batch_size": 16, "samples": 160}, 6),
    "digits in the order of their labels": (
        "auto",
        {},
        {"batch_size": 16, "samples": 160, "protocol": "correlated", "delta": 0.0},
        6,
    ),
}
STREAMS_CIFAR = {
    "CIFAR, lr=0.1": ("tent", {"lr": 0.1}, {"batch_size": 50}, 1),
    "CIFAR, lr=0.001": ("tent", {"lr": 1e-3}, {"batch_size": 50}, 1),
}


def told(adapter: tta.Adapter, stream: tta.datasets.Stream, asked: tuple[int, int, float]) -> dict[str, Any]:
    """Errors and counts of a run in which the guard asks and is told; answers reach it in no other way."""
    oracle, wrong, scored = Oracle(Asked(delay=asked[1], noise=asked[2], budget=asked[0]), stream.seed), 0, 0
    for batch in stream:
        output = adapter.step(to_float(batch.images))
        oracle.after(adapter, output, batch.labels)
        wrong += int((output.logits.argmax(1) != batch.labels).sum())
        scored += len(batch.labels)
    assert adapter.guard is not None
    return {"error": 100 * wrong / scored, **oracle.counts, **adapter.guard.counts}


def answered(data: Data, stream: Any, steps: Scenario, made: tuple[str, dict[str, Any]], column: str) -> dict[str, Any]:
    """The numbers of a column of the table of answers, for an adapter of a method and its settings."""
    adapter = tta.adapt(data.model, made[0], guard=column in TOLD, **made[1])
    asked = TOLD.get(column)
    return told(adapter, stream, asked) if asked else measure(adapter, steps)


def answers_table(log: Log, data: Data, streams: dict[str, Any]) -> None:
    """Mean error over seeds; in brackets alarms by answers, and alarms overruled, a run."""
    print("| stream | source | no guard | " + " | ".join(TOLD) + " |\n|---|---|---|" + "---|" * len(TOLD))
    for name, (method, settings, of_stream, seeds) in streams.items():
        cells: dict[str, list[dict[str, Any]]] = {}
        for seed in range(seeds):
            stream = data.stream(seed=seed, **of_stream)
            steps = Scenario(partial(plain, data, seed=seed, **of_stream))
            for column in ("source", "no guard", *TOLD):
                made = ("source", {}) if column == "source" else (method, settings)
                run = partial(answered, data, stream, steps, made, column)
                cells.setdefault(column, []).append(log.get(f"answers|{name}|{seed}|{column}", run))
        texts = []
        for column, found in cells.items():
            mean = {
                key: statistics.mean(one.get(key) or 0 for one in found) for key in ("error", "labelled", "overruled")
            }
            texts.append(f"{mean['error']:.1f}")
            if TOLD.get(column):
                texts[-1] += f" ({mean['labelled']:.1f}, {mean['overruled']:.1f})"
        print(f"| {name} | " + " | ".join(texts) + " |", flush=True)


def cost_table(data: Data, names: list[str], rounds: int = 4) -> None:
    """CPU time of the guard in frozen forwards a batch, snapshots and all, over streams of 128 batches; one thread."""
    torch.set_num_threads(1)
    print("| batch | method | guard, frozen forwards a batch | checks a batch |\n|---|---|---|---|")
    for batch_size, method in itertools.product((64, 200), names):
        batches = [to_float(step.images) for step in itertools.islice(plain(data, batch_size=batch_size), 32)] * 4
        found = []
        for _ in range(rounds):
            adapters = [adapter_of(data, method, 1, guard) for guard in (False, True)]
            spent = [0.0, 0.0, 0.0]
            for x in batches:
                for place, run in enumerate((*adapters, data.model.eval())):
                    start = time.process_time()
                    with torch.no_grad():
                        run(x)
                    spent[place] += time.process_time() - start
            found.append((spent[1] - spent[0]) / spent[2])
        checks = adapters[1].guard.counts["checks"] / len(batches)
        print(
            f"| {batch_size} | {method} | {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}) | {checks:.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["guard", "healthy", "alarms", "answers", "cost"])
    parser.add_argument("--cifar")
    parser.add_argument("--checkpoint")
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m in tta.list_methods()])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/reliability.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    log = Log(arguments.out)
    of_cifar = cifar(arguments.cifar, arguments.checkpoint) if arguments.cifar else None
    if arguments.table == "guard":
        guard_table(log, of_digits(), of_cifar, arguments.methods)
    elif arguments.table == "healthy":
        healthy_table(log, of_cifar or of_digits(), arguments.methods)
    elif arguments.table == "answers":
        answers_table(log, of_cifar or of_digits(), STREAMS_CIFAR if of_cifar else STREAMS)
    elif arguments.table == "cost":
        cost_table(of_cifar or of_digits(), arguments.methods)
    else:
        for method in arguments.methods:
            false_alarms(log, of_cifar or of_digits(), method, arguments.streams)
    Console(stderr=True).print(f"numbers: {arguments.out}")


if __name__ == "__main__":
    main()
