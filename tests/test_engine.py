"""The engine: resets, loggers, progress, and the pieces for people with a Trainer of their own."""

import json
import subprocess
import sys
import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tta
from tta import leftovers
from tta.batches import images_and_labels
from tta.datasets.stream import Schedule, Stream
from tta.engine import AdaptCallback, OnlineModule, OnlineProgress, reset_period


@pytest.fixture
def stream(golden_images, golden_labels):
    def data(first):
        return TensorDataset(golden_images[first : first + 64], golden_labels[first : first + 64])

    return tta.stream({"a": data(0), "b": data(192)}, batch_size=16)


class CountResets(Callback):
    def __init__(self, adapter):
        self.batches = []
        original = adapter.reset
        self.batch = -1

        def reset():
            self.batches.append(self.batch + 1)
            original()

        adapter.reset = reset

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        self.batch = batch_idx


@pytest.mark.parametrize(
    ("reset", "batches"),
    [("never", []), ("domain", [0, 4]), ("batch", list(range(8))), (3, [0, 3, 6]), ("3 batches", [0, 3, 6])],
)
def test_reset_policies(cnn, stream, reset, batches):
    adapter = tta.adapt(cnn, "tent", lr=0.01)
    counter = CountResets(adapter)
    result = tta.evaluate(adapter, stream, reset=reset, progress=False, callbacks=[counter])
    assert counter.batches == batches
    assert result.reset == ("3 batches" if reset == 3 else reset)


def test_per_domain_equals_a_fresh_adapter_on_each(cnn, stream):
    together = tta.evaluate(tta.adapt(cnn, "tent", lr=0.05), stream, reset="domain", progress=False)
    alone = {}
    for domain in stream.domains:
        part = tta.stream({domain.name: domain.dataset}, batch_size=16)
        alone |= tta.evaluate(tta.adapt(cnn, "tent", lr=0.05), part, progress=False).errors
    assert together.errors == alone


def test_evaluate_goes_on_from_the_present_state(cnn, stream):
    adapter = tta.adapt(cnn, "tent", lr=0.05)
    tta.evaluate(adapter, stream, progress=False)
    learned = adapter.state_dict()
    fresh = tta.adapt(cnn, "tent", lr=0.05).state_dict()
    assert not torch.equal(learned["model.stem.1.weight"], fresh["model.stem.1.weight"])


@pytest.mark.parametrize("reset", ["sometimes", 0, -1, "0 batches", "1.5"])
def test_unknown_reset_is_named(reset):
    with pytest.raises(ValueError, match="reset is 'never', 'domain', 'batch', or a number of batches"):
        reset_period(reset)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_unscaled_precisions_are_refused(cnn, stream, precision):
    with pytest.raises(ValueError, match="precision is one of 32-true, bf16-mixed"):
        tta.evaluate(tta.adapt(cnn, "tent"), stream, precision=precision)


def test_bf16_mixed_stays_near_float32(cnn, stream):
    full = tta.evaluate(tta.adapt(cnn, "tent"), stream, progress=False)
    mixed = tta.evaluate(tta.adapt(cnn, "tent"), stream, progress=False, precision="bf16-mixed")
    assert abs(full.mean_error - mixed.mean_error) < 4  # 5 of 128 samples
    assert mixed.manifest["precision"] == "bf16-mixed"


@pytest.mark.parametrize("units", [False, True])
def test_bf16_without_units_for_it_warns(cnn, stream, units, monkeypatch):
    monkeypatch.setattr("tta.precision._has_units", lambda: units)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tta.evaluate(tta.adapt(cnn, "source"), stream, progress=False, precision="bf16-mixed")
        tta.evaluate(tta.adapt(cnn, "source"), stream, progress=False)
    assert sum("no units for bfloat16" in str(one.message) for one in said) == (not units)


def test_worker_processes_change_nothing(cnn, stream):
    plain = tta.evaluate(tta.adapt(cnn, "tent"), stream, progress=False)
    parallel = tta.evaluate(tta.adapt(cnn, "tent"), stream, progress=False, num_workers=2)
    assert (plain.predictions.prediction == parallel.predictions.prediction).all()


def test_reading_draws_nothing_that_a_method_would_have_drawn(cnn, stream):
    class Guess(tta.Adapter):
        def adapt(self, x):
            return torch.randn(len(x), 10)  # from the generator that everybody shares

    torch.manual_seed(stream.seed)
    plain = torch.cat([torch.randn(len(batch.labels), 10).argmax(1) for batch in stream])
    for workers in (0, 2):
        result = tta.evaluate(tta.adapt(cnn, Guess), stream, progress=False, num_workers=workers)
        assert (result.predictions.prediction == plain.numpy()).all()


def test_logger_gets_the_errors(cnn, stream, tmp_path):
    result = tta.evaluate(tta.adapt(cnn, "norm"), stream, progress=False, logger=CSVLogger(tmp_path, name="x"))
    (file,) = tmp_path.rglob("metrics.csv")
    header, row = (line.split(",") for line in file.read_text().splitlines()[:2])
    logged = dict(zip(header, row, strict=True))
    assert float(logged["mean_error"]) == pytest.approx(result.mean_error)
    assert float(logged["error/b"]) == pytest.approx(result.errors["b"])
    assert float(logged["ece"]) == pytest.approx(result.metrics["ece"])
    assert float(logged["forwards"]) == 128


def test_clean_images_are_predicted_before_and_after(cnn, stream, golden_images, golden_labels):
    clean = tta.stream({"clean": TensorDataset(golden_images[:48], golden_labels[:48])}, batch_size=16)
    adapter, alone = (tta.adapt(cnn, "cotta", views=2, lr=0.05, mt_alpha=0.5) for _ in range(2))
    result = tta.evaluate(adapter, stream, progress=False, clean=clean)
    plain = tta.evaluate(alone, stream, progress=False)
    assert (result.predictions.prediction == plain.predictions.prediction).all()
    assert (result.predictions.nll == plain.predictions.nll).all()
    assert result.metrics["forwards"] == plain.metrics["forwards"]

    def error(adapter):
        with adapter.paused():
            prediction = torch.cat([adapter(x).argmax(1) for x in golden_images[:48].split(16)])
        return 100 * float((prediction != golden_labels[:48]).float().mean())

    assert result.metrics["source_error_before"] == pytest.approx(error(tta.adapt(cnn, "cotta")))
    assert result.metrics["source_error_after"] == pytest.approx(error(alone))
    assert result.metrics["source_error_after"] != result.metrics["source_error_before"]
    assert result.manifest["clean"]["samples"] == 48
    assert "source_error_before" not in plain.metrics


def test_a_stream_knows_its_clean_images(stream):
    clean = tta.stream("digits-c", corruptions=["fog"], samples=20, batch_size=8, protocol="gradual").clean()
    assert [domain.name for domain in clean.domains] == ["clean"]
    assert (len(clean), clean.samples) == (3, 20)
    with pytest.raises(ValueError, match="Domain 'a' of stream 'custom' has no clean images"):
        stream.clean()


def test_unknown_classes_are_left_out_of_the_errors(cnn, golden_images, golden_labels):
    labels = golden_labels[:64].clone()
    labels[::2] = -1
    known = TensorDataset(golden_images[:64][1::2], golden_labels[:64][1::2])
    mixed = tta.evaluate(
        tta.adapt(cnn, "source"), tta.stream({"a": TensorDataset(golden_images[:64], labels)}), progress=False
    )
    alone = tta.evaluate(tta.adapt(cnn, "source"), tta.stream({"a": known}), progress=False)
    assert mixed.rows[0].samples == 32
    assert mixed.errors == alone.errors


def test_skipped_updates_are_counted_across_resets(cnn, stream):
    class Broken(tta.Adapter):
        config: tta.OptimizerConfig

        def adapt(self, x):
            logits = self.predict(x)
            self.update(logits.sum() * float("nan"))
            return logits

        def configure_model(self):
            self.model.requires_grad_(True)

    with pytest.warns(RuntimeWarning, match="skipped"):
        result = tta.evaluate(tta.adapt(cnn, Broken), stream, reset="batch", progress=False)
    assert result.skipped_updates == 8


def test_manifest_says_what_would_reproduce_the_result(cnn, stream):
    manifest = tta.evaluate(tta.adapt(cnn, "tent", lr=2e-3), stream, progress=False).manifest
    assert manifest["method"] == "tent"
    assert manifest["config"]["lr"] == 2e-3
    assert manifest["preset"] is None
    preset = tta.evaluate(tta.adapt(cnn, "tent", preset="imagenet-c"), stream, progress=False).manifest["preset"]
    assert preset == "imagenet-c"
    assert len(manifest["model"]["weights"]) == 64
    assert manifest["data"]["batch_size"] == 16
    assert len(manifest["data"]["domains"]["b"]["content"]) == 64
    assert manifest["scored_forward"] == "before"
    assert manifest["environment"]["torch"] == version("torch")


def test_progress_shows_domain_error_and_speed_and_is_refreshed_seldom(cnn, stream, monkeypatch):
    updates = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda self, task, **fields: updates.append(fields))
    clock = iter(n * 0.05 for n in range(10_000))  # read twice a batch
    monkeypatch.setattr("tta.online.time.perf_counter", lambda: next(clock))
    tta.evaluate(tta.adapt(cnn, "source"), stream)
    assert OnlineProgress.REFRESH_SECONDS == 0.25
    assert 2 <= len(updates) <= 3  # 8 batches of a tenth of a second each
    assert updates[-1]["description"] == "b"
    assert "online error" in updates[-1]["status"]
    assert "images/s" in updates[-1]["status"]


def test_trainer_says_nothing_of_its_own(tmp_path):
    script = (
        "import torch, tta; from torch.utils.data import TensorDataset\n"
        "data = TensorDataset(torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))\n"
        "tta.evaluate(tta.adapt(tta.load_model('digits-cnn'), 'norm'), tta.stream({'a': data}), progress=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_online_module_in_a_trainer_of_ones_own(cnn, golden_images, golden_labels, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(TensorDataset(golden_images[:64], golden_labels[:64]), batch_size=16)
    plain = tta.adapt(cnn, "tent")
    expected = torch.cat([plain(x) for x, _ in loader])
    (scores,) = trainer.test(OnlineModule(tta.adapt(cnn, "tent")), loader, verbose=False)
    wrong = (expected.argmax(1) != golden_labels[:64]).float().mean()
    assert scores["mean_error"] == pytest.approx(100 * float(wrong))
    images_alone = DataLoader(golden_images[:64], batch_size=16)
    assert torch.equal(torch.cat(trainer.predict(OnlineModule(tta.adapt(cnn, "tent")), images_alone)), expected)


def test_online_module_finishes_an_unfinished_loader_and_checks_the_classes(cnn, tmp_path):
    stream = tta.stream("digits-c", corruptions=["fog", "snow"], samples=40, batch_size=20)
    loader = stream.loader(unfinished=True)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    counts = []
    module = OnlineModule(tta.adapt(cnn, "tent"), finish=stream.finish, check_logits=counts.append)
    trainer.test(module, loader, verbose=False)
    expected = tta.evaluate(tta.adapt(cnn, "tent"), stream, progress=False).predictions.prediction
    assert module.predictions().prediction.tolist() == expected.tolist()
    assert counts == [10]


class Classifier(pl.LightningModule):
    """A LightningModule as its owner wrote it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def test_step(self, batch, batch_idx):
        self.log("error", (self.model(batch[0]).argmax(1) != batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


@pytest.fixture
def make_trainer(tmp_path):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lambda *callbacks: pl.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **options)


def test_callback_adapts_an_existing_module_and_puts_the_original_back(cnn, golden_images, golden_labels, make_trainer):
    loader = DataLoader(TensorDataset(golden_images[:64], golden_labels[:64]), batch_size=16)
    plain = tta.adapt(cnn, "tent", lr=0.01)
    expected = torch.cat([plain(x) for x, _ in loader])
    module, callback = Classifier(cnn), AdaptCallback("tent", lr=0.01)
    assert torch.equal(torch.cat(make_trainer(callback).predict(module, loader)), expected)
    assert module.model is cnn
    make_trainer(callback).test(module, loader, verbose=False)
    assert module.model is cnn
    second = torch.cat([plain(x) for x, _ in loader])
    callback.adapter.reset()
    assert torch.equal(torch.cat([callback.adapter(x) for x, _ in loader]), expected)
    assert not torch.equal(second, expected)


def test_callback_names_the_modules_there_are(cnn, golden_images, golden_labels, make_trainer):
    loader = DataLoader(TensorDataset(golden_images[:16], golden_labels[:16]), batch_size=16)
    with pytest.raises(ValueError, match=r"no sub-module 'net'.*there are: model"):
        make_trainer(AdaptCallback("tent", attribute="net")).predict(Classifier(cnn), loader)


# ---------------------------------------------------------------------- several processes, batches and models of others

TWO_PROCESSES = """
import lightning.pytorch as pl, json, os, sys, torch, tta
from torch.utils.data import DataLoader, TensorDataset
from tta.engine import AdaptCallback, OnlineModule

class Mine(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tta.load_model("digits-cnn")
    def test_step(self, batch, _):
        self.model(batch[0])

def tested(module, processes, divided=False, callbacks=()):
    options = dict(strategy="ddp") if processes > 1 else {}
    trainer = pl.Trainer(accelerator="cpu", devices=processes, logger=False, callbacks=list(callbacks), enable_checkpointing=False,
                         enable_progress_bar=False, use_distributed_sampler=divided, **options)
    try:
        (logged,) = trainer.test(module, loader, verbose=False)
    except ValueError as error:
        return str(error)
    found, adapter = module.predictions(), module.adapter
    return {"logged": logged["mean_error"], "index": found.index.tolist(), "prediction": found.prediction.tolist(),
            "batch": found.batch.tolist(), "updates": adapter.progress().updates, "backwards": module.metrics["backwards"],
            "workers": adapter.workers.size}

if __name__ == "__main__":
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.rand(19, 3, 32, 32, generator=draws), torch.randint(10, (19,), generator=draws)
    loader = DataLoader(TensorDataset(images, labels), batch_size=6)  # parts of 3 and 3, and at last of 1 and 0
    def online(method):
        return OnlineModule(tta.adapt(tta.load_model("digits-cnn"), method))
    found = {
        "two": tested(online("tent"), 2),
        "divided": tested(online("tent"), 2, divided=True),
        "rotta": tested(online("rotta"), 2),
        "oracle": tested(OnlineModule(tta.adapt(tta.load_model("digits-cnn"), "tent"), oracle_steps=2), 2),
        "AdaptCallback": tested(Mine(), 2, callbacks=[AdaptCallback("norm")]),
    }
    found["one"] = tested(online("tent"), 1)
    with open(f"{sys.argv[1]}/{os.environ.get('LOCAL_RANK', '0')}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.barrier()  # the test reads both
"""


@pytest.mark.skipif(sys.platform == "win32", reason="DDP on the CPU needs gloo")
@pytest.mark.slow
def test_two_processes_give_one_result(tmp_path):
    """The same in both, and that of one process; what cannot be shared is refused in both, so that none goes on alone."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, str(tmp_path / "two.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    logged, alone = first["two"].pop("logged"), first["one"].pop("logged")
    assert logged == pytest.approx(alone)
    assert first["two"] == first["one"]
    assert first["one"]["index"] == list(range(19))
    assert first["one"]["updates"] == 4
    assert "use_distributed_sampler=False" in first["divided"]
    assert "rotta cannot share a stream with other workers" in first["rotta"]
    assert "oracle_steps would be decided by one worker's part" in first["oracle"]
    assert "AdaptCallback adapts one model to one stream in one process; this Trainer has 2" in first["AdaptCallback"]


KEYS = [("pixel_values", "labels"), ("image", "label"), ("images", "labels"), ("img", "label")]


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("keys", KEYS)
def test_online_module_takes_mappings(cnn, golden_images, golden_labels, make_trainer, keys, kind):
    samples = [
        dict(zip(keys, sample, strict=True)) for sample in zip(golden_images[:64], golden_labels[:64], strict=True)
    ]
    loader = DataLoader(samples, batch_size=16, collate_fn=lambda found: kind(torch.utils.data.default_collate(found)))
    pairs = DataLoader(TensorDataset(golden_images[:64], golden_labels[:64]), batch_size=16)
    expected = make_trainer().test(OnlineModule(tta.adapt(cnn, "tent")), pairs, verbose=False)[0]["mean_error"]
    module = OnlineModule(tta.adapt(cnn, "tent"))
    assert make_trainer().test(module, loader, verbose=False)[0]["mean_error"] == expected
    assert len(make_trainer().predict(module, loader)) == 4


IMAGES = torch.zeros(4, 3, 32, 32)


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ({"pixels": IMAGES, "y": 1}, TypeError, "A batch is a dict with 'pixels', 'y'; expected images under one of"),
        ([{"pixel_values": 1}], TypeError, "A batch is a list, its images a dict; expected images alone, a pair"),
        (SimpleNamespace(images=IMAGES), TypeError, "A batch is a SimpleNamespace"),
        (
            {"image": IMAGES, "label": torch.zeros(4, 10)},
            ValueError,
            r"'label' have shape \(4, 10\) and dtype torch.float32",
        ),
        (
            (IMAGES, torch.zeros(3, dtype=torch.long)),
            ValueError,
            r"'labels' have shape \(3,\).*one class for each of 4",
        ),
        ((IMAGES, ["cat", "dog", "cat", "dog"]), TypeError, "'labels' are a list; expected integers"),
    ],
)
def test_batches_of_other_kinds_are_named(batch, kind, message):
    with pytest.raises(kind, match=message):
        images_and_labels(batch)


@pytest.mark.parametrize("labels", [[1, 2, 3, 0], torch.tensor([[1], [2], [3], [0]]), torch.tensor([1, 2, 3, 0]).int()])
def test_labels_are_integers_of_one_dimension(labels):
    found = images_and_labels((IMAGES, labels))[1]
    assert found.tolist() == [1, 2, 3, 0]
    assert found.dtype == torch.int64
    for unlabelled in ([IMAGES], {"image": IMAGES}, IMAGES):
        assert images_and_labels(unlabelled)[1].tolist() == [-1] * 4


@dataclass
class Answer:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


class ModelOutput(OrderedDict):
    """As transformers' own: a mapping whose keys are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


KINDS = {
    "tensor": lambda logits: logits,
    "namespace": lambda logits: SimpleNamespace(logits=logits, hidden=logits),
    "dataclass": lambda logits: Answer(logits=logits, hidden=logits),
    "namedtuple": lambda logits: namedtuple("Named", ["logits", "hidden"])(logits, logits),
    "transformers": lambda logits: ModelOutput(logits=logits, hidden=logits),
}


class Answering(nn.Module):
    """A classifier that is called by keyword and gives an object."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind, self.config = model, kind, SimpleNamespace(id2label={0: "zero"})

    def forward(self, pixel_values=None, labels=None, return_dict=None, output_hidden_states=None):
        return KINDS[self.kind](self.model(pixel_values))

    def features(self, pixel_values):
        return self.model(pixel_values)


class Calling(pl.LightningModule):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.call, self.answers = model, call, []

    def test_step(self, batch, batch_idx):
        self.answers.append(self.call(self.model, *batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, y: model(x),
        lambda model, x, y: model(pixel_values=x),
        lambda model, x, y: model(pixel_values=x, labels=y, return_dict=True, output_hidden_states=False),
    ],
    ids=["positional", "keyword", "transformers"],
)
def test_callback_is_called_and_answers_as_the_original(cnn, golden_images, golden_labels, make_trainer, kind, call):
    loader = DataLoader(TensorDataset(golden_images[:32], golden_labels[:32]), batch_size=16)
    plain = tta.adapt(cnn, "tent", lr=0.01)
    expected = torch.cat([plain(x) for x, _ in loader])
    module = Calling(Answering(cnn, kind), call)
    make_trainer(AdaptCallback("tent", lr=0.01)).test(module, loader, verbose=False)
    original = KINDS[kind](expected)
    assert all(type(answer).__name__ == type(original).__name__ for answer in module.answers)
    logits = [answer if kind == "tensor" else answer.logits for answer in module.answers]
    assert torch.equal(torch.cat(logits), expected)
    if kind not in ("tensor", "transformers"):
        assert module.answers[0].hidden is None  # it would be of the source weights


def test_callback_gives_the_loss_of_labels(cnn, golden_images, golden_labels, make_trainer):
    loader = DataLoader(TensorDataset(golden_images[:16], golden_labels[:16]), batch_size=16)
    module = Calling(Answering(cnn, "dataclass"), lambda model, x, y: model(pixel_values=x, labels=y))
    make_trainer(AdaptCallback("norm")).test(module, loader, verbose=False)
    expected = nn.functional.cross_entropy(module.answers[0].logits, golden_labels[:16])
    assert torch.equal(module.answers[0].loss, expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, x: m(x, output_hidden_states=True), TypeError, "was also given output_hidden_states"),
        (lambda m, x: m(x, return_dict=False), TypeError, "was also given return_dict=False"),
        (lambda m, x: m(x, x), TypeError, "was also given a second positional argument"),
        (lambda m, x: m(pixels=x), TypeError, "Answering was called without images; got pixels"),
        (lambda m, x: m.features(x), AttributeError, "'features' of the model would answer with its source weights"),
    ],
)
def test_a_call_that_an_adapter_cannot_answer_is_refused(cnn, golden_images, make_trainer, call, kind, message):
    module = Calling(Answering(cnn, "namespace"), lambda model, x: call(model, x))
    loader = DataLoader(TensorDataset(golden_images[:16]), batch_size=16)
    with pytest.raises(kind, match=message):
        make_trainer(AdaptCallback("norm")).test(module, loader, verbose=False)
    assert isinstance(module.model, Answering)


def test_settings_of_the_original_can_be_read_while_it_is_adapted(cnn, golden_images, make_trainer):
    module = Calling(Answering(cnn, "namespace"), lambda model, x: (model(x), model.config.id2label[0]))
    make_trainer(AdaptCallback("norm")).test(module, DataLoader(TensorDataset(golden_images[:16])), verbose=False)
    assert module.answers[0][1] == "zero"


# ---------------------------------------------------------------------- weights of a checkpoint


def other_weights(cnn):
    other = type(cnn)()
    torch.manual_seed(1)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    return other


def test_callback_adapts_the_weights_of_the_checkpoint(cnn, golden_images, golden_labels, make_trainer, tmp_path):
    loader = DataLoader(TensorDataset(golden_images[:32], golden_labels[:32]), batch_size=16)
    first = make_trainer()
    first.predict(Classifier(cnn), loader)
    first.save_checkpoint(tmp_path / "best.ckpt")
    plain = tta.adapt(cnn, "tent", lr=0.01)
    expected = torch.cat([plain(x) for x, _ in loader])
    module, callback = Classifier(other_weights(cnn)), AdaptCallback("tent", lr=0.01)
    module.train()
    found = torch.cat(make_trainer(callback).predict(module, loader, ckpt_path=tmp_path / "best.ckpt"))
    assert torch.equal(found, expected)
    assert all(part.training for part in module.modules())  # the original is back in the modes that it had
    assert torch.equal(module.model.fc.weight, cnn.fc.weight)
    later = torch.cat(make_trainer(callback).predict(module, loader, ckpt_path=tmp_path / "best.ckpt"))
    assert torch.equal(later, torch.cat([plain(x) for x, _ in loader]))  # the same weights: it goes on


def test_callback_is_built_anew_for_other_weights_and_another_module(cnn, golden_images, golden_labels, make_trainer):
    loader = DataLoader(TensorDataset(golden_images[:32], golden_labels[:32]), batch_size=16)
    callback, module = AdaptCallback("tent", lr=0.01), Classifier(cnn)
    make_trainer(callback).predict(module, loader)
    before = callback.adapter
    other = other_weights(cnn)
    plain = tta.adapt(other, "tent", lr=0.01)
    expected = torch.cat([plain(x) for x, _ in loader])
    assert torch.equal(torch.cat(make_trainer(callback).predict(Classifier(other), loader)), expected)
    assert callback.adapter is not before
    with torch.no_grad():
        other.fc.bias += 1  # trained further, in the same module
    plain = tta.adapt(other, "tent", lr=0.01)
    expected = torch.cat([plain(x) for x, _ in loader])
    assert torch.equal(torch.cat(make_trainer(callback).predict(Classifier(other), loader)), expected)


# ---------------------------------------------------------------------- leftover batches


class Neck(nn.Module):
    """A BatchNorm layer behind the pooling: one value per channel and image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x).relu().mean((2, 3))))


def leftover_stream(golden_images, golden_labels, sizes, **settings):
    starts = [100 * number for number in range(len(sizes))]
    parts = zip(starts, sizes, strict=True)
    data = {f"d{a}": TensorDataset(golden_images[a : a + n], golden_labels[a : a + n]) for a, n in parts}
    return tta.stream(data, batch_size=8, **settings)


@pytest.mark.parametrize("reset", ["never", "domain"])
@pytest.mark.parametrize("method", ["norm", "tent"])
def test_a_leftover_that_is_too_small_joins_the_batch_before_it(golden_images, golden_labels, method, reset):
    stream = leftover_stream(golden_images, golden_labels, [17, 8, 9])
    found = tta.evaluate(tta.adapt(Neck(), method), stream, reset=reset, progress=False)
    assert found.predictions.batch.tolist() == [0] * 8 + [1] * 9 + [2] * 8 + [3] * 9
    assert found.manifest["leftovers_joined"] == 2
    plain, logits = tta.adapt(Neck(), method), []
    for domain, sizes in zip(stream.domains, ([8, 9], [8], [9]), strict=True):
        if reset == "domain":
            plain.reset()
        logits += [plain(x) for x in domain.images(torch.arange(sum(sizes))).split(sizes)]
    assert found.predictions.prediction.tolist() == torch.cat(logits).argmax(1).tolist()
    kept = {**found.manifest, "leftovers_joined": None}
    assert kept["data"] == stream.describe()  # the order and its hash are those of the stream


def test_a_leftover_that_the_method_takes_stays(cnn, golden_images, golden_labels):
    stream = leftover_stream(golden_images, golden_labels, [9, 10])
    for adapter in (tta.adapt(cnn, "tent"), tta.adapt(Neck(), "source")):
        found = tta.evaluate(adapter, stream, progress=False)
        assert found.predictions.batch.tolist() == [0] * 8 + [1] + [2] * 8 + [3] * 2
        assert "leftovers_joined" not in found.manifest


def test_leftovers_stay_where_that_is_asked_for(golden_images, golden_labels):
    stream = leftover_stream(golden_images, golden_labels, [9])
    with pytest.raises(ValueError, match="single value per channel"):
        tta.evaluate(tta.adapt(Neck(), "norm"), stream, progress=False, leftover="keep")
    with pytest.raises(ValueError, match="leftover is one of 'join', 'keep'; got 'drop'"):
        tta.evaluate(tta.adapt(Neck(), "norm"), stream, progress=False, leftover="drop")


def test_the_trial_of_a_leftover_teaches_nothing(golden_images, golden_labels):
    stream = leftover_stream(golden_images, golden_labels, [9])
    adapter = tta.adapt(Neck(), "tent")
    before = adapter.state_dict()
    _, joined = leftovers.joined(stream, adapter)
    assert joined == 1
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_a_leftover_of_a_mixed_stream_joins_and_images_that_are_only_predicted_teach_nothing(
    golden_images, golden_labels
):
    mixed = leftover_stream(golden_images, golden_labels, [8, 9], protocol="mixed")
    assert (
        tta.evaluate(tta.adapt(Neck(), "norm"), mixed, progress=False).predictions.batch.tolist() == [0] * 8 + [1] * 9
    )
    plain = leftover_stream(golden_images, golden_labels, [9])
    held = Schedule(plain.order, (8, 1), 8, (False, True))
    joined, _ = leftovers.joined(Stream("x", plain.domains, batch_size=8, schedule=held), tta.adapt(Neck(), "norm"))
    assert [(plan.samples, plan.paused) for plan in joined.schedule()] == [(9, True)]
