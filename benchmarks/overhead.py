"""What the engine costs: steady-state images/s of `tta.evaluate` against a bare forward loop over the same tensors.

    python benchmarks/overhead.py --pairs 15          # under a minute on 2 cores

The two run in turn and each pair gives a ratio; the median is the number to quote. For the embedded CNN at batch 200 the
aim is 0.95; seen were 0.95 with one thread, 0.84 to 0.89 with two. The first ten batches of each run are left out.
"""

import argparse
import statistics
import time

import torch
from lightning.pytorch.callbacks import Callback

import tta

WARM_UP = 10  # batches


class Clock(Callback):
    """The time at which each batch was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_test_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def speed(times: list[float], batch_size: int) -> float:
    return batch_size * (len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--method", default="source")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()

    model = tta.load_model(arguments.model)
    stream = tta.stream("digits-c", batch_size=arguments.batch_size)
    batches = list(stream)
    ratios = []
    for pair in range(arguments.pairs + 1):
        adapter = tta.adapt(model, arguments.method)
        forward = model if arguments.method == "source" else adapter
        bare, engine = Clock(), Clock()
        with torch.no_grad():
            for batch in batches:
                forward(batch.images)
                bare.on_test_batch_end()
        tta.evaluate(tta.adapt(model, arguments.method), stream, progress=False, callbacks=[engine])
        if pair:  # the first pair warms up
            speeds = [speed(clock.times, arguments.batch_size) for clock in (bare, engine)]
            ratios.append(speeds[1] / speeds[0])
            print(f"bare loop {speeds[0]:8.0f} images/s   engine {speeds[1]:8.0f} images/s   ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} pairs, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
