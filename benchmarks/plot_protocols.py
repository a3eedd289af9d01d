"""Draw every protocol on a small digits-c stream: python benchmarks/plot_protocols.py docs/protocols.png"""

import sys
from itertools import permutations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import tta
from tta.datasets.protocols import PROTOCOLS
from tta.report.schedule import draw_schedule, save

CORRUPTIONS = ["gaussian_noise", "defocus_blur", "snow", "contrast", "pixelate"]
# Accuracies of an invented model: they fall by 5 points per quarter of severity, from 95 % to 15 %.
FALLING = (95 - 5 * np.add.outer(np.arange(21), np.arange(21))).clip(min=15)
CCC = {"total": 2400, "speed": 20, "matrix": dict.fromkeys(permutations(CORRUPTIONS, 2), FALLING)}
VARIANTS = [
    *(
        (name, {}) for name in PROTOCOLS if name not in ("budget", "feedback", "ccc")
    ),  # those of the first two are continual's
    ("ccc", CCC),
    ("gradual", {"first": "full"}),
    ("correlated", {"delta": 0.1}),
    ("correlated", {"delta": 0.1, "mixed": True}),
    ("cdc", {"draw": "multinomial"}),
    ("label-shift", {"imbalance": 20}),
    ("label-shift", {"prior": 4.0}),
    ("forgetting", {"learn": False}),
]


def main(file: Path, columns: int = 3) -> None:
    """Write the contact sheet."""
    rows = -(-len(VARIANTS) // columns)
    figure = Figure(figsize=(4 * columns, 1.5 * rows), layout="constrained")
    panels = figure.subfigures(rows, columns).flatten()
    for panel, (protocol, settings) in zip(panels, VARIANTS, strict=False):
        stream = tta.stream(
            "digits-c", protocol=protocol, batch_size=20, samples=200, corruptions=CORRUPTIONS, **settings
        )
        draw_schedule(stream, *panel.subplots(2, 1, sharex=True))
        given = " ".join(f"{key}={value}" for key, value in settings.items() if key != "matrix")
        panel.suptitle(f"{protocol} {given} (reset {stream.reset})", fontsize=8)
    save(figure, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
