"""The source stage: files that adapters take, resumption bit for bit, early stop, loggers, and what is refused."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file

import tta
from tta import methods, taps, training
from tta.cli import main, parser
from tta.datasets import digits
from tta.training.data import Steps, divided

IMAGES, LABELS, _ = digits.split("train")
SMALL = IMAGES[:96], LABELS[:96]
PREPARING = [name for name in tta.list_methods() if methods.has_source_stage(methods.find(name))]
QUICK = {"epochs": 2, "batch_size": 32, "augment": "crop", "validation": 0.0, "lr": 0.05}


def network():
    torch.manual_seed(0)
    return tta.load_model("digits-cnn", pretrained=False)


def trained(method, file, settings=None, data=SMALL, **hparams):
    return training.train(
        method, network(), data, file, settings={**QUICK, **(settings or {})}, progress=False, **hparams
    )


@pytest.mark.parametrize(
    ("method", "hparams"),
    [
        ("ttt", {"rotations": "random"}),
        ("clust3", {"projectors": 2}),
        ("itta", {"loss_depth": 2}),
        ("cta", {"width": 8}),
    ],
)
def test_the_file_is_taken_by_checkpoint_and_by_auxiliary(method, hparams, tmp_path):
    file = tmp_path / "both.safetensors"
    done = trained(method, file, **hparams)
    assert (done.path, done.steps, done.error) == (file, 6, None)
    model = tta.load_model("digits-cnn", checkpoint=file)
    x = IMAGES[:4].float() / 255
    quick = {"steps": 1, **({"copies": 4} if method == "ttt" else {})}
    carried = tta.adapt(model, method, **quick)(x)
    model.auxiliary = None
    assert torch.equal(tta.adapt(model, method, auxiliary=file, **quick)(x), carried)
    plain = type(model.model)()
    missing, _ = plain.load_state_dict(load_file(file), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert torch.equal(plain.fc.weight, model.model.fc.weight)
    assert not torch.equal(plain.fc.weight, network().model.fc.weight)


def test_plain_training_learns(tmp_path):
    done = trained(
        "source",
        tmp_path / "a.safetensors",
        {"epochs": 10, "validation": 0.25, "augment": "none"},
        (IMAGES[:256], LABELS[:256]),
    )
    assert done.error < 40  # of ten classes 90 would be guessing; about 10 is found


def test_the_same_call_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        trained("ttt", tmp_path / f"{name}.safetensors", {"epochs": 1})
    assert not torch.are_deterministic_algorithms_enabled()  # the trainer's switch is not left behind
    other = trained("ttt", tmp_path / "c.safetensors", {"epochs": 1, "seed": 1})
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1] != other.path.read_bytes()


class Stop(Callback):
    """Ends the training behind a step, as a crash does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


@pytest.mark.parametrize("stops", [(3,), (5,)], ids=["within an epoch", "in the second epoch"])
def test_a_stopped_training_ends_with_the_same_weights(stops, tmp_path):
    settings = {"save_every": 2, "validation": 0.25, "patience": 4, "batch_size": 24}
    whole = trained("clust3", tmp_path / "whole.safetensors", settings, projectors=1)
    for step in stops:
        with pytest.raises(RuntimeError, match="crash"):
            training.train(
                "clust3",
                network(),
                SMALL,
                tmp_path / "part.safetensors",
                settings={**QUICK, **settings},
                progress=False,
                callbacks=[Stop(step)],
                projectors=1,
            )
    assert (tmp_path / "part.safetensors.resume").is_file()
    again = trained("clust3", tmp_path / "part.safetensors", settings, projectors=1)
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert again.error == whole.error
    assert not (tmp_path / "part.safetensors.resume").exists()


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import test_training as t
class Kill(t.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            os.kill(os.getpid(), 9)
def replace(part, file, really=os.replace):
    if file.name.endswith(".resume") and torch.load(part, weights_only=False)["global_step"] == 4:
        os.kill(os.getpid(), 9)
    really(part, file)
if sys.argv[3] == "while it saves":
    os.replace = replace
callbacks = [Kill()] if sys.argv[3] == "between" else []
t.training.train("ttt", t.network(), t.SMALL, sys.argv[1], settings={**t.QUICK, "save_every": 1}, progress=False, callbacks=callbacks)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("when", "left"), [("between", 1), ("while it saves", 2)])
def test_a_killed_process_resumes_to_the_same_weights(when, left, tmp_path):
    settings, home = {"save_every": 1}, tmp_path / "part"
    whole = trained("ttt", tmp_path / "whole.safetensors", settings)
    home.mkdir()
    words = [str(home / "a.safetensors"), os.path.dirname(__file__), when]
    assert subprocess.run([sys.executable, "-c", KILLED, *words]).returncode == -9
    assert len(list(home.iterdir())) == left
    assert trained("ttt", home / "a.safetensors", settings).path.read_bytes() == whole.path.read_bytes()
    assert [file.name for file in home.iterdir()] == ["a.safetensors"]


def test_what_a_killed_training_left_is_removed_and_what_others_write_stays(tmp_path):
    host, file = socket.gethostname(), tmp_path / "a.safetensors"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = f".{file.name}.resume.{host}"
    kept = [f"{mine}.{os.getppid()}.0a1b2c3d", f".{file.name}.resume.elsewhere.{ended.pid}.0a1b2c3d", ".b.resume.1"]
    gone = [f"{mine}.{ended.pid}.0a1b2c3d", f"{mine}.{os.getpid()}.0a1b2c3d", f".{file.name}.resume.{ended.pid}"]
    for name in kept + gone:
        (tmp_path / name).write_text("half")
    trained("source", file, {"epochs": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, file.name])


def test_other_settings_do_not_resume(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        training.train(
            "source", network(), SMALL, file, settings={**QUICK, "save_every": 1}, progress=False, callbacks=[Stop(3)]
        )
    with pytest.raises(ValueError, match=r"is of a training with another lr\. Give the same to resume"):
        trained("source", file, {"save_every": 1, "lr": 0.1})
    with pytest.raises(ValueError, match="with another images"):
        trained("source", file, {"save_every": 1}, (IMAGES[:97], LABELS[:97]))
    assert trained("source", file, {"save_every": 50, "logger": "csv"}).steps == 6  # which change no number


def test_early_stop_keeps_the_best_weights(tmp_path):
    settings = {"epochs": 30, "validation": 0.25, "patience": 1, "lr": 1e-6, "batch_size": 64, "schedule": "constant"}
    done = trained("source", tmp_path / "a.safetensors", settings)  # at such a rate nothing improves
    assert done.steps < 30
    model = tta.load_model("digits-cnn", checkpoint=done.path)
    _, held = divided(torch.utils.data.TensorDataset(*SMALL), training.TrainSettings(**{**QUICK, **settings}))
    images = torch.stack([image for image, _ in held]).float() / 255
    wrong = (model(images).argmax(1) != torch.stack([label for _, label in held])).float().mean()
    assert done.error == pytest.approx(100 * float(wrong))


def test_each_epoch_has_another_order_and_every_image_once():
    steps = Steps(10, 3, 0)
    first = [position for batch in steps for position in batch]
    steps.done = lambda: 3
    second = [position for batch in steps for position in batch]
    steps.done = lambda: 4
    assert [position for batch in steps for position in batch] == second[3:]
    assert len({*first}) == len(first) == 9
    assert first != second


def test_the_command_line(tmp_path, capsys):
    file = tmp_path / "mine.safetensors"
    words = ["epochs=1", "batch_size=400", "augment=none", "ttt.rotations=random", "logger=csv", "validation=0.5"]
    assert main(["train", "ttt", "digits-cnn", "digits-c", *words, "-o", str(file)]) == 0
    assert "ttt on digits-cnn after 1 steps, error" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "mine.safetensors.logs" / "metrics.csv").is_file()
    run = [
        "model=digits-cnn",
        f"checkpoint={file}",
        "samples=4",
        "corruptions=[fog]",
        "copies=2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["run", "digits-c", "ttt", *run]) == 0


def test_weights_of_other_classes_are_fine_tuned_with_a_new_head_and_refused_by_a_run(tmp_path, capsys):
    donor = tta.load_model("digits-cnn-8")
    save_file(donor.model.state_dict(), tmp_path / "eight.safetensors")
    checkpoint, file = f"checkpoint={tmp_path / 'eight.safetensors'}", tmp_path / "ten.safetensors"
    words = ["epochs=1", "batch_size=1000", "augment=none", "lr=1e-9", checkpoint, "-o", str(file)]
    assert main(["train", "source", "digits-cnn", "digits-c", *words]) == 2
    assert "It is for 8 classes, the network is for 10" in capsys.readouterr().err
    assert main(["train", "source", "digits-cnn", "digits-c", "num_classes=10", *words]) == 0
    assert "was trained for 8 classes: the head (fc) starts at random for 10" in capsys.readouterr().err
    trained = tta.load_model("digits-cnn", checkpoint=file).model
    torch.testing.assert_close(trained.layer3.conv2.weight, donor.model.layer3.conv2.weight)
    assert trained.fc.weight.std() > 0
    run = ["run", "digits-c", "source", "model=digits-cnn", "num_classes=10", "samples=4", checkpoint]
    assert main([*run, "--out", str(tmp_path / "out")]) == 2
    assert "num_classes=8 makes one for 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tent", "digits-cnn", "digits-c"], "Method 'tent' has no source stage"),
        (["ttt", "digits-cnn", "digits-c", "lrr=1"], "No setting 'lrr'. Did you mean 'lr'?"),
        (["ttt", "digits-cnn", "cifar10-c"], "offers no source images"),
        (["ttt", "cifar-resnet20", "digits-c", "epochs=0"], "epochs=0"),
    ],
)
def test_wrong_words_are_told(words, said, tmp_path, capsys):
    assert main(["train", *words, "-o", str(tmp_path / "a.safetensors")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path, capsys):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"hours of work")
    words = [
        "train",
        "source",
        "digits-cnn",
        "digits-c",
        "epochs=1",
        "batch_size=1000",
        "augment=none",
        "-o",
        str(file),
    ]
    assert main(words) == 2
    assert f"'{file}' exists: name another file, or replace it with --force." in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert file.read_bytes() == b"hours of work"
    assert main([*words, "--force"]) == 0
    assert tta.load_model("digits-cnn", checkpoint=file)(IMAGES[:2].float() / 255).isfinite().all()


@pytest.mark.parametrize("stream", ["digits-mosaic", "camvid"])
def test_a_stream_of_maps_is_told_from_the_command_line(stream, tmp_path, capsys):
    assert main(["train", "ttt_mae", "digits-maps", stream, "-o", str(tmp_path / "a.safetensors")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"Stream '{stream}' is of segmentation; a source stage trains classifiers." in said
    assert "source=FOLDER of `tta run`" in said


@pytest.mark.parametrize("form", ["tensor", "out", "logits"])
def test_a_model_of_maps_is_told(form, segmenter, tmp_path):
    masks = torch.zeros(8, 32, 32, dtype=torch.long)
    for data in ((IMAGES[:8], masks), (IMAGES[:8], LABELS[:8]), list(IMAGES[:8])):
        with pytest.raises(ValueError, match=r"a source stage trains classifiers, and expected logits \(1, classes\)"):
            training.train("ttt_mae", segmenter(form=form), data, tmp_path / "a.safetensors", progress=False)
    assert not list(tmp_path.iterdir())


def test_labels_that_are_no_classes_are_told(tmp_path):
    for labels, kind in (
        (torch.zeros(96, 4, 4, dtype=torch.long), r"int64 of shape \(4, 4\)"),
        (LABELS[:96] / 2, "float32"),
    ):
        with pytest.raises(ValueError, match=f"The label of the first image is {kind}"):
            trained("source", tmp_path / "a.safetensors", data=(SMALL[0], labels))


def test_labels_beyond_the_classes_and_another_suffix_are_told(tmp_path):
    for label in (10, -1):
        labels = LABELS[:96].clone()
        labels[50] = label
        with pytest.raises(ValueError, match=f"A label is {label}; the model has 10 classes"):
            trained("source", tmp_path / "a.safetensors", {"epochs": 1}, (SMALL[0], labels))
    with pytest.raises(ValueError, match="needs images with labels"):
        trained("source", tmp_path / "a.safetensors", data=list(SMALL[0]))
    with pytest.raises(ValueError, match=r"called \*\.safetensors"):
        trained("source", tmp_path / "a.pt")


@pytest.mark.parametrize("method", PREPARING)
def test_the_documentation_names_every_method_with_a_source_stage(method):
    page = Path(__file__).parents[1] / "docs" / "training.md"
    assert f"\n| `{method}` " in page.read_text()
    assert re.search(rf"^METHOD:.*\b{method}\b", parser.TRAIN_HELP, re.MULTILINE)


@pytest.mark.parametrize("method", PREPARING)
def test_a_step_searches_the_network_for_nothing(method, monkeypatch):
    """The head, stages and splits are found once: a search runs noise through a copy of the network."""
    kind, config = training.configured(method, training.TrainSettings(augment="crop"), {})
    model, draws = network(), torch.Generator().manual_seed(0)
    part = kind.make_auxiliary(model, config, draws)
    monkeypatch.setattr(taps, "probe", lambda *_: pytest.fail("a search"))
    monkeypatch.setattr(taps, "heads", lambda *_: pytest.fail("a search"))
    losses = kind.source_losses(model, part, IMAGES[:4].float() / 255, LABELS[:4], config, draws)
    assert all(loss.isfinite() for loss in losses.values())


def test_settings_that_a_method_would_not_heed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 is of plain training; 'ttt' has losses of its own"):
        trained("ttt", tmp_path / "a.safetensors", {"label_smoothing": 0.1})
    with pytest.raises(ValueError, match="augment is a callable, which a file cannot hold"):
        trained("ttt", tmp_path / "a.safetensors", augment=lambda images: images)


def test_a_training_that_diverges_writes_no_file(tmp_path):
    with pytest.raises(ValueError, match="The training has diverged"):
        trained("source", tmp_path / "a.safetensors", {"lr": 1e30, "schedule": "constant"})
    assert not list(tmp_path.iterdir())


def test_a_share_held_out_is_one_image_or_more():
    images = torch.utils.data.TensorDataset(IMAGES[:20], LABELS[:20])
    sizes = [
        [len(part or ()) for part in divided(images, training.TrainSettings(validation=v))] for v in (0, 0.01, 0.5)
    ]
    assert sizes == [[20, 0], [19, 1], [10, 10]]
