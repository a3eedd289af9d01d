"""A classifier over the names of classes: the cosine between what an image tower and a text tower make."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import fingerprint
from tta.functional import matmul
from tta.messages import nearest, require
from tta.taps import GivenHead

TEMPLATE = "a photo of a {}."
FROZEN = "frozen_weights"  # attribute of each part of the text tower: names of its weights
AT_ONCE = 256  # prompts that the text tower reads together where no gradient is needed
CLIP_LOGIT_SCALE = 4.605170185988092  # ln 100, of OpenAI's CLIP

Tokenize = Callable[[Sequence[str]], Tensor]


class Shared:
    """A tokenizer, which copies of a model have in common: it is read only, and slow to copy."""

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


class Stamp(tuple[tuple[int, int], ...]):
    """Identities of tensors, each with its counter of in-place changes. A copy of it is empty, as a copy's tensors are others."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type["Stamp"], tuple[()]]:
        return Stamp, ()


class TwoTowers(nn.Module):
    """A classifier over the names of classes: images (batch, 3, height, width) in [0, 1] -> logits (batch, classes).

    logits = exp(logit_scale) * cos(image feature, text feature of the class) + logit_bias. The text features of the classes are
    computed once and kept in :attr:`class_features`; they are computed anew when the weights of the text tower have changed.
    The text tower is frozen: its weights are buffers, so that no method's rule can choose them for adaptation.
    :meth:`unfreeze_text` makes parameters of them.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.

    Args:
        image: module, normalised images -> features (batch, width), which need no unit length.
        text: module, token ids (texts, length) -> features (texts, width); it is copied, and the copy put into ``eval()`` mode.
        tokenize: list of texts -> ids (texts, length), int64.
        classes: names of the classes, in the order of the logits.
        templates: sentences with ``{}`` in the place of the name; of several, the mean of the unit features is taken.
        logit_scale: logarithm of the factor, as CLIP's and SigLIP's weights have it; ln 100 for OpenAI's CLIP.
        logit_bias: a number added to all logits, SigLIP's.
        token_embedding: name of the module in ``text`` that turns ids into vectors; the only one whose name ends with
            ``token_embedding``, or the only ``nn.Embedding``, if left out.
        mean: per channel, of images in [0, 1], if the image tower expects normalised images and nothing else normalises.
        std: per channel.

    Attributes:
        class_names: names of the classes.
        templates: sentences around them.
        class_features: (classes, width), of unit length.

    Raises:
        ValueError: fewer than two classes, a repeated name, a template without ``{}``, no module that embeds tokens, or
            towers whose features have no common width.
    """

    mean: Tensor
    std: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    class_features: Tensor
    class_names: list[str]
    templates: tuple[str, ...]
    head: GivenHead

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        tokenize: Tokenize,
        classes: Sequence[str],
        templates: Sequence[str] = (TEMPLATE,),
        *,
        logit_scale: float | Tensor = CLIP_LOGIT_SCALE,
        logit_bias: float | Tensor = 0.0,
        token_embedding: str | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.image = image
        self.text = to_buffers(copy.deepcopy(text)).eval()
        self.token_embedding = embedding_in(text, token_embedding)
        self._tokenizer = Shared(tokenize)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.register_buffer("logit_scale", torch.as_tensor(logit_scale).detach().float().reshape(()))
        self.register_buffer("logit_bias", torch.as_tensor(logit_bias).detach().float().reshape(()))
        self.set_classes(classes, templates)

    # ------------------------------------------------------------------ classes

    def set_classes(self, classes: Sequence[str], templates: Sequence[str] | None = None) -> "TwoTowers":
        """Classify by these names from now on; adapters made before keep the names that they were made with.

        Args:
            classes: names, in the order of the logits.
            templates: sentences with ``{}``; None for the present ones.
        """
        templates = self.templates if templates is None else templates
        require(
            not isinstance(classes, str) and len(classes) >= 2, f"classes={classes!r}", "a list of two or more names"
        )
        require(len(set(classes)) == len(classes), f"classes={list(classes)}", "names that are all different")
        require(
            not isinstance(templates, str) and len(templates) >= 1, f"templates={templates!r}", "a list of sentences"
        )
        for template in templates:
            require("{}" in template, f"template {template!r}", "a sentence with {} in the place of the name")
        self.class_names, self.templates = list(classes), tuple(templates)
        self.refresh()
        return self

    def select_classes(self, chosen: Sequence[int]) -> "TwoTowers":
        """Keep only these classes, by their places, in this order."""
        return self.set_classes([self.class_names[place] for place in chosen])

    @property
    def words(self) -> list[str]:
        """Names of the classes as they stand in a sentence: underscores are blanks."""
        return [name.replace("_", " ") for name in self.class_names]

    def refresh(self) -> Tensor:
        """Compute the text features of the classes anew, (classes, width), of unit length.

        Where the text tower adapts and gradients are on, those returned have one; those kept never have.
        """
        with torch.inference_mode(False):
            of_templates = [
                self.encode([template.replace("{}", word) for word in self.words]) for template in self.templates
            ]
            features = torch.stack([F.normalize(features, dim=-1) for features in of_templates]).mean(0)
            features = F.normalize(features, dim=-1)
            self._keep(features.detach())
            self._stamp, self._stamp_before = self._versions(), Stamp()
            self._fingerprint = "" if self.text_adapts else self._of_text()
        return features

    @torch.no_grad()
    def _keep(self, features: Tensor) -> None:
        if "class_features" in self._buffers and self.class_features.shape == features.shape:
            self.class_features.copy_(features)
            self.head.weight.copy_(self.scale * features)
            self.head.bias.copy_(self.logit_bias.expand(len(features)))
            return
        self.register_buffer("class_features", features)
        self.head = GivenHead(self.scale * features, self.logit_bias.expand(len(features)).clone())

    # ------------------------------------------------------------------ towers

    @property
    def scale(self) -> Tensor:
        """The factor between a cosine and a logit, a scalar."""
        return self.logit_scale.exp()

    def forward(self, images: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._update_classes()
        logits: Tensor = self.head(F.normalize(self.image_features(images).float(), dim=-1))
        return logits

    def logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """Logits of unit image features (..., width) with other unit features of the classes, (..., classes, width)."""
        return self.scale * matmul(features, classes.mT) + self.logit_bias

    def image_features(self, images: Tensor) -> Tensor:
        """Features of images in [0, 1], (batch, width); not of unit length."""
        features: Tensor = self.image((images - self.mean) / self.std)
        return features

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids of texts, (texts, length), on the device of the model."""
        return self._tokenizer.tokenize(list(texts)).to(self.logit_scale.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors of tokens, (texts, length, token width), before positions are added."""
        vectors: Tensor = self.text.get_submodule(self.token_embedding)(ids)
        return vectors

    def text_features(self, ids: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Features of texts, (texts, width); not of unit length.

        Args:
            ids: (texts, length). They also tell the tower where a text ends.
            embeddings: (texts, length, token width), in place of those of the ids.
        """
        with self._embedded_as(embeddings):
            features: Tensor = self.text(ids)
        return features.float()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, (texts, width); with a gradient where the text tower adapts."""
        return torch.cat([self.text_features(ids) for ids in torch.split(self.tokenize(texts), AT_ONCE)])

    @contextmanager
    def _embedded_as(self, embeddings: Tensor | None) -> Iterator[None]:
        """Within this context the module that embeds tokens gives these vectors."""
        if embeddings is None:
            yield
            return
        module = self.text.get_submodule(self.token_embedding)
        handle = module.register_forward_hook(lambda module, args, output: embeddings.to(output.dtype))
        try:
            yield
        finally:
            handle.remove()

    def described(self) -> str:
        """Description of the classifier in a line: classes, prompt, and which tower adapts."""
        prompt = repr(self.templates[0]) + (f" and {len(self.templates) - 1} more" if len(self.templates) > 1 else "")
        tower = "adapts too" if self.text_adapts else "is frozen, with its normalisation layers"
        return f"{len(self.class_names)} classes by name, prompt {prompt}; the text tower {tower}"

    # ------------------------------------------------------------------ the text tower's weights

    @property
    def text_adapts(self) -> bool:
        """Whether the weights of the text tower are parameters."""
        return next(self.text.parameters(), None) is not None

    def unfreeze_text(self) -> None:
        """Make parameters of the text tower's weights, for a method that adapts them."""
        shared: dict[int, nn.Parameter] = {}
        for part in self.text.modules():
            for name in getattr(part, FROZEN, ()):
                value = getattr(part, name)
                if not isinstance(value, nn.Parameter):
                    delattr(part, name)
                    part.register_parameter(name, shared.setdefault(id(value), nn.Parameter(value)))

    def _update_classes(self) -> None:
        """Drop the kept text features if the text tower is no longer the one that made them."""
        if (stamp := self._versions()) in (self._stamp, self._stamp_before):
            return
        # A copy, or a state that was put back, has other stamps and the same weights: those are hashed first, which is a
        # hundred times faster than a thousand prompts. Two stamps are kept, as Adapter.predict_as_source alternates.
        if self._fingerprint and self._fingerprint == self._of_text():
            self._stamp, self._stamp_before = stamp, self._stamp
        else:
            with torch.no_grad():
                self.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> "TwoTowers":
        """Cast or move; what makes logits of features stays float32: bfloat16 turns a factor of 100 into 99, and 25.1 into 25."""
        before = [(owner, name, owner.get_buffer(name)) for owner, name in self._precise()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for owner, name, value in before:
            found = owner.get_buffer(name)
            if found.element_size() < value.element_size():
                owner.register_buffer(name, value.to(found.device))
        self._stamp = self._stamp_before = Stamp()  # the counters of cast tensors start anew
        return self

    def _precise(self) -> list[tuple[nn.Module, str]]:
        own: list[tuple[nn.Module, str]] = [(self, name) for name in ("logit_scale", "logit_bias", "class_features")]
        # A method's second head in the place of this one has parameters, which are cast like all others.
        return own + [(self.head, name) for name, _ in self.head.named_buffers(recurse=False)]

    def _text_tensors(self) -> list[tuple[str, Tensor]]:
        own = [("logit_scale", self.logit_scale), ("logit_bias", self.logit_bias)]
        return [*own, *self.text.named_parameters(), *self.text.named_buffers()]

    def _versions(self) -> Stamp:
        # Tensors made under inference_mode have no counters.
        tensors = [value for _, value in self._text_tensors()]
        return Stamp((id(value), -1 if value.is_inference() else value._version) for value in tensors)  # noqa: SLF001

    def _of_text(self) -> str:
        return fingerprint.of_tensors(self._text_tensors())


def to_buffers(module: nn.Module) -> nn.Module:
    """Make buffers of all parameters of a module, in place; each part keeps their names."""
    shared: dict[int, Tensor] = {}
    for part in module.modules():
        names = [name for name, value in part.named_parameters(recurse=False, remove_duplicate=False)]
        for name in names:
            parameter = getattr(part, name)
            value = shared.setdefault(id(parameter), parameter.detach().clone())
            delattr(part, name)
            part.register_buffer(name, value)
        setattr(part, FROZEN, tuple(names))
    return module


def embedding_in(text: nn.Module, name: str | None) -> str:
    """Name of the module that turns ids into vectors: as given, or found.

    Raises:
        ValueError: no such module, or several.
    """
    embeddings: list[str] = [path for path, module in text.named_modules() if isinstance(module, nn.Embedding)]
    if name is not None:
        modules = [path for path, _ in text.named_modules()]
        require(name in modules, f"token_embedding={name!r}", f"a module of the text tower.{nearest(name, embeddings)}")
        return name
    named: list[str] = [path for path in embeddings if path.rpartition(".")[2] == "token_embedding"]
    found = named or embeddings
    if len(found) != 1:
        raise ValueError(
            f"The text tower {type(text).__name__} has {len(found)} modules that may embed tokens ({', '.join(found)}): name the one "
            "that does, token_embedding=NAME."
        )
    only: str = found[0]
    return only


def prompts_of(model: nn.Module) -> dict[str, Any]:
    """Names of classes and templates of a vision-language model, for the manifest; empty for any other.

    Its answers depend on them as they do on the weights.
    """
    for module in model.modules():
        if isinstance(module, TwoTowers):
            return {"classes": module.class_names, "templates": list(module.templates)}
    return {}


def towers_of(model: nn.Module, method: str) -> TwoTowers:
    """The :class:`TwoTowers` in a model, inside any wrapper.

    Args:
        model: any module.
        method: that asks for it, for the message.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [module for module in model.modules() if isinstance(module, TwoTowers)]
    if len(found) != 1:
        has = "has none" if not found else f"has {len(found)}"
        raise ValueError(
            f"{method} needs a vision-language model, one tta.TwoTowers; {type(model).__name__} {has}. Pass "
            "tta.load_model('digits-clip'), or wrap your two towers: tta.TwoTowers(image, text, tokenize, classes)."
        )
    return found[0]
