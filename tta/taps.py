"""Hooks for features and activations: the classifier head and its input, chosen layers, the tokens of a ViT.

Layers are found inside any wrapper (an input normalisation, a module of your own). A hook lives as long as its ``with``
block: no second forward pass, and nothing is left in the model.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tta import norms
from tta.functional import logits_of

Part: TypeAlias = Literal["norm", "head", "features", "all"]
TOKEN_PARTS = ("patch_embed", "norm_pre", "blocks", "norm", "num_prefix_tokens", "embed_dim")


def head(model: nn.Module, name: str | None = None) -> str:
    """Name of the final linear layer; its input is the features.

    Args:
        model: any classifier.
        name: of the layer, if it is known. Left out: the classifier of a timm model (``get_classifier``), else the last
            ``nn.Linear`` in the model.

    Raises:
        ValueError: there is no such layer; the message lists the linear layers.
    """
    linear: dict[str, nn.Module] = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if name is not None:
        if name not in linear:
            raise ValueError(f"{type(model).__name__} has no linear layer '{name}'. It has: {_some(list(linear))}.")
        return name
    for module in model.modules():
        classifier: Any = getattr(module, "get_classifier", None)
        if callable(classifier):
            classifier = classifier()
            known = classifier if isinstance(classifier, tuple) else (classifier,)
            if found := [path for path, layer in linear.items() if any(layer is one for one in known)]:
                return found[0]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no nn.Linear, so there are no features before a linear head.")
    return list(linear)[-1]


def unfreeze(model: nn.Module, part: Part) -> None:
    """Make one part of the model require gradients, and no other.

    Args:
        model: any classifier.
        part: ``"norm"`` (the affine parameters of all normalisation layers), ``"head"`` (the final linear layer),
            ``"features"`` (all but the head) or ``"all"``.

    Raises:
        ValueError: the model has no such part.
    """
    model.requires_grad_(part in ("features", "all"))
    if part == "norm":
        for layer in norms.layers(model):
            layer.requires_grad_(True)
    elif part != "all":
        model.get_submodule(head(model)).requires_grad_(part == "head")


@contextmanager
def inputs(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Within this context each forward appends the input of layer ``name`` to the list.

    With :func:`head` these are the features (batch, width) that the logits of the same forward were computed from.
    """
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def look(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of a batch in one forward, both float32.

    Args:
        model: any classifier.
        name: of its final linear layer, see :func:`head`.
        x: the batch.

    Returns:
        (batch, width) and (batch, classes).

    Raises:
        ValueError: the forward does not reach the layer.
    """
    with inputs(model, name) as seen:
        logits = logits_of(model(x))
    if not seen:
        raise ValueError(f"A forward pass never reaches layer '{name}': name the classifier head that it does.")
    return seen[-1].float(), logits


@contextmanager
def activations(
    model: nn.Module, names: Sequence[str], reduce: Callable[[Tensor], Any] = lambda output: output
) -> Iterator[dict[str, Any]]:
    """Within this context a forward puts ``reduce(output)`` of each named layer into the dictionary.

    ``reduce`` runs inside the hook, before an in-place operation that follows (an in-place ReLU) can change the output. A
    layer that one forward reaches several times is kept under ``name``, ``name:1``, ``name:2`` ...
    """
    seen: dict[str, Any] = {}
    calls: Counter[str] = Counter()

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[f"{name}:{calls[name]}" if calls[name] else name] = reduce(output)
            calls[name] += 1

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(listen(name)).remove)
        yield seen


def select(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Names that match any of the shell patterns, from any dot on (``layer3.*`` finds ``model.layer3.0.bn1``).

    Args:
        names: dotted names, in order.
        patterns: None for all of them.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if patterns is None:
        return list(names)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"No layer matches '{pattern}'. There are: {_some(list(names))}.")
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def vision_transformer(model: nn.Module) -> nn.Module:
    """The timm ``VisionTransformer`` in the model, or the model itself if it is one.

    Raises:
        ValueError: there is none; the message says what was looked for and found.
    """
    for module in model.modules():
        # rotary embeddings are laid out for a fixed number of tokens
        if all(hasattr(module, part) for part in TOKEN_PARTS) and getattr(module, "rope", None) is None:
            return module
    found = [model]
    while len(children := list(found[-1].children())) == 1:  # look into wrappers
        found += children
    raise ValueError(
        f"Looked for a timm VisionTransformer (a module with {', '.join(TOKEN_PARTS)}, without rotary embeddings), whose "
        f"tokens prompts can join; found {' > '.join(type(module).__name__ for module in found)}."
    )


def random_tokens(vit: nn.Module, number: int, generator: torch.Generator) -> Tensor:
    """Initial prompt tokens (1, number, width), uniform in bounds that depend on the size of the patch embedding.

    Jia et al., "Visual Prompt Tuning", ECCV 2022.
    """
    weight: Tensor = vit.patch_embed.proj.weight  # type: ignore[union-attr, assignment]
    bound = math.sqrt(6 / (weight[0].numel() + weight.shape[0]))
    return (2 * torch.rand(1, number, weight.shape[0], generator=generator) - 1) * bound


def class_token_layers(model: nn.Module) -> tuple[str, ...]:
    """Layers at which the class token is read after each block of a timm ViT: the first norm of the next, at last the head.

    Raises:
        ValueError: no timm ``VisionTransformer``, or one without a class token.
    """
    vit = vision_transformer(model)
    if not vit.num_prefix_tokens:
        raise ValueError(f"{type(vit).__name__} has no class token, whose statistics are asked for.")
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is vit)
    blocks = range(1, len(vit.blocks))  # type: ignore[arg-type]
    return (*(f"{prefix}blocks.{number}.norm1" for number in blocks), head(model))


def class_tokens(model: nn.Module, layers: Sequence[str], images: Tensor) -> tuple[Tensor, Any]:
    """Class tokens (batch, layers * width), float32, at the :func:`class_token_layers`, and the model's output."""
    with activations(model, layers[:-1], lambda tokens: tokens[:, 0]) as seen, inputs(model, layers[-1]) as features:
        output = model(images)
    return torch.cat([*seen.values(), features[-1]], dim=1).float(), output


@contextmanager
def extra_tokens(vit: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Within this context ``tokens`` (1, n, width) pass through the blocks of a timm ViT, behind its class token.

    They are inserted after the position embedding and removed before the final norm, so that pooling sees only the
    model's own tokens.
    """
    first, last = int(vit.num_prefix_tokens), int(vit.num_prefix_tokens) + tokens.shape[1]  # type: ignore[arg-type]

    def join(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        return torch.cat([x[:, :first], tokens.to(x.dtype).expand(len(x), -1, -1), x[:, first:]], dim=1)

    def leave(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.cat([args[0][:, :first], args[0][:, last:]], dim=1),)

    with ExitStack() as stack:
        stack.callback(vit.norm_pre.register_forward_hook(join).remove)  # type: ignore[union-attr]
        stack.callback(vit.norm.register_forward_pre_hook(leave).remove)  # type: ignore[union-attr]
        yield


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
