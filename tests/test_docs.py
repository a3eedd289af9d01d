"""The documentation says what is there: its links, commands, names and examples are those of the code."""

import importlib
import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import yaml

import tta
from tta import artefact, benchmark
from tta.cli import arguments as words
from tta.cli import demo, exporting, parser, serving
from tta.cli import training as stage
from tta.datasets import catalog, download
from tta.report import figures
from tta.results import published

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [code for kind, code in FENCE.findall(PAGES[page]) if kind == language]


def prose(page):
    return FENCE.sub("", PAGES[page])


def anchors(text):
    """Anchors of the headings, as links name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def problem(command):
    """Problem of a command; None where every name in it is known. Nothing is read, run or downloaded."""
    try:
        given = parser.make_parser().parse_args(shlex.split(command, comments=True)[1:])
        action = given.command
        if action == "plot" and given.what != "schedule":
            assert given.what in figures.FIGURES
        elif action in ("run", "plot", "source"):
            stream = [given.data] if action == "source" and given.data in catalog.STREAMS else []
            words.parse_request([*stream, *given.words])
        elif action == "serve":
            serving.parse(given.words)
        elif action == "demo":
            demo.parse(given.words)
        elif action == "train":
            stage.parse(given.method, given.words)
        elif action == "export":
            exporting.parse(given.words)
            assert given.out.suffix in artefact.FORMATS
        elif action == "bench" and given.name.endswith(".yaml"):
            words.key_values(given.words)
        elif action == "bench":
            benchmark.load(given.name, words.key_values(given.words))
        elif action == "tune":
            request = words.parse_request([word for word in given.words if "=" not in word])
            described = {"methods": request.methods, "streams": [request.stream]}
            benchmark.load(described, words.key_values([word for word in given.words if "=" in word]))
        elif action == "diff" and str(given.results[1]).startswith("published:"):
            published.find(str(given.results[1]).partition(":")[2])
        elif action == "download" and given.name:
            assert set(given.parts) <= set(download.archives()[given.name].parts)
    except SystemExit:
        return "the command line does not understand it"
    except (ValueError, KeyError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = folder / file if file else ROOT / page
        assert there.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(there.read_text()), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    lines = [line for code in blocks(page, "bash") for line in code.splitlines()]
    commands = [line.partition(" > ")[0] for line in lines if line.startswith("tta ")]
    assert [f"{command}: {wrong}" for command in commands if (wrong := problem(command))] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_sentence_are_there(page):
    known = parser.COMMANDS
    named = re.findall(r"`tta ([a-z]+)", prose(page))
    named_scripts = re.findall(r"`python (\S+\.py)", prose(page))
    assert [name for name in named if name not in known] == []
    assert [name for name in named_scripts if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in PAGES[page]])
def test_benchmarks_shown_are_understood(page):
    for code in blocks(page, "yaml"):
        assert benchmark.load(yaml.safe_load(code))


@pytest.mark.parametrize(
    "command",
    [
        "tta runn digits-c",
        "tta run digits-d source",
        "tta run digits-c tnet",
        "tta run digits-c source protocol=continual delta=0.1",
        "tta list things",
        "tta bench ttab-maxi",
        "tta tune digits-c tent select=[guess]",
        "tta diff runs/a published:tent",
        "tta download cifar11-c",
        "tta download imagenet-c noises",
        "tta source digits-cnn digits-c eata severity=9",
        "tta serve digits-cnn tnet",
        "tta serve digits-cnn tent prot=80",
        "tta demo digits-cnn tnet",
        "tta demo tent rate=1",
        "tta train tent digits-cnn digits-c -o a.safetensors",
        "tta train ttt digits-cnn digits-c epoch=3 -o a.safetensors",
        "tta export a.safetensors digits-cnn -o model.tflite",
        "tta export a.safetensors digits-cnn image=pictures -o model.pt2",
    ],
)
def test_a_wrong_command_is_found(command):
    assert problem(command)


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for item in (entry.values() if isinstance(entry, dict) else entry) for file in files(item)]

    found = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = [file.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for file in DOCS.rglob(kind)]
    assert sorted(found) == sorted(pages)


def resolve(name):
    """The object of a dotted name, whose first parts are a module."""
    module, rest = name, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        found = getattr(found, part)
    return found


def documented():
    return [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", PAGES[page], re.MULTILINE)]


def test_documented_names_exist():
    referred = [name for page in PAGES for name in re.findall(r"\]\[(tta[\w.]*)\]", prose(page))]
    assert referred
    for name in [*documented(), *referred]:
        assert resolve(name) is not None


def test_public_names_are_documented():
    found = [id(resolve(name)) for name in documented()]
    assert [name for name in tta.__all__ if id(getattr(tta, name)) not in found] == []


def test_what_there_is_has_its_place():
    protocols = " ".join(text for page, text in PAGES.items() if page.startswith("docs/protocols/"))
    assert [name for name in catalog.PROTOCOLS if f"`{name}`" not in protocols] == []
    assert [name for name in catalog.STREAMS if f"`{name}`" not in PAGES["docs/streams.md"]] == []
    assert [name for name in benchmark.available() if f"`{name}`" not in PAGES["docs/benchmarks.md"]] == []
    ways = PAGES["docs/benchmarks.md"]
    assert [name for name in benchmark.WAYS if f"`{name}`" not in ways] == []


@pytest.mark.parametrize("page", [page for page in PAGES if "reproduce/" in page])
def test_published_numbers_are_those_of_the_tables_named(page):
    tables = [published.find(name) for name in published.available() if re.search(rf"\b{name}(?![\w-])", PAGES[page])]
    known = {row["mean"] if isinstance(row, dict) else row for table in tables for row in table.rows.values()}
    rows = re.findall(r"^\| published.*$", PAGES[page], re.MULTILINE)
    numbers = [float(number) for row in rows for number in re.findall(r"(?<![\w.-])\d+\.\d(?![\w.])", row)]
    assert numbers or not rows
    assert [number for number in numbers if number not in known] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and "```python" in PAGES[page]])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = re.sub(r'--8<-- "README.md:(\w+)"', lambda found: section(found[1]), PAGES[page])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run([code for kind, code in FENCE.findall(text) if kind == "python"], page)


def section(name):
    """A part of the README that a page includes."""
    return PAGES["README.md"].partition(f"[start:{name}] -->\n")[2].partition(f"<!-- --8<-- [end:{name}]")[0]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`").use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], "notebook")


def run(codes, where):
    """Run pieces of code one after another in one namespace."""
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(codes):
        exec(compile(code, f"{where}, block {number}", "exec"), namespace)
