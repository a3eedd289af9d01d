"""Every architecture with every method: which pairs run, which are refused with a sentence, and which fail.

    python benchmarks/matrix.py                                          # all pairs; hours on 2 cores; goes on where it stopped
    python benchmarks/matrix.py --models 'timm:*net*' --methods tent sar
    python benchmarks/matrix.py --jobs 2 --table docs/models.md          # and write the table there, between its two markers

Weights are random: no accuracy is measured, and nothing is downloaded. Statistics of BatchNorm are those of the images, and the
head is scaled so that predictions spread over the classes, because a filter would let nothing of uniform ones through. Each
pair predicts a few batches of structured noise, with fewer views and smaller memories than the defaults (`QUICK`).

ran      finite logits of the right shape, and something learned: a step moved parameters; of a method without steps, what it
         remembers has changed, or its logits are not the source model's
filtered finite logits, but the filter let no sample through, or no gradient was left; after 50 such batches the adapter warns
refused  a ValueError or TypeError that a `raise` of the toolkit gave, with a sentence
raw      any other error: it came out of a library, or is of another kind
silent   it should learn, and nothing has changed

Each architecture runs in a process of its own. One that is killed costs the pair it was at, which counts as raw.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, CLASSES, logits_of, prepared  # beside this file
from torch import Tensor, nn

import tta

BATCH, BATCHES = 4, 2  # images a batch; batches
METHODS = [*tta.list_methods(task="classification", two_towers=False), "gala:tent"]
MARKERS = ("<!-- matrix -->", "<!-- end of matrix -->")
OUTCOMES = ("ran", "filtered", "refused", "raw", "silent")
TOOLKIT = tuple(str(Path(sys.modules[name].__file__ or "").parent) for name in ("tta", "tta.methods"))
# In place of defaults that are slow, wait for more images than there are, or let through only sure predictions (ln 10 = 2.3).
QUICK: dict[str, dict[str, Any]] = {
    "adacontrast": {"queue_size": 64, "refine_after": 8},
    "bitta": {"memory_size": 8, "passes": 2, "steps": 1, "dropout": 0.02},
    "cotta": {"views": 2},
    "deyo": {"margin": 2.2, "plpd_threshold": -1.0},
    "dpcore": {"steps_new": 2},
    "eata": {"e_margin": 2.2},
    "foa": {"population": 4},
    "gala": {"window": 2},
    "gala:tent": {"window": 2},
    "label_shift": {"iterations": 20},
    "memo": {"views": 2},
    "note": {"memory_size": 8, "update_frequency": 8},
    "petal": {"views": 2},
    "petta": {"memory_size": 8, "update_frequency": 8},
    "psmt": {"views": 2},
    "rdumb": {"e_margin": 2.2},
    "rotta": {"memory_size": 8, "update_frequency": 8},
    "sar": {"margin_e0": 2.2},
    "simatta": {"e_low": 2.2, "e_high": 2.3, "steps": 1, "source_per_batch": 4, "cold_start": 2},
    "sotta": {"memory_size": 8, "update_frequency": 8, "high_threshold": 0.2},
    "stamp": {"views": 2, "capacity": 16, "alpha": 0.9, "consistent": False},
    "tribe": {"h0": 2.2},
    "ttac": {"class_covariance": "diagonal"},
}
Row = dict[str, Any]


# ---------------------------------------------------------------------- one pair


def pair(model: nn.Module, method: str | type[tta.Adapter], images: Tensor, **settings: Any) -> Row:
    """The outcome of a method on a model, with its reason and what the adapter counted."""
    start, source = time.perf_counter(), labelled(images)
    row: Row = {"outcome": "ran", "reason": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter = tta.adapt(model, method, source=source, **settings)
            row |= learned(adapter, model, images)
        except Exception as error:  # whatever there is, it is the outcome
            refused = is_sentence(error)
            row |= {"outcome": "refused" if refused else "raw", "reason": str(error) if refused else trace(error)}
    row["warnings"] = sorted({str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)})
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def labelled(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(images)) % CLASSES
    return list(zip(images.split(len(images) // 2), labels.split(len(images) // 2), strict=True))


def learned(adapter: tta.Adapter, model: nn.Module, images: Tensor) -> Row:
    """Outcome of a few batches: its name, the updates made, and how many of the tensors that should change have changed."""
    before, moved = remembered(adapter), watched(adapter)
    for batch in images[: BATCH * BATCHES].split(BATCH):
        logits = adapter(batch)
        if logits.shape != (BATCH, CLASSES) or not logits.isfinite().all():
            return {"outcome": "raw", "reason": f"logits of shape {tuple(logits.shape)}, or not finite"}
    progress = adapter.progress()
    if adapter.optimizer is not None:
        row = {"updates": progress.updates, "filtered": progress.filtered, "changed": len(moved)}
        left_out = progress.updates == 0 and progress.filtered > 0
        return {**row, "outcome": "ran" if moved else "filtered" if left_out else "silent"}
    changed = sum(not same(before.get(name), value) for name, value in remembered(adapter).items())
    with torch.no_grad():
        as_source = torch.allclose(logits, logits_of(model(batch)).float(), atol=1e-5)
    still = changed == 0 and as_source and adapter.method != "source"
    return {"updates": 0, "filtered": 0, "changed": changed, "outcome": "silent" if still else "ran"}


def watched(adapter: tta.Adapter) -> set[int]:
    """Places of the optimised parameters that a step has moved; it fills while the adapter learns.

    Looked at after each step: some methods go back to the source afterwards (memo after each image, sar when it collapses).
    """
    moved: set[int] = set()
    update = adapter.update

    def step(*args: Any, **options: Any) -> Tensor:
        before = [parameter.detach().clone() for parameter in adapter.optimized_parameters()]
        made = update(*args, **options)
        pairs = enumerate(zip(before, adapter.optimized_parameters(), strict=True))
        moved.update(place for place, (old, new) in pairs if not torch.equal(old, new))
        return made

    adapter.update = step  # type: ignore[method-assign]
    return moved


def remembered(adapter: tta.Adapter) -> dict[str, Tensor]:
    """Copies of all that an adapter remembers, its counters and random numbers apart."""
    own = ("_counters", "generator", "adapter_state")
    return {name: value for name, value in adapter.state_dict().items() if name not in own}


def same(before: Tensor | None, after: Tensor) -> bool:
    return before is not None and before.shape == after.shape and torch.equal(before, after)


def is_sentence(error: Exception) -> bool:
    """Whether an error is a sentence of the toolkit's: a ValueError or TypeError from a ``raise`` in one of its files."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = last.filename.startswith(TOOLKIT) and (last.line or "").startswith("raise ")
    return own and isinstance(error, (ValueError, TypeError)) and str(error).rstrip().endswith((".", "?"))


def trace(error: Exception) -> str:
    """An error with the last places of the toolkit and of all that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(TOOLKIT)][-2:]
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*own, frames[-1]])
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]} ({' > '.join(places)})"


# ---------------------------------------------------------------------- all pairs


def run(name: str, wanted: list[str], out: Path) -> None:
    """The pairs of one architecture, each written as soon as it is known."""
    try:
        model, images = prepared(name)
    except ImportError as error:
        add(out, {"model": name, "method": "", "outcome": "skipped", "reason": str(error)})
        return
    for method in wanted:
        row = {"model": name, "method": method, "size": images.shape[-1], "norms": norm_layers(model)}
        add(out, {**row, **pair(model, method, images, **QUICK.get(method, {}))})


def norm_layers(model: nn.Module) -> str:
    """Normalisation layers that the toolkit knows, and those that it does not, as its summary has them."""
    facts = tta.adapt(model, "source").summary()
    known = [f"{number} {kind}" for kind, number in facts.layers.items()]
    return ", ".join([*known, *(f"{number} {kind} (unknown)" for kind, number in facts.unknown.items())])


def add(out: Path, row: Row) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def load(out: Path) -> list[Row]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def missing(name: str, methods: Iterable[str], out: Path) -> list[str]:
    done = {row["method"] for row in load(out) if row["model"] == name}
    return [] if "" in done else [method for method in methods if method not in done]


def supervise(name: str, methods: list[str], out: Path) -> None:
    """Run an architecture in a process of its own, and again for what is left if it was killed."""
    while wanted := missing(name, methods, out):
        command = [sys.executable, __file__, "--child", name, "--methods", *wanted, "--out", str(out)]
        code = subprocess.run(command, check=False).returncode
        if code and (left := missing(name, methods, out)):
            reason = f"the process ended with code {code}"
            add(out, {"model": name, "method": left[0], "outcome": "raw", "reason": reason, "norms": "", "size": 0})
    found = Counter(row["outcome"] for row in load(out) if row["model"] == name)
    print(f"{name}: {', '.join(f'{number} {outcome}' for outcome, number in found.items())}", flush=True)


# ---------------------------------------------------------------------- what is shown


def table(rows: list[Row]) -> str:
    """The Markdown table, a row for each architecture, and below it why pairs were refused."""
    of: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of[row["model"]].append(row)
    lines = [f"| model | pixels | normalisation layers | {' | '.join(OUTCOMES)} |", f"|---|---|---|{'---|' * 5}"]
    for name in (name for name in ARCHITECTURES if name in of):
        counts, first = Counter(row["outcome"] for row in of[name]), of[name][0]
        facts = f"| {name} | {first.get('size', '')} | {first.get('norms') or 'none'} |"
        lines.append(f"{facts} {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |")
    total = Counter(row["outcome"] for row in rows)
    lines.append(f"| **{len(of)} models** | | | {' | '.join(f'**{total[outcome]}**' for outcome in OUTCOMES)} |")
    if left := [name for name in ARCHITECTURES if name not in of]:
        lines += ["", f"In the script, and not yet run: {', '.join(left)}."]
    return "\n".join([*lines, "", "Why pairs are refused:", "", *reasons(rows, "refused")])


def reasons(rows: list[Row], outcome: str) -> Iterator[str]:
    """Reasons of an outcome, most frequent first: how often, of which methods, and one of the sentences."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["outcome"] == outcome:
            groups[kind_of(row["reason"])].append(row)
    for group in sorted(groups.values(), key=len, reverse=True):
        methods = ", ".join(f"`{name}`" for name in dict.fromkeys(row["method"] for row in group))
        number = f"{len(group)} pair{'s' if len(group) > 1 else ''}"
        yield f"- {number} ({methods}): {' '.join(group[0]['reason'].split())} ({group[0]['model']})"


def kind_of(reason: str) -> str:
    """A sentence without what differs from pair to pair: names of classes and layers, numbers."""
    return re.sub(r"'[^']*'|\([^)]*\)|\S*[A-Z]\S*|\S*\d\S*", "", reason.partition(". ")[0])


def write_table(rows: list[Row], page: Path) -> None:
    text, (first, last) = page.read_text(encoding="utf-8"), MARKERS
    before, after = text.partition(first)[0], text.partition(last)[2]
    page.write_text(f"{before}{first}\n{table(rows)}\n{last}{after}", encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["*"], help="patterns such as 'timm:*'")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--out", type=Path, default=Path("matrix.jsonl"), help="a JSON object a line; continued")
    parser.add_argument("--table", type=Path, help="a page with the two markers, which the table is written between")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.names = [n for n in ARCHITECTURES if any(fnmatchcase(n, pattern) for pattern in arguments.models)]
    if not arguments.names:
        parser.error(f"no architecture matches {arguments.models}; there are: {', '.join(ARCHITECTURES)}")
    return arguments


def main() -> int:
    """Run what is missing, print a summary; 1 if a pair of those asked for failed or was silent."""
    arguments = parsed()
    if arguments.child:
        run(arguments.child, arguments.methods, arguments.out)
        return 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda name: supervise(name, arguments.methods, arguments.out), arguments.names))
    rows = [row for row in load(arguments.out) if row["model"] in arguments.names]
    if arguments.table:
        write_table(rows, arguments.table)
    for outcome in ("raw", "silent", "skipped"):
        print("\n".join([f"{outcome}:", *reasons(rows, outcome)]))
    total = Counter(row["outcome"] for row in rows)
    print(", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES))
    return 1 if total["raw"] or total["silent"] else 0


if __name__ == "__main__":
    sys.exit(main())
