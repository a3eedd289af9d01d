"""The parser of the ``tta`` command: its sub-commands, their options and help texts."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tta.cli import listings
from tta.report.tables import FORMATS

RUN_HELP = """\
Run methods on a stream, print the table, write the results. `tta run` alone is a quick demo.

words:      the stream (digits-c), methods (source norm tent ...), and settings key=value, in any order
settings:   lr=1e-3            every method named that has the key
            tent.lr=1e-3       one method
            stream.severity=3  the stream, and its protocol's parameters (protocol=correlated delta=0.1)
            model=digits-vit   the rest: model, checkpoint, num_classes, mean, std, source, preset, protocol, reset, seed,
                               class_names, templates (of a vision-language model: [cat,dog], ["a photo of a {}."]),
                               batch_size, precision, accelerator, num_workers (processes that read ahead), compile=true,
                               clean (true: predict clean images before and after),
                               leftover (keep: a last batch too small for a method does not join the one before),
                               frames (of maps and boxes, places in the stream of pictures kept for `tta plot maps`)
source:     source=FILE        source statistics for methods such as eata, saved by `tta source`, or a folder of images;
                               left out, the stream's own source images if it has any
ccc:        protocol=ccc matrix=FILE, or without one calibrated on the run's model: target=20 speed=1000 total=7500000
example:    tta run digits-c source tent severity=3 tent.lr=5e-3 seed=1 --out runs/mine
"""

SOURCE_HELP = """\
Record the source statistics that methods need, in one pass and one file, so that they run without source images.

DATA:       a stream with source images (digits-c), or a folder CLASS/IMAGE
METHOD:     methods, and the stream they will run on if it has only some of the model's classes (imagenet-r)
settings:   as in `tta run`: those of the methods, checkpoint, preset, accelerator
example:    tta source digits-cnn digits-c eata actmad -o source.safetensors
            tta run digits-c eata actmad source=source.safetensors
"""

CORRUPT_HELP = """\
Write a corrupted copy of images in the layout and format of the published sets. If stopped, the same command resumes.

SRC:        a folder CLASS/IMAGE; clean CIFAR as torchvision downloads it; or an .npy file, uint8 (n, height, width, 3)
DST:        gets CORRUPTION/SEVERITY/CLASS/IMAGE, or CORRUPTION.npy and labels.npy; tta-corrupt.json says how it was made
settings:   corruptions=[fog,snow] severities=[3,5] seed=0 recipe=imagenet; of a folder's images resize=256 crop=224
            quality=85, of JPEG files as in ImageNet-C (null: PNG, lossless); on_error=skip leaves broken files out
example:    tta corrupt imagenet/val data/ImageNet-C severities=[5] --workers 8
"""

BENCH_HELP = """\
Run a benchmark: methods x models x streams x protocols x seeds, one cell for each combination. If stopped, the same command
resumes; the table shows each failed cell with its reason, and failed cells are run again the next time.

NAME|FILE:  one of `tta list benchmarks`, or a .yaml file of your own
settings:   methods=[source,tent] seeds=[0,1]   replaces a list of the file
            stream.samples=100                  all streams; protocol.delta=0.1 all protocols
            tent.lr=1e-3 grid.lr=[1e-3,5e-4]    one method; every method that has the key, a row for each value
example:    tta bench ttab-mini --jobs 2
            tta table runs/ttab-mini --format latex
"""

TUNE_HELP = """\
Run a grid for each method and select hyper-parameters from it: with test labels (marked as oracle), with labels of the validation
corruptions only, and without labels. If stopped, the same command resumes.

words:      one of `tta list benchmarks` or a .yaml file; or a stream and methods
settings:   as in `tta bench`; select=[validation,entropy] for these ways of selection, grid.lr=[1e-2,1e-3] for this grid
ways:       episodic-oracle, online-last (both use test labels), validation, entropy, consistency
example:    tta tune digits-c source tent sar seeds=[0,1,2] stream.samples=100 --jobs 2
"""

PLOT_HELP = """\
Draw results, or the schedule of a stream.

WHAT:       curve (error over the stream), heatmap (method x domain), pareto (error against cost), calibration, grid (learning
            rate x steps), maps (of segmentation and detection: image, truth and predictions): of RESULTS, folders that
            `tta run --out` or `tta bench` wrote; or schedule (domains and classes in each batch of a stream)
words:      for schedule STREAM and settings as in `tta run`; no image is read
settings:   curve window=20 (batches); pareto cost=seconds; maps frames=[0,50] (places in the stream, of those that the run
            kept: its own frames=) score=0.5 (of boxes)
example:    tta plot curve runs/mine -o curve.svg
            tta plot schedule digits-c protocol=ptta -o ptta.png
"""


SERVE_HELP = """\
Serve a classifier that adapts to the pictures it is asked about: POST /predict, /metrics, /healthz, /readyz, /state, and /docs.

MODEL:      as in `tta list models`
METHOD:     left out: the default method with a guard
settings:   host=0.0.0.0 port=8000 batch_size=32 batch_timeout=0.01 (seconds that a picture waits for others)
            max_body= (bytes) max_pixels= max_images= (a request) max_requests= (at once) timeout= (seconds)
            state=DIR (saved there every autosave=100 batches and at the end, and gone on from) paused=true (predict only)
            checkpoint num_classes mean std class_names=FILE (a line each) device, source preset guard small_batches,
            and those of the method
token:      the environment variable TTA_SERVE_TOKEN (or token=) turns on POST /reset /snapshot /rollback /pause, GET /export
example:    tta serve digits-cnn state=runs/served
            curl --data-binary @picture.png -H 'Content-Type: image/png' localhost:8000/predict
"""

DEMO_HELP = """\
Play a corrupted stream on a local page: the pictures, source and adapted predictions side by side, the online error, alarms, and a
button for each corruption, severity and method. The page asks no other host for anything.

words:      in any order: digits (embedded, the default) or a folder CLASS/IMAGE with a model that knows its classes; a MODEL as in
            `tta list models`; a METHOD (left out: the default one)
settings:   host=127.0.0.1 port=8001 open=true (show it in a browser) interval=1 (seconds a batch) guard=true playing=true
            corruption=frost severity=5 batch_size=32 seed=0
            checkpoint num_classes mean std device, source (FILE or folder, for methods that need some), and those of the method
folder:     class_map=imagenet or FILE, class_order= as of the stream imagefolder; labels=false: nobody knows the classes
example:    tta demo
            tta demo photos/ torchvision:resnet18 tent class_map=imagenet open=true
"""

TRAIN_HELP = """\
Source stage: train a classifier together with a method's auxiliary part, or alone. One file holds both; `tta run ... checkpoint=FILE`
and `tta.adapt(model, METHOD, auxiliary=FILE)` take it. If stopped, the same command resumes.

METHOD:     one with a source stage (ttt, ttt_mae, clust3, itta, cta), or source for plain training
MODEL:      as in `tta list models`; from a random start unless there is a checkpoint= or pretrained=true; with num_classes=N
            their head, if it is for another number of classes, starts at random
DATA:       a stream with source images (digits-c), or a folder CLASS/IMAGE
settings:   epochs=30 batch_size=128 optimizer=sgd|adamw lr=0.1 momentum=0.9 weight_decay=5e-4 decay_vectors=true
            schedule=cosine|steps|one-cycle|constant label_smoothing=0 augment=paper|crop|none seed=0
            validation=0.1 (share held out) patience=0 (epochs without progress; the best weights are kept)
            save_every=100 (steps between checkpoints) logger=csv|tensorboard|none precision accelerator num_workers
            stream.KEY=VALUE (pacs: stream.held_out=sketch trains on the three other domains; stream.root stream.resize)
            checkpoint num_classes mean std, and those that say how the method's part is made (split, clusters ...)
example:    tta train ttt digits-cnn digits-c augment=crop epochs=20 -o mine.safetensors
            tta run digits-c source ttt model=digits-cnn checkpoint=mine.safetensors
"""

EXPORT_HELP = """\
Write what an adapter has learned as a plain model, which needs nothing of this toolkit. The file is run and compared with the
adapter, which learns nothing meanwhile, before it gets its name.

STATE:      a file of adapter.save, or one that `tta serve` saved in state=DIR
MODEL:      the source model that it was made with, as in `tta list models`
FILE:       .onnx (needs the extra `export`), .pt2 (torch.export.load), .safetensors (weights alone, for checkpoint= and load_state_dict)
settings:   images=DIR         pictures of the domain that the model is for: methods that normalise by the present batch take their
                               statistics from these, of all the others the file is compared on them (left out: on noise)
            samples=256        the first ones of a fixed random order
            checkpoint num_classes mean std class_names=FILE (a line each), as the state's model had them
            guard=false        export although the guard lets the source model answer
example:    tta export runs/adapter.safetensors digits-cnn images=pictures -o model.onnx
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of ``tta``; ``command`` of its result is a key of :data:`COMMANDS`, or None without a command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="tta", description="Test-time adaptation of vision models.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name,
                parents=[common],
                help=command.line,
                description=command.description,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", default=[], metavar="STREAM|METHOD|KEY=VALUE")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write results (default: runs/<date and time>)"
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|FILE")
    parser.add_argument("words", nargs="*", default=[], metavar="KEY=VALUE")
    _many_runs(parser)


def _tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="NAME|FILE|STREAM|METHOD|KEY=VALUE")
    _many_runs(parser)


def _many_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write results (default: runs/NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes of this machine (default: 1)")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; auto, or local for one on this machine")
    parser.add_argument("--format", default="terminal", choices=FORMATS, help="format of the table")


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("words", nargs="+", metavar="METHOD|KEY=VALUE")
    _one_file(parser, "where to write the statistics")


def _corrupt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("words", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one alone)")


def _table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--format", default="terminal", help=", ".join(FORMATS))
    parser.add_argument(
        "--metrics",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,...",
        help="such as ece,nll,forwards",
    )


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs=2,
        type=Path,
        metavar="RESULT",
        help="a folder with a result.json, or the file; the second may be published:NAME",
    )


def _plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT")
    parser.add_argument("words", nargs="*", default=[], metavar="RESULTS|STREAM|KEY=VALUE")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: WHAT.png; .svg and .pdf work too")


def _download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument(
        "parts", nargs="*", default=[], metavar="PART", help="parts of a data set that is published in several"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="target folder (default: TTA_DATA, else ./data or a cache)"
    )
    parser.add_argument("--trust", action="store_true", help="accept a file without a published checksum")
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("words", nargs="*", default=[], metavar="METHOD|KEY=VALUE")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", default=[], metavar="FOLDER|MODEL|METHOD|KEY=VALUE")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", type=Path, metavar="STATE")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("words", nargs="*", default=[], metavar="KEY=VALUE")
    _one_file(parser, "its suffix says the format")


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", metavar="METHOD")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("words", nargs="*", default=[], metavar="KEY=VALUE")
    _one_file(parser, "a .safetensors file")


def _one_file(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=list(listings.LISTINGS))


class Command(NamedTuple):
    """A sub-command: its line in the list of commands, a function that adds its arguments, and its help text."""

    line: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    description: str | None = None


COMMANDS = {
    "run": Command("run methods on a stream, print the table", _run, RUN_HELP),
    "bench": Command("run a benchmark, resumable, print its table", _bench, BENCH_HELP),
    "tune": Command("select hyper-parameters, with and without labels", _tune, TUNE_HELP),
    "source": Command("record the source statistics that methods need", _source, SOURCE_HELP),
    "train": Command("train a source model with a method's auxiliary part", _train, TRAIN_HELP),
    "corrupt": Command("write a corrupted copy of a folder of images or of CIFAR", _corrupt, CORRUPT_HELP),
    "table": Command("compare results on disk", _table),
    "diff": Command("name the fields in which two results differ", _diff),
    "plot": Command("draw results, or the schedule of a stream", _plot, PLOT_HELP),
    "serve": Command("serve an adapting classifier over HTTP", _serve, SERVE_HELP),
    "demo": Command("play a corrupted stream on a local page", _demo, DEMO_HELP),
    "export": Command("write an adapted model as ONNX, a torch program or weights", _export, EXPORT_HELP),
    "download": Command("get published data sets; alone: list them", _download),
    "list": Command("list methods, streams, models ...", _list),
}
