"""Overhead of the engine: steady-state images/s of `tta.evaluate` against a bare forward loop over the same tensors.

    python benchmarks/overhead.py --pairs 31          # about a minute on 2 cores

Both read the same float32 images from memory, alternately, and each pair gives a ratio of the median times of a batch;
quote the median ratio. For the embedded CNN at batch 200 the aim is 0.95. It is not met, because its forward is short:
0.87 on two cores (4.9 ms per forward), 0.91 on one core (8.5 ms). A plain loop without a Trainer, `for batch in stream:
adapter(batch.images)`, has 0.94 on two cores: 0.1 ms to read a batch, 0.2 ms for the adapter, half of that to look for NaN
in the images. For longer steps it matters less: 0.95 to 0.97 with `--method tent`. With `--model cifar-resnet20` the
engine is faster, 1.16, because an adapter runs that model channels last.
"""

import argparse
import itertools
import statistics
import time

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import TensorDataset

import tta

WARM_UP = 10  # batches


class Clock(Callback):
    """Records the time at the end of each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_test_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Median time from one batch to the next."""
        steady = self.times[WARM_UP:]
        return statistics.median(after - before for before, after in itertools.pairwise(steady))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--method", default="source")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=31)
    arguments = parser.parse_args()

    model = tta.load_model(arguments.model, pretrained=False)  # time does not depend on the weights
    corrupted = list(tta.stream("digits-c", batch_size=arguments.batch_size))
    images, labels = torch.cat([batch.images for batch in corrupted]), torch.cat([batch.labels for batch in corrupted])
    stream = tta.stream({"digits": TensorDataset(images, labels)}, batch_size=arguments.batch_size)
    batches = images.split(arguments.batch_size)
    ratios = []
    for pair in range(arguments.pairs + 1):
        adapter = tta.adapt(model, arguments.method)
        forward = model if arguments.method == "source" else adapter
        bare, engine = Clock(), Clock()
        with torch.no_grad():
            for batch in batches:
                forward(batch)
                bare.on_test_batch_end()
        tta.evaluate(tta.adapt(model, arguments.method), stream, progress=False, callbacks=[engine])
        if pair:  # the first pair warms up
            ratios.append(bare.seconds() / engine.seconds())
            speeds = [arguments.batch_size / clock.seconds() for clock in (bare, engine)]
            print(f"bare loop {speeds[0]:8.0f} images/s   engine {speeds[1]:8.0f} images/s   ratio {ratios[-1]:.3f}")
    middle = statistics.quantiles(ratios, n=4)
    print(
        f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} pairs (quartiles {middle[0]:.3f} to "
        f"{middle[2]:.3f}), {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
