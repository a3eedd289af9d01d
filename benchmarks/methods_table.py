"""Facts about every method: writes configs/methods.yaml (for `tta list methods`), docs/methods.md and README's count.

    python benchmarks/methods_table.py            # every method
    python benchmarks/methods_table.py tent sar   # measure and print these alone, keep the measurements of the others

No fact is typed in here. Meaning and papers come from the docstrings, needs from `source_needs`, models from what the method
can be built on, parity from the golden tests; passes and batches are measured. Of a method that is named and unfinished,
one sentence says what is missing, and nothing is written.
"""

import argparse
import ast
import copy
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Subset

import tta
from tta import config, methods
from tta.adapter import Adapter, config_class
from tta.datasets import catalog
from tta.results.cost import Passes

ROOT = Path(__file__).parent.parent
DATA, PAGE = ROOT / "configs" / "methods.yaml", ROOT / "docs" / "methods.md"
README, REFERENCES = ROOT / "README.md", ROOT / "docs" / "references.bib"
BATCH, BATCHES, CORRUPTION = 64, 4, "impulse_noise"
ALONE = 16  # images that are tried one by one
MEASURED = ("batch", "forwards", "backwards")
CITATION = re.compile(r'"([A-Z][^"]+)", ([A-Za-z][A-Za-z ]*?(?: \d{4}\.\d{4,5})?),? ((?:19|20)\d\d)\b')
LITERAL = re.compile(r"``([^`]+)``")
MORE = re.compile(r"There are (\d+) more")  # in README, after its table of methods


# ---------------------------------------------------------------------- what docstrings say


def about(kind: type[Adapter]) -> str:
    """The first line of a method's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def papers(kind: type[Adapter]) -> list[str]:
    """``TITLE, VENUE YEAR`` of each paper that a method's docstring cites as ``"TITLE", VENUE YEAR``."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    return [f"{title}, {venue} {year}" for title, venue, year in CITATION.findall(text)]


def attributes(kind: type) -> dict[str, str]:
    """Meaning of each field of a dataclass: the entries below ``Attributes:`` in its docstring and its bases'."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = (inspect.getdoc(base) or "").partition("Attributes:\n")[2] if is_dataclass(base) else ""
        for names, text in re.findall(r"^    ([a-z_0-9, ]+): (.+(?:\n {8}.+)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def released(kind: type) -> dict[str, Any]:
    """Fields of a configuration that bring back what the released code does, where its default does something else.

    They are those whose documentation speaks of the released code or program. The value is the last ``literal`` up to
    there, of a switch the other position; None where the text gives none.
    """
    found = {}
    texts = attributes(kind)
    for field in fields(kind):
        before, word, after = texts.get(field.name, "").partition("released")
        if not word:
            continue
        literals = LITERAL.findall(before + word + after[:3])  # the word itself may be one: ``"released"``
        value = not field.default if isinstance(field.default, bool) else None
        if literals and value is None:
            value = ast.literal_eval(literals[-1])
        if value != field.default or value is None:
            found[field.name] = value
    return found


# ---------------------------------------------------------------------- what the code declares


@cache
def families() -> dict[str, nn.Module]:
    """A model for each kind of normalisation, and one of two towers: the embedded ones, and the CNN with GroupNorm layers."""
    cnn = tta.load_model("digits-cnn")
    grouped = copy.deepcopy(cnn)
    for name, layer in list(grouped.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            grouped.set_submodule(name, nn.GroupNorm(8, layer.num_features))
    vit, clip = tta.load_model("digits-vit"), tta.load_model("digits-clip")
    return {"BatchNorm": cnn, "GroupNorm": grouped.eval(), "ViT": vit, "CLIP": clip}


@cache
def source_images() -> Subset[Any]:
    """With their labels, for the methods that need these."""
    return Subset(catalog.source_images("digits-c"), range(2 * BATCH))


def make(method: str, family: str) -> Adapter:
    kind = methods.find(method)
    (task, *_) = kind.tasks  # a method that serves one other task must be told
    brief = {"source_steps": 1} if methods.has_source_stage(kind) else {}  # no fact depends on what a part has learned
    return tta.adapt(families()[family], method, source=source_images(), task=task, **brief)


def models(method: str) -> list[str]:
    """Kinds of models on which a method can be built."""
    return [family for family in families() if _builds(method, family)]


def _builds(method: str, family: str) -> bool:
    try:
        make(method, family)
    except ValueError:
        return False
    return True


def source(method: str, family: str) -> str:
    """Source knowledge that a method needs, and the settings that change it."""
    model, default = families()[family], config_class(methods.find(method))()

    def needs(**change: Any) -> list[Any]:
        return methods.source_needs(model, method, **change)

    if not needs():
        return "nothing"
    kinds = ", ".join(need.kind.replace("_", " ") for need in needs())
    text = f"{'labelled' if any(need.labels for need in needs()) else 'unlabelled'} images ({kinds})"
    for field in fields(default):
        value = getattr(default, field.name)
        other = "FILE" if field.name == "auxiliary" else 0
        change = {field.name: not value if isinstance(value, bool) else other}
        try:
            changed = needs(**change)
        except ValueError:
            continue
        if not changed:
            text += f"; nothing with {_setting(change)}"
        elif any(need.labels for need in changed) and not any(need.labels for need in needs()):
            text += f"; labelled with {_setting(change)}"
    return text


def _setting(change: dict[str, Any]) -> str:
    """As the command line takes it."""
    return " ".join(
        name if value is None else f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in change.items()
    )


# ---------------------------------------------------------------------- what the golden tests compare


@cache
def golden() -> dict[str, list[str]]:
    """Method -> keys of the golden logits that ``test_logits_equal_*`` in tests/test_golden*.py compares it with."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests").glob("test_golden*.py")):
        module = _load(file)
        for key in _compared(module):
            (method,) = (text for text in _texts(module.ROWS[key]) if text in methods.available())
            found.setdefault(method, []).append(key)
    return found


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compared(module: ModuleType) -> Iterator[str]:
    """Keys with which pytest calls the comparison, but those expected to fail."""
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", []) if name.startswith("test_logits_equal") else []:
            if mark.name == "parametrize" and mark.args[0] == "key":
                for key in mark.args[1]:
                    if not any(other.name in ("xfail", "skip") for other in getattr(key, "marks", ())):
                        yield key if isinstance(key, str) else key.values[0]


def _texts(row: Any) -> Iterator[str]:
    for item in row:
        if isinstance(item, str):
            yield item
        elif isinstance(item, tuple):
            yield from _texts(item)


# ---------------------------------------------------------------------- what is measured


@cache
def batches() -> tuple[Tensor, ...]:
    stream = tta.stream("digits-c", severity=5, batch_size=BATCH, seed=0, corruptions=[CORRUPTION])
    return tuple(batch.images for batch, _ in zip(stream, range(BATCHES), strict=False))


def measured(method: str, built: list[str]) -> dict[str, Any]:
    """Passes an image with the method's defaults, and whether it matters how images are batched."""
    adapter, passes = make(method, built[0]), Passes()
    passes.attach(adapter)
    for batch in batches():
        adapter(batch)
    passes.detach()
    images = sum(map(len, batches()))
    counts = {"forwards": passes.forwards / images, "backwards": passes.backwards / images}
    return {"batch": batch_size(method, built)} | {name: round(count, 1) for name, count in counts.items()}


def batch_size(method: str, built: list[str]) -> str:
    """The finding of :func:`_batched`, one for each kind of model where they differ."""
    found = {family: _batched(method, family) for family in built if family != "GroupNorm"}  # not trained with it
    texts = list(found.values())
    return texts[0] if len(set(texts)) == 1 else "; ".join(f"{family}: {text}" for family, text in found.items())


def _batched(method: str, family: str) -> str:
    """``any`` where an image's logits are the same alone and in a batch, and single images teach where batches do."""
    images = batches()[0][:ALONE]
    alone, together = make(method, family), make(method, family)
    try:
        difference = alone(images[:1])[0] - together(images)[0]
        alone.reset()
        together.reset()
        learns = not _learns(together, [images]) or _learns(alone, list(images.split(1)))
    except ValueError:
        return "2 or more"
    found = ["predicts by batch"] if difference.abs().max() > 1e-3 else []
    return ", ".join(found if learns else [*found, "single images teach nothing"]) or "any"


def _learns(adapter: Adapter, stream: list[Tensor]) -> bool:
    """Whether the stream changes what is saved, beside counters and what random numbers come next."""
    before = {name: value.clone() for name, value in adapter.state_dict().items() if value.is_floating_point()}
    for batch in stream:
        adapter(batch)
        after = {name: value for name, value in adapter.state_dict().items() if value.is_floating_point()}
        if after.keys() != before.keys() or any(not torch.equal(value, after[name]) for name, value in before.items()):
            return True
    return False


# ---------------------------------------------------------------------- the two files

INTRODUCTION = """\
# Methods

Written by `python benchmarks/methods_table.py`, and what `tta list methods` prints; a test holds it to the code.

- *of the source*: what a method must know of the source domain, given as `source=`; nothing else of it is read.
- *models*: kinds of models on which it can be built: CNNs with BatchNorm or GroupNorm layers, timm's ViTs.
- *batch*: `any` where an image's logits are the same alone and in a batch of {alone}, and single images teach where a batch
  does. Tried on the images below with the embedded BatchNorm CNN and ViT: `single images teach nothing` may be a rule of
  the method, or a filter that none of {alone} passes.
- *forwards*, *backwards*: images that went through the models, views and teachers included, for each image of the stream:
  counted with the defaults of the method on {batches} batches of {batch} (digits-c, {corruption}, severity 5), on the first
  of its models. What a filter leaves out does not go backward; what a new domain costs is spread over these few images.
- *golden keys*: runs of released code whose logits a test compares with ours; listed below.
- *as released*: the option under which the method does what the released code does, where the default does not, or
  the option whose documentation tells what the released code does.
"""
PARITY = """\
With the same settings the paper's released code, or where the test says so a community's, gave the same logits on a small
stream: `tests/test_golden*.py` compare them and say how closely. A method without a golden key was compared with no
released code."""


def declared(method: str) -> dict[str, Any]:
    """All that need not be measured."""
    kind = methods.find(method)
    built = models(method)
    return {
        "about": about(kind),
        "papers": papers(kind),
        "source": source(method, built[0]),
        "models": built,
        "golden": golden().get(method, []),
        "released": [_setting({name: value}) for name, value in released(config_class(kind)).items()],
    }


def page(facts: dict[str, dict[str, Any]]) -> str:
    """docs/methods.md."""
    lines = [INTRODUCTION.format(batches=BATCHES, batch=BATCH, corruption=CORRUPTION, alone=ALONE)]
    lines += ["| method | paper | of the source | models | batch | forwards | backwards | golden keys | as released |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name, fact in facts.items():
        cells = [
            f"`{name}`",
            "; ".join(fact["papers"]),
            fact["source"],
            ", ".join(fact["models"]),
            fact["batch"],
            f"{fact['forwards']:g}",
            f"{fact['backwards']:g}",
            str(len(fact["golden"]) or "none"),
            ", ".join(f"`{option}`" for option in fact["released"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What they do", ""]
    lines += [f"- `{name}`: {fact['about']}" for name, fact in facts.items()]
    lines += ["", "## Golden keys", "", PARITY, ""]
    for name, fact in facts.items():
        if fact["golden"]:
            lines.append(f"- `{name}`: {', '.join(fact['golden'])}")
        else:
            lines.append(f"- `{name}`: no golden key, {_held_by(name)}")
    return "\n".join(lines) + "\n"


def _held_by(method: str) -> str:
    own = ROOT / "tests" / f"test_{method}.py"
    return f"tested by `tests/{own.name}` alone" if own.exists() else "and no test of its own"


def load() -> dict[str, dict[str, Any]]:
    return config.load(".", "methods")


def references() -> dict[str, tuple[str, str]]:
    """Title -> (venue as printed, year) of docs/references.bib, titles and venues in lower case."""
    found = {}
    for entry in re.split(r"^@", REFERENCES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        lines = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry, re.MULTILINE))
        venue = lines.get("booktitle") or lines["journal"]
        found[re.sub(r"[{}]", "", lines["title"]).lower()] = (venue.lower(), lines["year"])
    return found


def missing(method: str) -> list[str]:
    """Parts that a finished method has and this one lacks, each with where it belongs; empty for a finished one."""
    kind, found = methods.find(method), []
    if not about(kind):
        found.append(f"a docstring of {kind.__name__}")
    if not papers(kind):
        found.append(f'a paper in the docstring of {kind.__name__}, as AUTHORS, "TITLE", VENUE YEAR')
    for paper in papers(kind):
        title = CITATION.sub("", paper).rpartition(", ")[0]
        if title.lower() not in references():
            found.append(f"an entry '{title}' in docs/references.bib")
    undocumented = [
        field.name for field in fields(config_class(kind)) if field.name not in attributes(config_class(kind))
    ]
    if undocumented:
        found.append(f"{', '.join(undocumented)} in the Attributes of {config_class(kind).__name__}")
    tests = [file for file in (ROOT / "tests").glob("test_*.py") if f'"{method}"' in file.read_text(encoding="utf-8")]
    if not tests:
        found.append(f"tests/test_{method}.py, which recomputes one update in the plainest way")
    if not models(method):
        found.append(f"a model among {', '.join(families())} that it can be built on")
    return found


def more_in_readme() -> int:
    """Number of methods that README's table leaves out."""
    shown = re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    return len(set(methods.available()) - set(shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="*", help="measure and print these alone")
    chosen = parser.parse_args().method
    for name in chosen:
        if name not in methods.available():
            parser.error(f"no method '{name}'.{config.nearest(name, methods.available())}")
        if lacks := missing(name):
            parser.exit(1, f"{name} is not finished, nothing was written. Missing: {'; '.join(lacks)}.\n")

    known, facts = load(), {}
    for name in methods.available():
        facts[name] = declared(name)
        again = name in chosen or not chosen or name not in known
        facts[name] |= measured(name, facts[name]["models"]) if again else {key: known[name][key] for key in MEASURED}
        if again:
            print(f"{name}: {facts[name]}", flush=True)
    header = "# Facts about the methods, written by benchmarks/methods_table.py. Do not edit.\n"
    DATA.write_text(header + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    PAGE.write_text(page(facts), encoding="utf-8")
    README.write_text(
        MORE.sub(f"There are {more_in_readme()} more", README.read_text(encoding="utf-8")), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
