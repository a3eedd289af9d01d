"""Methods that prepare the source model: their auxiliary part, how it is made, trained, given and found again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import auxiliary, auxiliary_file, fingerprint
from tta.adapter import Adapter, OptimizerConfig, own, require
from tta.auxiliary import own_tensors
from tta.functional import logits_of
from tta.source import Need


@dataclass
class SourceStageConfig(OptimizerConfig):
    """Settings of the auxiliary part: its file, or its training where there is none.

    Attributes:
        auxiliary: the file of ``tta train``, or from Python a trained module, see the method. Left out: the part in the
            model's own checkpoint; of a model without one, it is trained on source images, on its own, see ``source_steps``.
        source_steps: optimizer steps of that training, the classifier being frozen. It stands in for the paper's joint
            training and is weaker.
        source_samples: source images kept for it, a random sample.
    """

    auxiliary: Any = None
    source_steps: int = 60
    source_samples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.source_steps >= 1, f"source_steps={self.source_steps}", "1 or more steps")
        require(self.source_samples >= 1, f"source_samples={self.source_samples}", "1 image or more")


class SourceStage(Adapter):
    """A method whose source model is trained together with an auxiliary part."""

    config: SourceStageConfig
    _part: str | None = None  # fingerprint of a part that was given or carried
    # Hyper-parameters that say how the part is made and trained; a file holds them.
    made_by: ClassVar[tuple[str, ...]] = ()
    # Whether a part that nobody gave is trained on source images; else it stays as it is made.
    fitted_alone: ClassVar[bool] = True
    # Learning rate of the part in the source stage, as a factor of the classifier's.
    part_lr: ClassVar[float] = 1.0

    @classmethod
    def source_needs(cls, model: nn.Module, config: Any) -> list[Need]:
        if not cls.fitted_alone or config.auxiliary is not None or cls.carried(model) is not None:
            return []
        return [Need("replay", settings={"samples": config.source_samples})]

    @classmethod
    def carried(cls, model: nn.Module) -> auxiliary_file.Saved | None:
        """The part of this method in the checkpoint that a model was loaded from."""
        saved = getattr(model, "auxiliary", None)
        mine = isinstance(saved, auxiliary_file.Saved) and saved.method == cls.__module__.rpartition(".")[2]
        return saved if mine else None

    # ------------------------------------------------------------------ what a method defines

    @classmethod
    def make_auxiliary(cls, model: nn.Module, config: Any, generator: torch.Generator) -> nn.Module:
        """An untrained part, which may share modules with the classifier."""
        raise NotImplementedError

    @classmethod
    def wrap_auxiliary(cls, model: nn.Module, module: nn.Module, config: Any) -> nn.Module:
        """The part that a module of the user's own makes."""
        raise NotImplementedError

    @classmethod
    def auxiliary_loss(cls, part: nn.Module, images: Tensor, config: Any, generator: torch.Generator) -> Tensor:
        """The part's loss on a batch of source images in [0, 1]."""
        raise NotImplementedError

    @classmethod
    def source_losses(
        cls, model: nn.Module, part: nn.Module, images: Tensor, labels: Tensor, config: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of the source stage on a labelled batch, by name; their sum is minimised."""
        return {
            "classification": F.cross_entropy(logits_of(model(images)), labels),
            "auxiliary": cls.auxiliary_loss(part, images, config, generator),
        }

    # ------------------------------------------------------------------ what it is given

    @classmethod
    def settings(cls, config: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that made a saved part; in the configuration they take the place of its own.

        Raises:
            ValueError: the configuration has another value, which is no default; or the file has a setting that is not known.
        """
        if unknown := [name for name in saved if name not in cls.made_by]:
            raise ValueError(
                f"The auxiliary part was trained with {unknown[0]}={saved[unknown[0]]}, which is not known here."
            )
        default, made_with = type(config)(), {}
        for name in cls.made_by:
            given, usual = _plain(getattr(config, name)), _plain(getattr(default, name))
            there = _plain(saved.get(name, usual))  # the file may be older than the setting
            if given not in (there, usual):
                raise ValueError(
                    f"Got {name}={given}; the auxiliary part was trained with {name}={there}. Leave it out."
                )
            made_with[name] = there
        return made_with

    def identity(self) -> dict[str, Any]:
        """As of any adapter, with the fingerprint of a part that was given, wherever its file lies."""
        found = super().identity()
        if isinstance(self.config.auxiliary, nn.Module):  # in a file, an object; tta.load is given it again
            found["config"] = {**found["config"], "auxiliary": f"<{type(self.config.auxiliary).__name__}>"}
        return found if self._part is None else {**found, "contents": {"auxiliary": self._part}}

    def take_auxiliary(self) -> nn.Module:
        """The trained part of this adapter's model, frozen; ``self.config`` then has the settings that made it.

        Raises:
            ValueError: the file is of another method, or of other weights.
            FileNotFoundError: there is no such file.
        """
        given, saved = self.config.auxiliary, self.carried(self.model)
        if isinstance(given, nn.Module):
            part = self.wrap_auxiliary(self.model, own(given, copied=True).to(self.device), self.config)
        elif isinstance(given, (str, Path)):
            part = self._filled(self._of_file(given))
        elif given is not None:
            raise ValueError(f"auxiliary is the file of `tta train`, or a module; got {type(given).__name__}.")
        else:
            part = self._fitted() if saved is None else self._filled(saved)
        if given is not None or saved is not None:
            self._part = fingerprint.of_tensors(sorted(own_tensors(part, self.model).items()))
        return part.eval().requires_grad_(False)

    def _of_file(self, path: str | Path) -> auxiliary_file.Saved:
        saved, method = auxiliary_file.read(path), type(self).__module__.rpartition(".")[2]
        if saved is None or saved.method != method:
            found = "weights alone" if saved is None else f"the part of '{saved.method}'"
            raise ValueError(
                f"'{path}' holds {found}; '{method}' needs its own: `tta train {method} MODEL DATA -o FILE`."
            )
        return saved

    def _filled(self, saved: auxiliary_file.Saved) -> nn.Module:
        """A part with the settings and tensors of a file."""
        saved.check(self.model)
        self.config = replace(self.config, **self.settings(self.config, saved.settings))
        part = self.make_auxiliary(self.model, self.config, torch.Generator())
        saved.fill(part, self.model)
        return part

    def _fitted(self) -> nn.Module:
        """A part that is trained on the source images, or stays as it is made."""
        generator = torch.Generator().manual_seed(0)
        part = self.make_auxiliary(self.model, self.config, generator)
        if self.fitted_alone:
            (known,) = self.known

            def loss(images: Tensor) -> Tensor:
                return self.auxiliary_loss(part, images, self.config, generator)

            auxiliary.fit(self.model, part, known["images"], loss, self.config.source_steps, generator)
        return part

    @torch.no_grad()
    def back_to_source(self) -> None:
        """Set classifier and part back to their source values, with a new optimizer; counters and random numbers go on."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            source = self._source.get(name)
            if name.startswith(("model.", auxiliary_file.PREFIX)) and source is not None:
                tensor.copy_(source)
        self.restart_optimizer()


def _plain(value: Any) -> Any:
    """A setting as dataclasses hold it: JSON turns tuples into lists."""
    return tuple(value) if isinstance(value, list) else value
