"""BiTTA: adaptation with binary feedback, whether a few predictions were right or wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tta import ema, norms, taps
from tta.adapter import Adapter, FeedbackConfig, Told, require
from tta.functional import logits_of, masked_mean
from tta.memory import LabelledQueue


@dataclass
class BiTTAConfig(FeedbackConfig):
    """The defaults are the released program's for CIFAR: SGD 1e-4 with Nesterov's momentum.

    Attributes:
        memory_size: samples answered right and answered wrong that are kept, each; of those without an answer the newest as
            many, or the last batch where that is larger.
        dropout: share of values dropped behind each stage, see :func:`tta.norms.stages`; in a network that is no chain, of the
            features.
        passes: forwards with dropout whose probabilities are averaged.
        bn_momentum: share of a batch's statistics in the stored statistics of a BatchNorm layer.
        bfa_weight: weight of the loss of answered samples.
        aba_weight: weight of the loss of samples without an answer.
        loss: ``"softmax"``: cross-entropy of the mean probabilities as if they were logits, as the released code does, which
            bounds it for wrong predictions; ``"log"``: minus the logarithm of the mean probability, as the paper writes it, here
            at least a tenth of 1 / classes.
        judged: prediction that an answer speaks of: the one ``"shown"``, or that of the moment in which the method asks, when
            the statistics have moved already: ``"present"``, as in the released code.
        restore: share of weights set back to their source values after each batch.
        steps: optimizer steps per batch.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 1e-4
    nesterov: bool = True
    steps: int = 3
    memory_size: int = 64
    dropout: float = 0.3
    passes: int = 4
    bn_momentum: float = 0.3
    bfa_weight: float = 1.0
    aba_weight: float = 1.0
    loss: Literal["softmax", "log"] = "softmax"
    judged: Literal["shown", "present"] = "shown"
    restore: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory_size >= 1, f"memory_size={self.memory_size}", "1 or more samples")
        require(0 <= self.dropout < 1, f"dropout={self.dropout}", "a share in [0, 1)")
        require(self.passes >= 1, f"passes={self.passes}", "1 or more forwards")
        require(0 <= self.bn_momentum <= 1, f"bn_momentum={self.bn_momentum}", "a share in [0, 1]")
        require(self.loss in ("softmax", "log"), f"loss={self.loss!r}", "'softmax' or 'log'")
        require(self.judged in ("shown", "present"), f"judged={self.judged!r}", "'shown' or 'present'")
        require(0 <= self.restore <= 1, f"restore={self.restore}", "a share in [0, 1]")


class BiTTA(Adapter):
    """Make right predictions likelier and wrong ones unlikelier, and follow those without an answer that dropout leaves alone.

    Lee et al., "Test-Time Adaptation with Binary Feedback", ICML 2025.

    All parameters adapt. Asked about are the predictions least likely under dropout. A batch is predicted by stored
    statistics, which then move towards its own; it is learned from when the next batch arrives, so that answers to it may come in
    between. Without any answer it learns from the agreement with dropout alone.
    """

    uses_feedback = ("correct", "labels")
    needs = "one class an image, which the answers are about"
    config: BiTTAConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(True)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            layer.momentum = self.config.bn_momentum  # type: ignore[assignment]
        self.stages = norms.stages(self.model)
        self.heads = [] if self.stages else taps.heads(self.model)
        self.right, self.wrong = LabelledQueue(self.config.memory_size), LabelledQueue(self.config.memory_size)

    def adapt(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if not self.input_finite:  # it would move the statistics, and hold back what the last batch teaches
                return self.predict(x)
            self._learn()
            logits = self.predict(x)
            with norms.training_statistics(self.model):
                self.model(x)
        return logits

    def choose(self, count: int) -> Tensor:
        """The samples whose predicted class is the least likely under dropout."""
        slots = self.waiting.open(self.config.memory_size)
        images = self.waiting.images(slots)
        if self.config.judged == "present":
            self.waiting.labels[slots] = self.predict(images).argmax(1).cpu()
        asked = self.waiting.labels[slots].to(images.device)
        likely = self._under_dropout(images).gather(1, asked[:, None])[:, 0]
        return slots[likely.argsort()[:count].cpu()]

    def be_told(self, answers: Told) -> None:
        for memory, which in ((self.right, answers.correct), (self.wrong, ~answers.correct)):
            if which.any():
                memory.add(answers.images[which.to(answers.images.device)], answers.predicted[which])

    @torch.enable_grad()
    def _learn(self) -> None:
        """Learn from what was answered, right and wrong, and from what was not."""
        if self.waiting.samples is None:
            return
        images, labels, sizes = self._memories()
        if len(images) < 2:
            self.nothing_to_learn()
            return
        for _ in range(self.config.steps):
            probabilities = self._under_dropout(images)
            with torch.no_grad(), norms.by_batch(self.model):
                plain = logits_of(self.model(images)).argmax(1)
            right, wrong, rest = torch.split(probabilities, sizes)
            says, denies, _ = torch.split(labels, sizes)
            agreed = plain[len(plain) - len(rest) :]
            bfa = self._loss(right, says).mean() if len(right) else probabilities.new_zeros(())
            bfa = bfa - self._loss(wrong, denies).mean() if len(wrong) else bfa
            followed = rest.argmax(1) == agreed
            aba = masked_mean(self._loss(rest, agreed), followed)
            answered = len(right) + len(wrong) > 0
            self.update(self.config.bfa_weight * bfa + self.config.aba_weight * aba, when=followed.any() | answered)
        if self.config.restore:
            self._restore_some()

    def _memories(self) -> tuple[Tensor, Tensor, list[int]]:
        """Images answered right, wrong, and not; their labels (of the last, the prediction shown); the number of each."""
        slots = self.waiting.open(self.config.memory_size)
        images = self.waiting.images(slots)
        parts = [memory.contents() for memory in (self.right, self.wrong) if len(memory)]
        parts.append((images, self.waiting.labels[slots].to(images.device)))
        sizes = [len(self.right), len(self.wrong), len(images)]
        return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]), sizes

    def _loss(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """Loss of each sample, (n,)."""
        if self.config.loss == "softmax":
            return nn.functional.cross_entropy(probabilities, labels, reduction="none")
        chosen = probabilities.gather(1, labels[:, None])[:, 0]
        return -chosen.clamp(min=0.1 / probabilities.shape[1]).log()

    def _restore_some(self) -> None:
        parameters, source = self.adapted_and_source()
        masks = [torch.rand(p.shape, generator=self.generator).to(p.device) < self.config.restore for p in parameters]
        ema.overwrite(parameters, source, masks)

    # ------------------------------------------------------------------ dropout

    def _under_dropout(self, images: Tensor) -> Tensor:
        """Probabilities (batch, classes), the mean of some forwards with dropout; BatchNorm layers normalise by the batch."""
        found = []
        with norms.by_batch(self.model):
            for number in range(self.config.passes):
                with self._dropping(number):
                    found.append(logits_of(self.model(images)).softmax(1))
        return torch.stack(found).mean(0)

    @contextmanager
    def _dropping(self, number: int) -> Iterator[None]:
        """Within this context values are dropped behind each stage, or before the classifier."""
        hooks = [
            self.model.get_submodule(name).register_forward_hook(partial(self._behind, number, place))
            for place, name in enumerate(self.stages)
        ]
        hooks += [
            self.model.get_submodule(name).register_forward_pre_hook(partial(self._before, number, place))
            for place, name in enumerate(self.heads)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _behind(self, number: int, place: int, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._dropped(number, place, output)
        first, *others = output
        return (self._dropped(number, place, first), *others)

    def _before(self, number: int, place: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._dropped(number, place, args[0]), *args[1:])

    def _dropped(self, number: int, place: int, x: Tensor) -> Tensor:
        return x * self._mask(number, place, x) / (1 - self.config.dropout)

    def _mask(self, number: int, place: int, x: Tensor) -> Tensor:
        """A mask of the values of ``x`` that stay, drawn on its device from a seed of the adapter's generator."""
        seed = int(torch.randint(2**31, (), generator=self.generator))
        return (
            torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
            >= self.config.dropout
        )
