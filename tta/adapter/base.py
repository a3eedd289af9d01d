"""The base class of every method: a model that predicts on each batch and learns from it."""

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from tta import caches, channels_last, compiling, distributed, fingerprint, norms
from tta.adapter import export, modules, optimizers
from tta.adapter.defence import FILTERED, MADE, SKIPPED, Output
from tta.adapter.feedback import Feedback
from tta.adapter.outputs import Outputs, ToLogits
from tta.adapter.snapshots import put_back
from tta.adapter.summary import Summary, summarise
from tta.functional import logits_of, plain_images
from tta.hyperparameters import Config, OptimizerConfig, as_dict
from tta.messages import require
from tta.source import BATCH_SIZE, EXPECTED, Known, Need, SourceLike, known_from
from tta.tasks import Task

# Methods that workers can share; a test holds it to the code.
DISTRIBUTED = "actmad, auto, eata, norm, sar, source, tent"


class Adapter(Feedback):
    """A source model that adapts to the stream it predicts: ``logits = adapter(x)`` predicts *and* learns.

    A method overrides :meth:`configure_model` and :meth:`adapt`, at times :meth:`parameters_to_adapt` and
    :meth:`predict`, and names its hyper-parameters with the annotation ``config: MyConfig``. The adapter defends
    itself, so that any loop may drive it: under ``no_grad`` or ``inference_mode``, after ``train()`` or ``eval()``, under
    autocast, from several threads, with a batch that makes the loss infinite. A batch that is refused leaves the state as it
    was. Logits that are not finite send the adapter back to its last good state, at most 100 batches old.

    Args:
        model: any module that maps images (batch, channels, height, width) to logits (batch, classes), or to an object
            with ``.logits``. It is copied and put into ``eval()`` mode; the caller's object is never changed.
        config: hyper-parameters; the method's defaults if left out.
        source: source images or statistics of them, see :func:`tta.adapt`; ignored by a method that needs none.
        copy: ``False`` adapts the caller's own module in place and saves the memory of the copy.
        outputs: what the model's outputs are, see :func:`tta.adapt`.
        task: what the model predicts, see :func:`tta.adapt`.
        on_bad: ``"raise"`` or ``"skip"``, see :func:`tta.adapt`.
        small_batches: ``None``, ``"blend"``, ``"source"`` or ``"raise"``, see :func:`tta.adapt`.

    Raises:
        TypeError: ``model`` is not a module that can be adapted; the message says what to pass.
        ValueError: the model lacks the layers that the method adapts, or ``source`` is missing or does not fit.
    """

    config: Config
    preset: str | None = None  # name of the published settings that it was built with, for the manifest
    scored_forward: str = "before"  # whether the returned logits are from before the batch's update or "after" it
    _FUSED_ON: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(
        self,
        model: nn.Module,
        config: Config | None = None,
        *,
        source: SourceLike | None = None,
        copy: bool = True,
        outputs: Outputs = "logits",
        task: str | None = None,
        on_bad: Literal["raise", "skip"] = "raise",
        small_batches: norms.SmallBatches | None = None,
    ) -> None:
        super().__init__()
        require(on_bad in ("raise", "skip"), f"on_bad={on_bad!r}", "'raise' or 'skip'")
        self.on_bad, self.small_batches = on_bad, small_batches
        self.config = config if config is not None else config_class(type(self))()
        self.method = type(self).__name__
        self._built_with = as_dict(self.config)  # a later change of the configuration makes no other adapter
        if isinstance(model, Adapter):
            raise TypeError(f"The model is an adapter already ({type(model).__name__}). Pass its source model.")
        self.outputs = ToLogits(outputs, task, type(self).__name__, self.tasks, self.needs)
        with torch.inference_mode(False), torch.enable_grad():
            self.model = modules.own(modules.unwrap(model), copy)
            caches.forget(self.model)
            self.source_fingerprint = fingerprint.of_model(self.model)
            self.model.eval()
            self.model.register_forward_hook(self.outputs)
            self._source_norms = export.stored_statistics(self.model)
            self._channels_last = copy and channels_last.pays(self.model)
            if self._channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.generator = torch.Generator()
            self.guard = None  # set by tta.adapt
            self._paused_in = Counter()
            self._start_defence(next((parameter.device for parameter in self.model.parameters()), None))
            self.source_statistics: list[dict[str, Any]] = []  # description of the statistics used, for the manifest
            self.statistics = None
            self.known = self._look_up(source)  # one entry per need; configure_model copies them into buffers
            self._start_waiting()
            self.configure_model()
            self._check_outputs_served()
            if small_batches:
                norms.serve_small_batches(self, self._source_norms, small_batches)
            # Memories are created on the CPU, even if the model is on a GPU.
            nn.Module._apply(self, lambda tensor: tensor.to(self.device))  # type: ignore[no-untyped-call]  # noqa: SLF001
            self.known = []
            self.restart_optimizer()
            self._source = modules.values(self)
            self.generator.manual_seed(0)
            self._warn_of_short_weights()

    # ------------------------------------------------------------------ what a method defines

    @classmethod
    def source_needs(cls, model: nn.Module, config: Any) -> list[Need]:
        """Source statistics that the method needs; ``configure_model`` finds them in ``self.known``, in this order."""
        return []

    def configure_model(self) -> None:
        """Set up the model, once: layers that use batch statistics, parameters that may change, copies, memory banks."""
        self.model.requires_grad_(False)

    def parameters_to_adapt(self) -> list[nn.Parameter]:
        """Parameters the optimizer changes; by default all that still require a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def adapt(self, x: Tensor) -> Tensor | Output:
        """Learn from the batch and return the logits to be scored, (batch, classes) or maps of them; gradients are on."""
        raise NotImplementedError(f"{type(self).__name__} must define adapt(self, x) and return logits.")

    # ------------------------------------------------------------------ what a method is given

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the present model, float32; learns nothing and changes no state.

        (batch, classes); of a model for segmentation (batch, classes, height, width), of the size of the images; for
        regression numbers (batch, values), for detection the detector's own list of dictionaries.
        """
        return self.outputs.of(self.model(x))

    def update(
        self, loss: Tensor, *, gradients: Sequence[Tensor | None] | None = None, when: Tensor | None = None
    ) -> Tensor:
        """Make one optimizer step on ``loss``.

        A step whose loss or gradient is not finite is skipped and counted in :attr:`skipped_updates`: weights and
        optimizer moments stay as they were.

        Args:
            loss: scalar; of several workers each gives its part, and the parts add up, see :mod:`tta.distributed`.
            gradients: of :meth:`optimized_parameters`, if they were computed already, as by a sharpness-aware step, which
                takes them at other weights than the present ones. Left out, they are computed here.
            when: a boolean scalar, the same at all workers; if it is false there is nothing to learn from and no step is made.
                On a GPU nothing waits for it.

        Returns:
            Whether the step was made, a boolean scalar on the loss's device.

        Raises:
            ValueError: no gradient reaches a parameter, so that nothing would ever be learned.
        """
        optimizer = self.optimizer
        assert optimizer is not None, "update() needs parameters to adapt and a config that extends OptimizerConfig"
        optimizer.zero_grad(set_to_none=True)
        made = torch.zeros((), dtype=torch.bool, device=loss.device)
        parameters = self.optimized_parameters()
        if gradients is not None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        elif when is not None and when.device.type == "cpu" and not when:
            self._progress[FILTERED] += 1
            return made  # on a CPU the flag is known without waiting, and the backward pass is saved
        elif loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):  # see functional.gradients_of
                loss.backward()  # type: ignore[no-untyped-call]
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not present:
            raise ValueError(self._no_gradient())
        if self.workers.size > 1:
            loss, *present = self._added_up(loss, parameters)
        norm = get_total_norm(present)
        finite = loss.detach().isfinite().all() & norm.isfinite()
        finite = finite & self.input_finite
        made = finite if when is None else finite & when
        optimizers.step(optimizer, when=made)
        taught = made & (norm > 0)  # 0 where all probabilities are 0 or 1: such a step teaches nothing
        self._counters[SKIPPED] += ~finite
        self._progress[MADE] += taught
        self._progress[FILTERED] += finite & ~taught
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # a second forward under autocast would otherwise use the weights before the step
        return made

    def _added_up(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The loss of all workers together, and its gradients, which the parameters are given."""
        whole, *gradients = self.workers.summed([loss, *(parameter.grad for parameter in parameters)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return [tensor for tensor in (whole, *gradients) if tensor is not None]

    def nothing_to_learn(self) -> None:
        """Count a step that is left out before a loss is known: no sample passed the filter, or the batch is too small.

        Fifty batches of these without a single step are warned of, as those of :meth:`update` are.
        """
        self._progress[FILTERED] += 1

    def optimized_parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer, in the order of ``gradients`` in :meth:`update`; none without an optimizer."""
        return optimizers.parameters_of(self.optimizer)

    def restart_optimizer(self) -> None:
        """Replace the optimizer by a new one of :meth:`parameters_to_adapt`: no moments, the learning rate of the config.

        Called at the end of construction and by :meth:`reset`. A method calls it to forget the moments in between, or
        to make steps in ``configure_model`` already.
        """
        if not isinstance(self.config, OptimizerConfig):
            self.optimizer = None
            return
        parameters = self.parameters_to_adapt()
        if not parameters:
            raise ValueError(self._no_parameters())
        # On a GPU the fused kernels can skip a step by a flag on the device; the plain ones would have to wait for it.
        fused = parameters[0].device.type in self._FUSED_ON
        self.optimizer = optimizers.build(self.config, parameters, fused=fused)

    def source_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the source model, under their names in ``self.model``; to be read only."""
        return {
            name.removeprefix("model."): value
            for name, value in self._source.items()
            if name.startswith("model.") and value is not None
        }

    def adapted_and_source(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The model's parameters that adapt, and their source values, which are to be read only."""
        source = self.source_tensors()
        adapted = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return list(adapted.values()), [source[name] for name in adapted]

    def predict_as_source(self, x: Tensor) -> Tensor:
        """Logits of the source weights, with the layers as the method configured them: batch statistics stay in use."""
        source = modules.by_place(self.model, self.source_tensors())
        return logits_of(functional_call(self.model, source, (x,), tie_weights=False))

    @torch.no_grad()
    def restore(self, when: Tensor, *, moments: bool = True) -> None:
        """Set the adapted weights back to their source values, as a step of a method. All else stays as it is.

        Args:
            when: a boolean scalar; if it is false nothing happens. On a GPU nothing waits for it.
            moments: set the optimizer's moments to zero too.
        """
        for parameter, source in zip(*self.adapted_and_source(), strict=True):
            parameter.copy_(torch.where(when, source, parameter))
        assert self.optimizer is not None
        for slots in self.optimizer.state.values() if moments else ():
            for value in slots.values():
                if isinstance(value, Tensor):  # a new optimizer starts from zeros
                    value.masked_fill_(when.to(value.device), 0)

    # ------------------------------------------------------------------ for a user

    def forward(self, x: Tensor) -> Tensor:
        """Predict the batch and learn from it: what :meth:`predict` gives, detached; logits are float32."""
        return self.step(x).logits

    def step(self, x: Tensor, ids: Sequence[int] | Tensor | None = None) -> Output:
        """Predict the batch and learn from it (only predict, while :meth:`paused`).

        Args:
            x: the batch, (batch, channels, height, width).
            ids: whole numbers of your own for :meth:`feedback`, one an image, all different; left out, a method that uses
                feedback counts its images, and a guard its predictions. A :meth:`reset` starts the count anew.

        Raises:
            ValueError: ``ids`` that do not fit; or ``x`` is not a finite floating-point batch (batch, channels, height, width). On a GPU the
                finiteness is read a batch later, so as not to wait for the device; the bad batch teaches nothing.
        """
        with self._lock, torch.inference_mode(False), torch.enable_grad():
            numbers = self._ids_or_refusal(ids, x)
            if self.on_bad == "skip" and not (good := self._good(x)).all():
                return self._step_of_good(x, good, numbers)
            x = self._last = self._checked(x)
            # torch 2.6 would reuse, without a gradient, the casts of weights that a prediction under no_grad has cached.
            torch.clear_autocast_cache()
            self._fresh, paused = False, bool(self._paused_in[threading.get_ident()])
            if not self.workers.total(x):  # no worker has a good image: only the number of classes is asked for
                with torch.no_grad():
                    return Output(self.outputs.of(self.model(x)), None, numbers)
            if paused:
                with torch.no_grad():
                    output = Output(self._explained(self._guarded_prediction, x))
            else:
                output = self.learn(x) if self.guard is None else self.guard.step(self, x)
            self._read_counters()
            numbers = self._remembered(x, output.logits, numbers, guarded=self.guard is not None and not paused)
        score = output.outlier_score
        logits = self.outputs.back(self.task.detached(output.logits))
        return Output(logits, None if score is None else score.detach().float(), numbers)

    def learn(self, x: Tensor) -> Output:
        """Learn from a batch that :meth:`step` has checked; a guard calls it in place of :meth:`step`."""
        output = self._finite(self._learned(x), x)
        self._fresh = True
        return output

    def _guarded_prediction(self, x: Tensor) -> Tensor:
        return self.predict(x) if self.guard is None else self.guard.predict(self, x)

    @contextmanager
    def paused(self) -> Iterator["Adapter"]:
        """Within this context the adapter predicts and learns nothing; other threads are not concerned."""
        thread = threading.get_ident()
        self._paused_in[thread] += 1
        try:
            yield self
        finally:
            self._paused_in[thread] -= 1

    def join(self, process_group: distributed.ProcessGroup | None) -> None:
        """Share one stream with the other workers of a process group: each is given its part of every batch.

        Statistics of batches, losses, gradients, counts and decisions are those of the whole batch, so that N workers with B
        images give what one gives with N B, to rounding. The parts of a batch come in the order of the workers; they may differ
        in size, and some may be empty. From here on every worker makes the same calls in the same order, and the adapters stay
        equal. A group of one worker changes nothing.

        Args:
            process_group: of :mod:`torch.distributed`, such as ``torch.distributed.group.WORLD``; None to be alone again.

        Raises:
            ValueError: the method decides by its own images alone (its class does not say ``distributed = True``); this
                process is not in the group; or the workers' adapters differ in method, settings, weights or state.
        """
        with self._lock:
            workers = distributed.Workers(process_group)
            self._check_shared(workers.size)
            if workers.size > 1 and not vars(type(self)).get("distributed", False):
                raise ValueError(
                    f"{self.method} cannot share a stream with other workers: its memories, copies or random draws would be of one "
                    f"worker's images. Methods that can: {DISTRIBUTED}."
                )
            if workers.size > 1:
                tensors = ((name, value) for name, value in self.state_dict().items() if name != self._STATE)
                workers.require_alike({**self.identity(), "state": fingerprint.of_tensors(tensors)})
                compiling.undo(self)  # statistics of all workers are exchanged in hooks, which run eagerly anyway
            models = [self.model, *([] if self.guard is None else self.guard.share(workers))]
            distributed.connect(self, models, workers)

    def reset(self) -> None:
        """Go back to the source model, bit for bit: weights, buffers, optimizer, memories, counters, random state."""
        with self._lock, torch.inference_mode(False):
            put_back(self, self._source)
            self.restart_optimizer()
            self.generator.manual_seed(0)
            self._input_is_finite = None
            self._seen.zero_()
            self._good_batches = 0
            self._kept = None
            torch.clear_autocast_cache()
            if self.guard is not None:
                self.guard.reset()

    def summary(self) -> Summary:
        """Parameters that adapt, normalisation layers found, left out and unknown, and the statistics they use; print it."""
        return summarise(self.model, self, self.method, self.guard, self.workers)

    def __repr__(self) -> str:
        """The :meth:`summary` as text."""
        return str(self.summary())

    @property
    def device(self) -> torch.device:
        """The device of the adapter's tensors."""
        return self._counters.device

    @property
    def task(self) -> Task:
        """The task of the model: as given, else as recognised by its outputs."""
        return self.outputs.task

    def predicting_model(self) -> nn.Module:
        """The module whose forward alone is :meth:`predict`; a method whose teacher predicts overrides it.

        Raises:
            ValueError: the prediction is more than the forward of one module.
        """
        if type(self).predict is not Adapter.predict:
            raise ValueError(
                f"{type(self).__name__} predicts by more than one forward of the model ({type(self).predict.__doc__}), so "
                "that no plain model predicts the same. Keep the adapter, with adapter.paused() where it must not learn."
            )
        return self.model

    def export(self, calibration: Tensor | None = None, *, exact: bool = False) -> nn.Module:
        """A plain copy of the source model with the adapted weights: its own class and ``state_dict`` keys, frozen.

        BatchNorm layers hold the statistics that the method would use. A method that normalises by the present batch has
        none to store: those of the calibration images are taken. On these images the copy predicts what the adapter
        predicts while :meth:`paused`, to rounding. It holds nothing of this toolkit, so that it can be traced and exported.

        Args:
            calibration: images (batch, channels, height, width) of the domain that the copy is for, more than a few and
                of all classes; left out, the last batch that the adapter saw (of several workers, all parts of it: all must
                call this).
            exact: refuse to approximate instead of warning.

        Raises:
            ValueError: the method predicts by more than a forward of one module, or normalises by the batch and there are
                no images; with ``exact``, also if the copy's predictions differ from the adapter's.
        """
        if self.workers.size > 1:
            return self._export_alone(calibration, exact)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            model = self.predicting_model()
            images = self._last if calibration is None else self._checked(calibration)
            batch_norms = export.needs_images(model)
            if batch_norms and images is None:
                raise ValueError(
                    f"{type(self).__name__} normalises {len(batch_norms)} layers by the present batch, so that they have no "
                    "statistics to store. Pass calibration=images of the domain that the exported model is for."
                )
            statistics = export.batch_statistics(model, images) if batch_norms and images is not None else {}
            plain = export.plain(model, self._source_norms, statistics)
            modules.remove_hooks(plain, (ToLogits, caches.Forget, *distributed.HOOKS))
            if images is not None:
                self._compare(plain, images, exact)
            return plain

    def _export_alone(self, calibration: Tensor | None, exact: bool) -> nn.Module:
        """The export of a copy that has no other workers."""
        if calibration is None and self._last is not None:
            calibration = self.workers.gathered(self._last)[0]
        return copy.deepcopy(self).export(calibration, exact=exact)

    def _compare(self, plain: nn.Module, images: Tensor, exact: bool) -> None:
        """Warn, or raise, if the plain model does not predict as the adapter does; boxes are not compared."""
        if not self.task.tensors:
            return
        images = plain_images(images)
        found = plain(images)
        converted = self.outputs(plain, (images,), found)
        own, theirs = self.predict(images), logits_of(found if converted is None else converted)
        difference = float((own - theirs).abs().max())
        if difference > 1e-3 * max(1.0, float(own.abs().max())):  # rounding of other kernels is below 1e-5
            differ = f"outputs differ by up to {difference:.2g}"
            if self.task.of_classes:
                agreeing = 100 * float((own.argmax(1) == theirs.argmax(1)).float().mean())
                differ = f"{agreeing:.0f} % of the predictions agree, logits differ by up to {difference:.2g}"
            text = (
                f"The exported model only comes near to {type(self).__name__}, whose layers do more than a plain model's: on "
                f"{len(images)} images {differ}."
            )
            if exact:
                raise ValueError(text)
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def train(self, mode: bool = True) -> "Adapter":
        """Set the adapter's own flag only: the modes of the model's layers are chosen in :meth:`configure_model`."""
        self.training = mode
        return self

    # ------------------------------------------------------------------ inner workings

    def _ids_or_refusal(self, ids: Sequence[int] | Tensor | None, x: Tensor) -> Tensor | None:
        """The ids of a batch; of several workers all refuse it together, in :meth:`_checked`."""
        if self.workers.size == 1:
            return self._checked_ids(ids, x)
        self._refused = None
        try:
            return self._checked_ids(ids, x)
        except (ValueError, TypeError) as error:
            self._refused = ValueError(str(error))
            return None

    def _look_up(self, source: SourceLike | None) -> list[Known]:
        """The source statistics that the method needs, on the adapter's device."""
        needs = self.source_needs(self.model, self.config)
        if not needs:
            return []
        if source is None:
            raise ValueError(
                f"{type(self).__name__} needs to know the source domain ({', '.join(need.kind for need in needs)}). "
                f"Pass source=: {EXPECTED}."
            )
        batch_size = getattr(self.config, "source_batch_size", BATCH_SIZE)
        statistics = known_from(source, self.model, self.source_fingerprint, needs, batch_size)
        self.source_statistics, self.statistics = statistics.describe(), statistics
        return [{name: v.to(self.device) for name, v in entry.known.items()} for entry in statistics.entries]


def config_class(method: type[Adapter]) -> type[Config]:
    """The dataclass that a method names with its annotation ``config: MyConfig``."""
    kind: type[Config] = get_type_hints(method)["config"]
    return kind
