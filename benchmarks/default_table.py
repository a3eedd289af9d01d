"""The default beside the source and the best of the others, stream by stream, as Markdown.

    python benchmarks/default_table.py digits-cnn digits-vit --out runs/default
    python benchmarks/default_table.py cifar --root data --checkpoint resnet20.safetensors --samples 150 --out runs/default
    python benchmarks/default_table.py imagenet --root val --model timm:tf_efficientnet_lite0 --checkpoint FILE --out runs/default

A line is written after each method, and what is in the file is not run again. Corruptions, seed and orders are those that no
threshold was chosen on. Every method is shown as it is and with the chain of labels around it, which reads a method's
answers and changes nothing else: a method runs once for both. Shown as the best other is, of all that cost 6
forwards or less, the one with the lowest error on that very stream: nobody could have known it beforehand.
"""

import argparse
import json
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import tta
from tta.datasets.stream import Stream
from tta.methods._chain import LabelChain
from tta.results.cost import Passes

# The other six chose the thresholds, with seed 0: gaussian_noise, impulse_noise, defocus_blur, fog, contrast, jpeg_compression.
HELD_OUT = [
    "shot_noise",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "brightness",
    "elastic_transform",
    "pixelate",
]
SEED = 7
PROTOCOLS: dict[str, dict[str, Any]] = {
    "continual": {},
    "ptta": {"protocol": "ptta"},
    "mixed": {"protocol": "mixed"},
    "correlated": {"protocol": "correlated", "delta": 0.1},
    "label-shift": {"protocol": "label-shift"},
    "batch-1": {"protocol": "batch-1"},
    "cdc": {"protocol": "cdc"},
    "gradual": {"protocol": "gradual"},
    "recurring": {"protocol": "recurring", "rounds": 3},
    "per-domain": {"protocol": "per-domain"},
    "continual, batch 200": {"batch_size": 200},
    "ptta, batch 200": {"protocol": "ptta", "batch_size": 200},
    "mixed, batch 200": {"protocol": "mixed", "batch_size": 200},
    "correlated, batch 200": {"protocol": "correlated", "delta": 0.1, "batch_size": 200},
    "label-shift, batch 200": {"protocol": "label-shift", "batch_size": 200},
    "severity 1": {"severity": 1},
    "ptta, shuffled in the batch": {"protocol": "ptta", "shuffled": True},
    "correlated, shuffled in the batch": {"protocol": "correlated", "delta": 0.1, "shuffled": True},
}
METHODS: dict[str, dict[str, Any]] = {
    "source": {},
    "auto": {},
    "auto posterior=False": {"posterior": False},
    "norm": {},
    "norm alpha=0.8": {"alpha": 0.8},
    "tent": {},
    "rotta alpha=0.3": {"alpha": 0.3},
    "lame": {},
    "eata fisher_alpha=0": {"fisher_alpha": 0.0},
    "sar": {},
    "roid": {},
    "rotta": {},
    "note": {},
    "cmf": {},
    "deyo": {},
}
OURS = ("source", "auto", "auto posterior=False")


def stream_of(data: str, name: str, arguments: argparse.Namespace) -> tuple[Stream, bool]:
    settings = {"corruptions": HELD_OUT, "seed": SEED, "severity": 5, "batch_size": 64} | PROTOCOLS[name]
    shuffled = bool(settings.pop("shuffled", False))
    settings["samples"] = arguments.samples
    if name == "gradual":
        settings["corruptions"] = HELD_OUT[:3]
    if data == "cifar":
        return tta.stream("cifar10-c", root=arguments.root, **settings), shuffled
    if data == "imagenet":
        settings |= {"severity": min(3, settings["severity"]), "resize": None, "crop": None, "class_map": "imagenet"}
        return tta.stream("imagefolder-c", root=arguments.root, **settings), shuffled
    return tta.stream("digits-c", **settings), shuffled


def model_of(data: str, arguments: argparse.Namespace) -> torch.nn.Module:
    if data.startswith("digits"):
        return tta.load_model(data)
    return tta.load_model(arguments.model if data == "imagenet" else "cifar-resnet20", checkpoint=arguments.checkpoint)


def batches(stream: Stream, shuffled: bool) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images, labels and domains of the batches, made once for all methods; shuffled inside the batch, if asked."""
    generator, found = torch.Generator().manual_seed(SEED), []
    for batch in stream:
        order = torch.randperm(len(batch.labels), generator=generator) if shuffled else slice(None)
        found.append((batch.images[order], batch.labels[order], batch.domain[order]))
    return found


def run(model: torch.nn.Module, method: str, batches: list[Any], reset: bool) -> dict[str, Any]:
    """Mean error over the domains in %, as the method is and with the chain around it; passes an image, seconds."""
    name = method.partition(" ")[0]
    adapter, passes, chain = tta.adapt(model, name, **METHODS[method]), Passes(), LabelChain(3.5, 64)
    passes.attach(adapter)
    wrong: dict[str, dict[int, list[bool]]] = {"raw": defaultdict(list), "chain": defaultdict(list)}
    before, start = None, time.perf_counter()
    for images, labels, domains in batches:
        domain = int(domains[0])
        if reset and before not in (None, domain):
            adapter.reset()
            chain = LabelChain(3.5, 64)
        before = domain
        logits = adapter(images)
        found = chain.read(logits)
        chain.remember(found, torch.tensor(True))
        for key, answer in (("raw", logits), ("chain", torch.where(found.sticky, found.chained, logits))):
            for where, error in zip(domains.tolist(), (answer.argmax(1) != labels).tolist(), strict=True):
                wrong[key][where].append(error)
    count = sum(map(len, wrong["raw"].values()))
    errors = {
        key: 100 * sum(sum(found) / len(found) for found in domains.values()) / len(domains)
        for key, domains in wrong.items()
    }
    return errors | {
        "forwards": passes.forwards / count,
        "backwards": passes.backwards / count,
        "images": count,
        "seconds": time.perf_counter() - start,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a stream."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["data"], row["stream"]][row["method"]] = row
    lines = [
        "| | source | `auto` without posterior | best other | `auto` | forwards | source, chain | best other, chain |",
        "|---|--:|--:|---|--:|--:|--:|---|",
    ]
    for (data, stream), by in found.items():
        others = [row for method, row in by.items() if method not in OURS and row["forwards"] <= 6]
        best = {key: min(others, key=lambda row: row[key]) if others else None for key in ("raw", "chain")}
        cells = [f"{data}: {stream}"]
        cells += [
            _number(by.get("source"), "raw"),
            _number(by.get("auto posterior=False"), "raw"),
            _named(best["raw"], "raw"),
        ]
        cells += [_number(by.get("auto"), "raw"), _number(by.get("auto"), "forwards")]
        cells += [_number(by.get("source"), "chain"), _named(best["chain"], "chain")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(row: dict[str, Any] | None, key: str) -> str:
    return f"{row[key]:.1f}" if row else ""


def _named(row: dict[str, Any] | None, key: str) -> str:
    return f"{row[key]:.1f} `{row['method']}` ({row['forwards']:.1f})" if row else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", choices=["digits-cnn", "digits-vit", "cifar", "imagenet"])
    parser.add_argument("--root", help="folder of the clean images")
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0", help="for imagenet")
    parser.add_argument("--checkpoint")
    parser.add_argument("--samples", type=int, default=300, help="images a corruption")
    parser.add_argument("--streams", nargs="*", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, required=True, help="folder of default.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "default.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for data in arguments.data:
        model = model_of(data, arguments)
        shown = f"{data} {arguments.model}" if data == "imagenet" else data
        for name in arguments.streams:
            done = {row["method"] for row in rows if (row["data"], row["stream"]) == (shown, name)}
            if not (left := [method for method in arguments.methods if method not in done]):
                continue
            stream, shuffled = stream_of(data, name, arguments)
            made = batches(stream, shuffled)
            for method in left:
                try:
                    row = run(model, method, made, stream.reset == "domain")
                except ValueError as error:  # a model that the method does not adapt
                    print(f"{shown} {name} {method}: {str(error).partition('.')[0]}", flush=True)
                    continue
                rows.append({"data": shown, "stream": name, "method": method} | row)
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
