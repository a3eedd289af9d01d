"""What the engine costs: steady-state images/s of `tta.evaluate` against a bare forward loop over the same tensors.

    python benchmarks/overhead.py --pairs 9          # about a minute on 2 cores

The two run in turn and each pair gives a ratio; the median is the number to quote. Expect at least 0.95 for the
embedded CNN at batch 200.
"""

import argparse
import statistics
import time

import torch

import tta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--method", default="source")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()

    model = tta.load_model(arguments.model)
    stream = tta.stream("digits-c", batch_size=arguments.batch_size)
    batches = list(stream)
    ratios = []
    for pair in range(arguments.pairs + 1):
        adapter = tta.adapt(model, arguments.method)
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(batch.images) if arguments.method == "source" else adapter(batch.images)
        bare = stream.samples / (time.perf_counter() - start)
        adapter = tta.adapt(model, arguments.method)
        engine = stream.samples / tta.evaluate(adapter, stream, progress=False).seconds
        if pair:  # the first pair warms up
            ratios.append(engine / bare)
            print(f"bare loop {bare:8.0f} images/s   engine {engine:8.0f} images/s   ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} pairs, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
