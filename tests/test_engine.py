"""The engine: resets, loggers, progress, and the pieces for people with a Trainer of their own."""

import subprocess
import sys
from importlib.metadata import version

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import tta
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
    monkeypatch.setattr("tta.engine.time.perf_counter", lambda: next(clock))
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
