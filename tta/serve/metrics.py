"""Metrics: what the server counts, and what it shows of the predictions, as Prometheus reads them."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from torch import Tensor

from tta.adapter import Adapter, Answers
from tta.serve.worker import Batch

RECENT, LONG = (
    256,
    16384,
)  # images after which a prediction weighs half, in the present and in the past compared with it
MOST_CLASSES = 50  # that are shown, those predicted most often
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
EVERY = 32  # batches between two measures of the weights


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        names: of the classes; their numbers where there are none.
        waiting: gives the number of images that wait.
    """

    def __init__(self, names: Sequence[str] | None, waiting: Callable[[], int]) -> None:
        self.names = names
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("tta_requests", "Requests answered.", ["endpoint", "code"], registry=registry)
        self.seconds = Histogram(
            "tta_request_seconds", "Time to answer a request to predict.", buckets=SECONDS, registry=registry
        )
        self.in_flight = Gauge("tta_requests_in_flight", "Requests to predict that are in work.", registry=registry)
        self.images = Counter("tta_images", "Images predicted.", registry=registry)
        self.batches = Counter(
            "tta_batches", "Batches: learned from, held (predicted only), or by the source model.", ["answered"],
            registry=registry,
        )  # fmt: skip
        self.events = Counter("tta_guard_events", "Decisions of the guard.", ["kind"], registry=registry)
        self.alarms = Counter("tta_alarms", "Alarms of the guard.", registry=registry)
        self.rollbacks = Counter("tta_rollbacks", "Times that the guard went back.", registry=registry)
        self.states = Counter("tta_autosaves", "States saved, or not.", ["result"], registry=registry)
        self.feedback = Counter("tta_feedback", "Answers about predictions.", ["result"], registry=registry)
        self.paused = Gauge("tta_paused", "1 while nothing is learned.", registry=registry)
        self.weights = Gauge(
            "tta_weight_drift", "Distance of the adapted weights to the source's, relative to these.", registry=registry
        )
        for answered in ("learned", "held", "source"):
            self.batches.labels(answered)
        for result in Answers._fields:
            self.feedback.labels(result)
        self._waiting = waiting
        self._of_weights = 0  # batches since the last measure
        self._recent: Tensor | None = (
            None  # (2, classes + 1): weighted sums of now and of long; entropy in the last column
        )
        registry.register(self)
        ProcessCollector(registry=registry)

    def saw(self, adapter: Adapter, batch: Batch) -> None:
        """Count a batch; on the worker's thread."""
        self.images.inc(len(batch.probabilities))
        self.batches.labels(batch.answered).inc()
        for event in batch.events:
            self.events.labels(event.kind).inc()
            if event.kind in ("alarm", "labelled", "rollback"):
                (self.rollbacks if event.kind == "rollback" else self.alarms).inc()
        p = batch.probabilities.double()
        classes = torch.bincount(p.argmax(1), minlength=p.shape[1]).double()
        new = torch.cat([classes, torch.special.entr(p).sum()[None]])
        before = torch.zeros(2, len(new), dtype=torch.float64) if self._recent is None else self._recent
        kept = 0.5 ** (len(p) / torch.tensor([[RECENT], [LONG]], dtype=torch.float64))
        self._recent = kept * before + new
        if self._of_weights % EVERY == 0:
            self.weights.set(weight_drift(adapter))
        self._of_weights += 1

    @property
    def entropy(self) -> float:
        """Mean entropy of the latest predictions in nats; NaN before the first."""
        sums = self._recent
        return math.nan if sums is None else float(sums[0, -1] / sums[0, :-1].sum())

    @property
    def shares(self) -> Tensor | None:
        """Shares of the predicted classes, (2, classes): of the latest predictions, and of long."""
        sums = self._recent
        return None if sums is None else sums[:, :-1] / sums[:, :-1].sum(1, keepdim=True)

    @property
    def drift(self) -> float:
        """Total variation distance, 0 to 1, of the latest class shares to the long ones; NaN before the first."""
        shares = self.shares
        return math.nan if shares is None else float((shares[0] - shares[1]).abs().sum() / 2)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges that are computed when they are read."""
        yield GaugeMetricFamily("tta_images_waiting", "Images that wait for their batch.", self._waiting())
        yield GaugeMetricFamily("tta_entropy_mean", "Mean entropy of the latest predictions, nats.", self.entropy)
        yield GaugeMetricFamily(
            "tta_class_drift", "Total variation distance of the latest class shares to those of long.", self.drift
        )
        shares = GaugeMetricFamily("tta_class_share", "Shares of the latest predictions.", labels=["class"])
        found = self.shares
        if found is not None:
            values, classes = found[0].topk(min(MOST_CLASSES, found.shape[1]))
            for value, number in zip(values.tolist(), classes.tolist(), strict=True):
                shares.add_metric([str(number) if self.names is None else self.names[number]], value)
        yield shares


@torch.no_grad()
def weight_drift(adapter: Adapter) -> float:
    """The distance of the adapted weights to the source's, relative to these; 0 where no weights of the model adapt."""
    if adapter.optimizer is None:
        return 0.0
    try:
        adapted, source = adapter.adapted_and_source()
    except KeyError:  # the method put modules of its own into the model, which have no source values
        return math.nan
    if not adapted:
        return 0.0
    moved = sum(float((a - s).square().sum()) for a, s in zip(adapted, source, strict=True))
    whole = sum(float(s.square().sum()) for s in source)
    return math.sqrt(moved / whole) if whole else math.nan
