"""The guard: settings, events, and the guardian that stands between an adapter and its stream."""

import copy
import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tta import channels_last
from tta.adapter import Adapter, Answers, Output, StateDict
from tta.distributed import Workers
from tta.functional import logits_of, plain_images
from tta.guard.labelled import Labelled
from tta.guard.monitor import ENOUGH, Monitor, some_pixels
from tta.guard.shift import InputShift, measured
from tta.guard.stuck import StuckInput
from tta.hyperparameters import as_dict
from tta.messages import require
from tta.tasks import Task

LOG = logging.getLogger("tta.guard")
CHECKED_IMAGES = 64  # of a batch that the source model predicts too
FEW = 32  # images
SUSPICIOUS = 0.05  # mean harm of the last batch or two above the tolerance, at which every batch is checked
SNAPSHOT_EVERY = 64  # batches
LONGEST_TRIAL = 8  # times the first one; a trial grows as the holds do
FORGIVEN_AFTER = 8  # times the last hold without an alarm, after which the next hold is shorter
HISTORY = 100  # events that are kept
ASKED_FOR = 64  # batches since somebody asked for questions, in which some are prepared


class Event(NamedTuple):
    """A decision of the guard: the number of the batch since the start, its kind, and the reason in words.

    Kinds: ``alarm``, ``labelled`` (an alarm by answers), ``overruled`` (an alarm that answers show to be false), ``rollback`` (to a
    snapshot, or to the source model), ``hold`` (learning stops), ``trial`` (learning on trial, the source model answers),
    ``resume``, ``stuck`` and ``moving`` (the input repeats one picture; no longer).
    """

    batch: int
    kind: Literal["alarm", "labelled", "overruled", "rollback", "hold", "trial", "resume", "stuck", "moving"]
    reason: str


@dataclass(frozen=True)
class Guard:
    """Settings of the guard around an adapter, see :class:`Guardian`.

    Attributes:
        level: probability of a false alarm by risk over the whole stream, in (0, 1), see :class:`tta.guard.Monitor`; and of one
            by answers, see :class:`tta.guard.Labelled`.
        tolerance: mean harm that is allowed, see :func:`tta.guard.harm`; and by answers, risk above the source model's.
        share: cost of the comparison with the source model, in frozen forwards a batch, above 0.
        hold: batches without learning after an alarm; each further alarm doubles it.
        longest_hold: batches that a hold lasts at most.
        seconds: time for a batch on average; while the adapter is behind it, batches are only predicted. None: no limit.
        asked_only: count answers to the guard's own questions alone, where others come mostly about mistakes.
        on_event: called with each :class:`Event`; of several workers, at each.
    """

    level: float = 0.05
    tolerance: float = 0.02
    share: float = 0.125
    hold: int = 32
    longest_hold: int = 4096
    seconds: float | None = None
    asked_only: bool = False
    on_event: Callable[[Event], Any] | None = None

    def __post_init__(self) -> None:
        require(0 < self.level < 1, f"level={self.level}", "a probability in (0, 1)")
        require(math.isfinite(self.tolerance), f"tolerance={self.tolerance}", "a finite mean harm, such as 0.02")
        require(0 < self.share <= 1, f"share={self.share}", "forwards a batch in (0, 1]")
        require(self.hold >= 1, f"hold={self.hold}", "1 batch or more")
        require(self.longest_hold >= self.hold, f"longest_hold={self.longest_hold}", f"hold={self.hold} or more")
        require(self.seconds is None or self.seconds > 0, f"seconds={self.seconds}", "a time above 0, or None")

    @classmethod
    def of(cls, given: "bool | Guard | Mapping[str, Any]") -> "Guard | None":
        """The guard that ``guard=`` asks for: ``True`` is one with the defaults, a mapping names settings.

        Raises:
            TypeError: something else.
            ValueError: a setting that does not exist or does not fit.
        """
        if isinstance(given, Guard):
            return given
        if isinstance(given, bool):
            return cls() if given else None
        if not isinstance(given, Mapping):
            raise TypeError(f"guard is True, False, or tta.Guard(...); got {given!r}.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            require(name in known, f"guard setting '{name}'", f"one of {', '.join(known)}")
        return cls(**given)


@dataclass
class _Numbers:
    """All that a guardian remembers in plain numbers."""

    batches: int = 0
    phase: Literal["learning", "held", "source", "trial"] = "learning"
    compared: int = 0  # images, since learning began or went on
    next_check: int = 0  # batch
    left: int = 0  # batches of the hold
    last_hold: int = 0
    undecided: bool = False  # who answers during the hold
    quiet: int = 0  # batches since the last alarm
    last_snapshot: int = 0  # batch
    recoveries: int = 0  # of the adapter, as last seen
    debt: float = 0.0  # seconds behind the time budget
    stuck: bool = False
    checks: int = 0
    alarms: int = 0
    rollbacks: int = 0
    held: int = 0  # batches
    by_source: int = 0  # batches
    labelled: int = 0  # alarms by answers
    overruled: int = 0  # alarms
    wanted: int = 0  # questions, when they were last asked for
    wanted_until: int = 0  # batch
    asked: int = 0  # times


class Guardian:
    """Stands between an adapter and its stream, so that it is never worse than the source model for long.

    On some batches the frozen source model predicts too, and a :class:`Monitor` compares. On an alarm the adapter goes back
    to its last good snapshot (on a second one soon after, to the source model), learning is held, and while the adapter is
    still worse by the monitor, the source model answers. After the hold the adapter must pass a trial: it learns, and the
    source model answers, until enough images were compared. Each alarm doubles the hold; a long quiet time halves it again.
    A stuck input teaches nothing.

    Where answers come (:meth:`tta.Adapter.feedback`), labelled beats proxy: answers that show harm raise an alarm by themselves, and
    the adapter goes back to the source model; answers that show a gain overrule one alarm of the monitor, let the adapter answer
    during a hold, or end a trial.
    See :class:`tta.guard.Labelled`.

    Works around every method, since it uses no more of an adapter than: learn from a batch, predict, state, go back.

    Args:
        model: the source model, which is kept and must not change.
        settings: see :class:`Guard`.
        adapter: the adapter that it will guard.
    """

    def __init__(self, model: nn.Module, settings: Guard, adapter: Adapter) -> None:
        _check_task(adapter.task)
        self.settings = settings
        self._outputs = adapter.outputs
        self.workers = adapter.workers
        self.source = model.eval().requires_grad_(False)
        self.source.register_forward_hook(adapter.outputs)
        if channels_last.pays(self.source):
            self.source.to(memory_format=torch.channels_last)
        self.shift = InputShift(self.source)
        self.history: deque[Event] = deque(maxlen=HISTORY)
        self.reset()

    def reset(self) -> None:
        """Start anew, as the adapter does when it is reset; the history of events stays."""
        self.numbers = _Numbers()
        self.monitor: Monitor | None = None  # made when the number of classes is known
        self.stuck = StuckInput(self.workers)
        self.snapshots: list[StateDict] = []  # oldest first, two at most
        self.action = "learned"  # taken with the last batch
        self.events: tuple[Event, ...] = ()  # of the last batch, and of answers before it
        self._early: tuple[Event, ...] = ()  # of answers since the last batch
        self.labelled = Labelled(self.settings.level, self.settings.tolerance, self.settings.asked_only)
        self._adapted: Tensor | None = None  # logits of the last batch, as far as they are known
        self._of_source: Tensor | None = None
        self._picked = torch.zeros(0, dtype=torch.int64)  # rows of the last batch to be asked about

    def share(self, workers: Workers) -> list[nn.Module]:
        """Decide about batches of which each worker holds a part; the models that it calls with these parts."""
        self.workers = self.shift.workers = self.stuck.workers = workers
        return [self.source]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of checks, alarms and rollbacks; of batches held and answered by the source model; of alarms by answers and
        overruled by them; of answers taken, and of those that could be compared.
        """
        names = ("checks", "alarms", "rollbacks", "held", "by_source", "labelled", "overruled")
        of_answers = {"answers": self.answers.taken, "pairs": self.labelled.pairs}
        return {name: getattr(self.numbers, name) for name in names} | of_answers

    @property
    def answers_by_source(self) -> bool:
        """Whether the source model answers now."""
        return self.numbers.phase in ("source", "trial")

    # ------------------------------------------------------------------ a batch

    def predict(self, adapter: Adapter, x: Tensor) -> Tensor:
        """Logits as the guarded adapter would give them now; changes no state."""
        return self._by_source(x) if self.answers_by_source else adapter.predict(x)

    def step(self, adapter: Adapter, x: Tensor) -> Output:
        """Predict a checked batch, and learn from it where that is wise."""
        (self.events, self._early), start = (self._early, ()), time.perf_counter()
        self._adapted = self._of_source = None
        self._picked = self._picked[:0]
        before = copy.copy(self.stuck), dataclasses.replace(self.numbers)
        now = self.numbers
        stuck = self.stuck.look(x)
        self._tell_stuck(stuck)
        try:
            if stuck:
                output = self._answered(x)
            elif self.labelled.harm and now.phase in ("learning", "trial"):
                self._only_predicted(adapter, x)  # a batch that does not fit is refused here
                now.held -= 1
                output = self._alarm(adapter, x, self.labelled.harm, "labelled")
            elif now.left:
                output = self._held(adapter, x)
            elif now.debt > 0:
                output = self._only_predicted(adapter, x)
            else:
                output = self._learned(adapter, x)
            if now.batches < now.wanted_until and not stuck:
                self._pick(adapter, x)
        except Exception:  # a batch that is refused leaves the guard as it was
            self.stuck, self.numbers = before
            raise
        now.batches += 1
        now.quiet += 1
        if self.settings.seconds is not None:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            spent = max(self.workers.objects(time.perf_counter() - start))  # the slowest worker's: all decide alike
            now.debt = max(0.0, now.debt + spent - self.settings.seconds)
        return output

    def _learned(self, adapter: Adapter, x: Tensor) -> Output:
        """Learn from the batch; compare it with the source model if that is due."""
        now = self.numbers
        output = adapter.learn(x)
        _check_task(adapter.task)  # it may be recognised at the first batch only
        self.action, self._adapted = "learned", output.logits
        on_trial = now.phase == "trial"
        if not (on_trial or now.batches >= now.next_check or now.compared < ENOUGH):
            return output
        alarm, of_source = self._compared(adapter, x, output.logits)
        if on_trial and now.compared >= ENOUGH * min(now.last_hold / self.settings.hold, LONGEST_TRIAL):
            alarm = alarm or self._judged()
        if alarm:
            return self._alarm(adapter, x, alarm)
        self._keep(adapter)
        if now.phase == "trial":
            now.by_source += 1
            self.action = "source"
            self._of_source = of_source if self.workers.total(x) <= CHECKED_IMAGES else self._by_source(x)
            return Output(self._of_source)
        return output

    def _held(self, adapter: Adapter, x: Tensor) -> Output:
        """One batch of a hold; at its end learning goes on, on trial if the source model answered."""
        now = self.numbers
        now.left -= 1
        if now.undecided and self.workers.total(x) >= FEW:
            output = self._chosen(adapter, x)
        elif now.phase == "source":
            output = self._answered(x)
        else:
            output = self._only_predicted(adapter, x)
        if now.phase == "held":
            alarm = self.labelled.harm
            kind = "labelled" if alarm else "alarm"
            if not alarm and now.batches >= now.next_check:
                alarm, _ = self._compared(adapter, x, output.logits)
            if alarm:
                now.labelled += kind == "labelled"
                self._tell(kind, f"{alarm}, while learning was held: the source model answers")
                now.alarms += 1
                now.held -= 1  # this batch is answered by the source model after all
                now.phase = "source"
                output = self._answered(x)
        if now.left == 0:
            now.undecided = False
            now.phase = "trial" if now.phase == "source" else "learning"
            self._restart()
            self._tell("trial" if now.phase == "trial" else "resume", f"after a hold of {now.last_hold} batches")
        return output

    def _judged(self) -> str:
        """End the trial: learning goes on, or the reason why not."""
        assert self.monitor is not None
        harm = self.monitor.mean
        if harm > self.settings.tolerance:
            return f"the trial was not passed: harm {harm:+.2f} a prediction"
        self.numbers.phase = "learning"
        self._tell("resume", f"the trial was passed: harm {harm:+.2f} a prediction")
        return ""

    def _answered(self, x: Tensor) -> Output:
        self.action = "source"
        self.numbers.by_source += 1
        self._of_source = self._by_source(x)
        return Output(self._of_source)

    def _only_predicted(self, adapter: Adapter, x: Tensor) -> Output:
        self.action = "held"
        self.numbers.held += 1
        with torch.no_grad():
            self._adapted = adapter.predict(x)
        return Output(self._adapted)

    def _by_source(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.source(plain_images(x))
            _check_task(self._outputs.task)  # a stuck first batch is seen by this model alone
            return logits_of(output)

    # ------------------------------------------------------------------ decisions

    def _compared(self, adapter: Adapter, x: Tensor, logits: Tensor) -> tuple[str, Tensor]:
        """The reason for an alarm, empty without one, and the source model's logits of the first images, of these here."""
        now, total, logits = self.numbers, self.workers.total(x), logits.detach()
        images = min(total, CHECKED_IMAGES)
        own, shift = measured(self.shift, self._by_source, self._first(x, images))
        self._of_source = own
        of_source, _ = self.workers.gathered(some_pixels(own))
        logits, _ = self.workers.gathered(some_pixels(logits))
        rows = len(of_source)  # with several labels an image there are several rows an image
        if self.monitor is None:
            self.monitor = Monitor(logits.shape[1], self.settings.level, self.settings.tolerance)
        now.checks += 1
        now.compared += images
        recoveries = adapter.progress().recoveries
        if recoveries > now.recoveries:
            now.recoveries = recoveries
            return "logits were not finite", own
        alarm = self._unless_overruled(self.monitor.update(logits[:rows], of_source, shift))
        period = math.ceil(images / total / self.settings.share)
        if self.monitor.test.mean > self.settings.tolerance + SUSPICIOUS:
            period = 1
        elif now.compared < 2 * ENOUGH or not self._forgiven:
            period = math.ceil(period / 2)
        now.next_check = now.batches + period
        return alarm, own

    def _first(self, x: Tensor, images: int) -> Tensor:
        """This worker's among the first images of the whole batch."""
        if self.workers.size == 1:
            return x[:images]
        before = sum(self.workers.objects(len(x))[: self.workers.rank])
        return x[: max(0, images - before)]

    def _alarm(self, adapter: Adapter, x: Tensor, reason: str, kind: Literal["alarm", "labelled"] = "alarm") -> Output:
        """Go back, hold learning, and choose who answers meanwhile."""
        now = self.numbers
        again = now.alarms > 0 and not self._forgiven
        self._tell(kind, reason)
        now.alarms += 1
        now.labelled += kind == "labelled"
        # A snapshot is good by the monitor, which answers have just shown to be blind.
        kept = self.snapshots[0] if self.snapshots and not again and kind == "alarm" else None
        adapter.return_to(kept)
        self.snapshots = [] if kept is None else [kept]
        now.rollbacks += 1
        now.recoveries = adapter.progress().recoveries
        self._tell("rollback", "to the source model" if kept is None else "to the last good snapshot")
        length = now.last_hold * 2 if again else now.last_hold // 2
        now.last_hold = min(max(length, self.settings.hold), self.settings.longest_hold)
        now.left, now.quiet = now.last_hold, 0
        self._restart()
        output = self._chosen(adapter, x)
        who = "source model" if now.phase == "source" else "adapter"
        self._tell("hold", f"{now.left} batches, predicted by the {who}")
        return output

    def _chosen(self, adapter: Adapter, x: Tensor) -> Output:
        """Choose who answers during a hold by the harm on this batch; of few images it says nothing, and a later one decides."""
        now = self.numbers
        with torch.no_grad():
            predicted = adapter.predict(x)
        of_source, shift = measured(self.shift, self._by_source, x)
        self._adapted, self._of_source = predicted, of_source
        now.undecided = self.workers.total(x) < FEW
        assert self.monitor is not None
        if not now.undecided:
            own, others = (self.workers.gathered(some_pixels(logits))[0] for logits in (predicted, of_source))
            self.monitor.update(own, others, shift)
        worse = now.undecided or self.monitor.mean > self.settings.tolerance
        now.phase = self.action = "source" if worse else "held"
        now.next_check = now.batches + 1
        if worse:
            now.by_source += 1
        else:
            now.held += 1
        return Output(of_source if worse else predicted)

    @property
    def _forgiven(self) -> bool:
        """Whether the last alarm was long ago, or there was none."""
        return self.numbers.quiet > FORGIVEN_AFTER * self.numbers.last_hold or not self.numbers.alarms

    def _restart(self) -> None:
        """Compare from here on: what was compared before is of another adapter."""
        assert self.monitor is not None
        self.monitor.restart()
        self.labelled.restart()
        self.numbers.compared = 0

    # ------------------------------------------------------------------ answers

    def _unless_overruled(self, alarm: str) -> str:
        """The alarm of the monitor; empty if answers show the adapter to be better. That uses them up: the next takes new ones."""
        if alarm and (better := self.labelled.better):
            self._tell("overruled", f"{alarm}; but {better}")
            self.numbers.overruled += 1
            self._restart()
            return ""
        return alarm

    def _pick(self, adapter: Adapter, x: Tensor) -> None:
        """Choose images of the batch at random to be asked about, and see to it that both models have predicted them."""
        if self._adapted is None:
            with torch.no_grad():
                self._adapted = adapter.predict(x)
        if self._adapted.dim() != 2 or len(self._adapted) != len(x):  # several labels an image
            return
        draws = torch.Generator().manual_seed(self.numbers.batches)
        self._picked = torch.randperm(len(x), generator=draws)[: self.numbers.wanted]

    def remember(self, x: Tensor, ids: Tensor | None) -> Tensor | None:
        """Keep what was predicted for the images of :meth:`step`, and give their ids, which are counted if there are none."""
        known = self._adapted if self._adapted is not None else self._of_source
        if known is None or known.dim() != 2 or len(known) != len(x):  # several labels an image
            return ids
        predicted = torch.full((2, len(x)), -1, dtype=torch.int32, device=known.device)
        for row, logits in enumerate((self._adapted, self._of_source)):
            if logits is not None:
                predicted[row, : len(logits)] = logits.detach().argmax(1).int()
        compared = 0 if self._of_source is None else len(self._of_source)
        missing = self._picked[self._picked >= compared].to(x.device)
        if len(missing):
            predicted[1, missing] = self._by_source(x[missing]).argmax(1).int()
        by_source = self.action == "source"
        self._adapted = self._of_source = None
        return self.labelled.remember(ids, predicted, self._picked, classes=known.shape[1], by_source=by_source)

    def ask(self, count: int) -> list[int]:
        """Ids of predictions that it would like to be told about, chosen at random; each is asked about once.

        From now on, for 64 batches, it lets the source model predict as many images of each batch.
        """
        now = self.numbers
        now.wanted, now.wanted_until = count, now.batches + ASKED_FOR
        now.asked += 1
        return self.labelled.ask(count, now.asked)

    def tell(self, ids: Tensor, right: Tensor | None, labels: Tensor | None) -> Answers:
        """Take answers, see :meth:`tta.guard.Labelled.tell`.

        Those that show the adapter to be better end a trial. In a hold they let the adapter answer again in place of the source
        model; that it did not learn there is no sign that learning would do no harm, so that the hold goes on.
        """
        counted, now = self.labelled.tell(ids, right, labels), self.numbers
        better = self.labelled.better
        if better and now.phase in ("source", "trial"):
            events, self.events = self.events, ()  # these are of the next batch
            if now.phase == "trial":
                now.phase = "learning"
                self._restart()
                self._tell("resume", f"the trial was passed: {better}")
            else:
                assert self.monitor is not None
                now.phase = "held"
                now.overruled += 1
                self.monitor.restart()
                self._tell("overruled", f"the adapter answers: {better}")
            self._early, self.events = (*self._early, *self.events), events
        return counted

    def leave_out(self, ids: Tensor) -> None:
        """Let answers about some predictions tell nothing: the method asks about them."""
        self.labelled.leave_out(ids)

    @property
    def answers(self) -> Answers:
        """Counts of all answers since the start."""
        return Answers(*self.labelled.counts)

    @property
    def classes(self) -> int:
        """Classes of the model, 0 before the first batch."""
        return self.labelled.classes

    # ------------------------------------------------------------------ snapshots and events

    def _keep(self, adapter: Adapter) -> None:
        """Keep a snapshot now and then while the adapter is good; the older of two is the one to go back to."""
        now = self.numbers
        assert self.monitor is not None
        good = now.phase == "learning" and self.monitor.mean <= self.settings.tolerance
        if good and now.compared >= ENOUGH and now.batches >= now.last_snapshot + SNAPSHOT_EVERY:
            now.last_snapshot = now.batches
            self.snapshots = [*self.snapshots[-1:], adapter.changed_state()]

    def _tell_stuck(self, stuck: bool) -> None:
        if stuck != self.numbers.stuck:
            self.numbers.stuck = stuck
            text = "the input repeats one picture: nothing is learned, the source model answers"
            self._tell("stuck" if stuck else "moving", text if stuck else "the pictures differ again")

    def _tell(self, kind: Any, reason: str) -> None:
        event = Event(self.numbers.batches, kind, reason)
        self.events = (*self.events, event)
        self.history.append(event)
        if not self.workers.rank:
            LOG.log(logging.WARNING if kind in ("alarm", "stuck") else logging.INFO, "batch %d: %s: %s", *event)
        if self.settings.on_event is not None:
            self.settings.on_event(event)

    # ------------------------------------------------------------------ state

    def described(self) -> dict[str, Any]:
        """The settings as plain values, for the identity of a state and the manifest of a run."""
        return {name: value for name, value in as_dict(self.settings).items() if name != "on_event"}

    def state(self) -> tuple[dict[str, Any], StateDict]:
        """Everything remembered: numbers that JSON can hold, and tensors."""
        tensors: StateDict = {}
        if self.stuck.last is not None and self.stuck.run is not None:
            tensors |= {"last": self.stuck.last, "run": self.stuck.run}
        if self.monitor is not None:
            tensors |= {"predicted": self.monitor.predicted, "latest": self.monitor.latest}
        for number, snapshot in enumerate(self.snapshots):
            tensors |= {f"snapshot{number}.{name}": value for name, value in snapshot.items()}
        monitor = None if self.monitor is None else self.monitor.numbers()
        labelled, of_answers = self.labelled.state()
        plain = {"numbers": asdict(self.numbers), "monitor": monitor, "labelled": labelled}
        return plain, tensors | of_answers

    def load(self, plain: Mapping[str, Any], tensors: StateDict) -> None:
        """Take over a state of :meth:`state`."""
        self.reset()
        self.numbers = _Numbers(**plain["numbers"])
        if "labelled" in plain:  # earlier versions had none
            self.labelled.load(plain["labelled"], tensors)
        if "last" in tensors:
            self.stuck.last, self.stuck.run = tensors["last"].clone(), tensors["run"].clone()
        if plain["monitor"] is not None:
            predicted, latest = tensors["predicted"].cpu(), tensors.get("latest")
            self.monitor = Monitor(predicted.shape[1], self.settings.level, self.settings.tolerance)
            self.monitor.load(plain["monitor"], predicted, None if latest is None else latest.cpu())
        for number in range(2):
            prefix = f"snapshot{number}."
            found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            if found:
                self.snapshots.append({name: value.clone() for name, value in found.items()})

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the source model along with the adapter (``to``, ``cuda`` ...)."""
        self.source._apply(fn)  # type: ignore[no-untyped-call]  # noqa: SLF001  # as a child module would be
        self.labelled.move(fn)


def _check_task(task: Task) -> None:
    """Raise a ValueError for a task whose predictions the guard cannot compare."""
    if not task.of_classes:
        raise ValueError(
            f"The guard compares probabilities of classes with the source model's; it does not serve {task.name}. Leave "
            "guard= out, or evaluate with reset='domain' to limit how far the adapter can go."
        )
