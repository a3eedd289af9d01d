"""Hooks for features and activations: the classifier head and its input, chosen layers, the tokens of a ViT.

Layers are found inside any wrapper (an input normalisation, a module of your own). A hook lives as long as its ``with``
block: no second forward pass, and nothing is left in the model.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tta import caches, norms
from tta.functional import logits_of

T = TypeVar("T")
Part: TypeAlias = Literal["norm", "head", "features", "all"]
SIZES = (32, 224, 64, 28, 96, 16, 8, 299, 384)  # of images, tried until a model takes one
TOKEN_PARTS = ("patch_embed", "norm_pre", "blocks", "norm", "num_prefix_tokens", "embed_dim")


class GivenHead(nn.Linear):
    """A linear head whose weights are given and not learned, such as the text features of class names: they are buffers.

    It computes in float32 under autocast too, whose rounding is as large as differences of cosines times 100.

    Args:
        weight: (classes, width).
        bias: (classes,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def head(model: nn.Module, name: str | None = None) -> str:
    """Name of the linear layer that makes the logits; its input is the features.

    Args:
        model: any classifier.
        name: of the layer, if it is known. Left out: the one of :func:`heads`.

    Raises:
        ValueError: there is no such layer, or there are several; the message names what was found.
    """
    kind = type(model).__name__
    if name is not None:
        linear = _linear_layers(model)
        if name not in linear:
            raise ValueError(f"{kind} has no linear layer '{name}'. It has: {_some(linear)}.")
        return name
    found = heads(model)
    if len(found) > 1:
        raise ValueError(
            f"{kind} has {len(found)} layers that make the logits together ({_some(found)}); expected one linear layer, "
            "whose input is the features. Pass the model with one of them alone, or use a method without a head."
        )
    layer = model.get_submodule(found[0])
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"The logits of {kind} are made by {type(layer).__name__} '{found[0]}', which is no nn.Linear, so there are no "
            "features before a linear head. Use a method that needs the logits alone, such as tent, or give the model one."
        )
    return found[0]


def heads(model: nn.Module) -> list[str]:
    """Names of the modules that make the logits: one classifier, or the two of a distilled DeiT, whose logits are averaged.

    They are found in a forward of noise: of the modules with a matrix of weights, those whose output reaches the logits
    through no further one. An unused layer behind the classifier is thus none, nor is a scale behind it. Where no such
    forward succeeds, or it has no gradients, they are the classifiers of a timm model (``get_classifier``), else the last
    ``nn.Linear`` in the model.

    Raises:
        ValueError: neither way finds one.
    """
    given = [name for name, module in model.named_modules() if isinstance(module, GivenHead)]
    if found := given or _last_weights(model):
        return found
    linear = _linear_layers(model)
    for module in model.modules():
        classifier: Any = getattr(module, "get_classifier", None)
        if callable(classifier):
            classifier = classifier()
            known = classifier if isinstance(classifier, tuple) else (classifier,)
            if named := [path for path in linear if any(model.get_submodule(path) is one for one in known)]:
                return named
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear, so there are no features before a linear head, and a forward of "
            "noise did not show what makes its logits."
        )
    return linear[-1:]


def unfreeze(model: nn.Module, part: Part) -> None:
    """Make one part of the model require gradients, and no other.

    Args:
        model: any classifier.
        part: ``"norm"`` (the affine parameters of all normalisation layers), ``"head"`` (the :func:`heads`),
            ``"features"`` (all but the heads) or ``"all"``.

    Raises:
        ValueError: the model has no such part.
    """
    model.requires_grad_(part in ("features", "all"))
    if part == "norm":
        for layer in norms.layers(model):
            layer.requires_grad_(True)
    elif part != "all":
        for name in heads(model):
            model.get_submodule(name).requires_grad_(part == "head")


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


class _Reached(Exception):
    """The output of a layer, on its way out of a forward that need not go on."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def output_at(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Output of a layer for a batch; the forward ends there, so that what comes behind the layer costs nothing.

    Raises:
        ValueError: the forward does not reach the layer.
    """

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output)

    handle = model.get_submodule(name).register_forward_hook(leave)
    try:
        model(x)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise ValueError(f"A forward pass never reaches layer '{name}': name one that it does.")


def parameters_before(model: nn.Module, name: str) -> list[str]:
    """Names of the parameters that the output of a layer depends on, in a forward of noise.

    Raises:
        ValueError: the forward does not reach the layer.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(parameter.is_floating_point())
    named = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}

    def run(x: Tensor) -> list[str]:
        total = output_at(model, name, x).sum()
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True) if total.requires_grad else ()
        return [path for path, gradient in zip(named, found, strict=False) if gradient is not None]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            return probe(model, run)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def parts(model: nn.Module) -> list[str]:
    """Names of the stages of a network, see :func:`tta.norms.stages`; where there is no chain, of its layers with weights.

    The layers that make the logits are no parts. There is one part or more.

    Raises:
        ValueError: nothing in the model but its head has weights.
    """
    if found := norms.stages(model):
        return found
    behind = heads(model)
    leaves = [
        name
        for name, module in model.named_modules()
        if name not in behind and next(module.parameters(recurse=False), None) is not None
    ]
    if not leaves:
        raise ValueError(
            f"{type(model).__name__} has no layer with weights but its head: there are no stages to look at."
        )
    return leaves


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


def full_name(model: nn.Module, name: str) -> str:
    """Full name of the first module that a name means, from any dot on: ``layer3`` finds ``model.layer3``.

    Raises:
        ValueError: there is none; the message names some that are there.
    """
    return select([path for path, _ in model.named_modules() if path], [name])[0]


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
        f"tokens prompts can join; found {' > '.join(type(module).__name__ for module in found)}. Pass such a "
        "model, or use a method that adds no tokens, such as tent."
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


def _linear_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def _last_weights(model: nn.Module) -> list[str]:
    """Names of the modules whose matrices are the last that act on the image before the logits; none if not to be seen."""
    called: list[str] = []
    try:
        # On a copy: a model may keep what it saw last, with a graph that no later copy of it could take.
        model = caches.copied(model).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            x, logits = _probed(model, called)
            if not logits.requires_grad:  # nothing leads back from the logits: the last linear layer that was called
                return called[-1:]
            matrices, seen = _matrices_behind(logits, x)
    except Exception:  # whatever a model does with images that are not its own
        return []
    owners: dict[Tensor, str] = {parameter: name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    # torch's weight norm keeps the weights of a layer in a module below it
    found = {owners[matrix].partition(".parametrizations.")[0] for matrix in matrices if matrix in owners}
    return [name for name, _ in model.named_modules() if name in found] if seen or len(found) == 1 else called[-1:]


def probe(model: nn.Module, run: Callable[[Tensor], T]) -> T:
    """Result of ``run`` for two images of noise, of the first size for which it raises no error, in ``eval()`` mode.

    Raises:
        Exception: the error of the last size, where there is one for each.
    """
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    failure: Exception = ValueError("no size to try")
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(like.device.type, enabled=False))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False  # noise must not enter the statistics
        # First a size that the model names: a Swin of transformers keeps the windows of smaller images for good.
        for size in dict.fromkeys((*_sizes_named(model), *SIZES)):
            noise = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
            try:
                return run(noise.to(like.device, like.dtype))
            except Exception as error:  # an assertion, an unfit shape, an empty map: the next size may do
                failure = error
    raise failure


def reached(model: nn.Module, layers: Sequence[str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that a forward has begun, and those that it has ended, when the last of some layers ends; in order.

    Raises:
        ValueError: a forward of noise does not reach all of the layers.
    """
    begun: list[nn.Module] = []
    ended: list[nn.Module] = []
    ends = {model.get_submodule(name) for name in layers}

    def begin(module: nn.Module, args: Any) -> None:
        if not ends.issubset(ended):
            begun.append(module)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if not ends.issubset(ended):
            ended.append(module)

    def run(x: Tensor) -> None:
        begun.clear()
        ended.clear()
        with torch.no_grad():
            model(x)

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        probe(model, run)
    if missing := [name for name in layers if model.get_submodule(name) not in ended]:
        raise ValueError(f"A forward pass never reaches layer '{missing[0]}': name one that it does.")
    return begun, ended


def _probed(model: nn.Module, called: list[str]) -> tuple[Tensor, Tensor]:
    """Two images of noise, of the first size that the model takes, and their logits; names of the linear layers called."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        called.clear()
        return x.requires_grad_(), logits_of(model(x))

    with ExitStack() as stack:
        for name in _linear_layers(model):
            listen = partial(_note_call, called, name)
            stack.callback(model.get_submodule(name).register_forward_hook(listen).remove)
        return probe(model, run)


def _note_call(called: list[str], name: str, module: nn.Module, args: Any, output: Any) -> None:
    called.append(name)


def _sizes_named(model: nn.Module) -> list[int]:
    """Sizes of images that modules name themselves: torchvision's ``image_size``, timm's ``img_size``, a configuration's."""
    found = []
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for key in ("image_size", "img_size"):
                value = getattr(owner, key, None)
                side = value[0] if isinstance(value, (tuple, list)) and value else value
                if isinstance(side, int) and side > 0:
                    found.append(side)
    return found


def _matrices_behind(logits: Tensor, x: Tensor) -> tuple[set[Tensor], bool]:
    """Matrices of weights that are met first on all ways back from the logits to the images, in autograd's graph.

    If there is no such way, all matrices in the graph, and False.
    """
    assert logits.grad_fn is not None
    order = _graph(logits.grad_fn)
    depends: set[Any] = set()  # nodes that depend on the images
    held: dict[Any, set[Tensor]] = {}  # node -> matrices that it depends on, if it does not depend on the images
    for node in order:  # inputs come before what is made of them
        inputs_ = [fn for fn, _ in node.next_functions if fn is not None]
        leaf = getattr(node, "variable", None)
        if leaf is x or any(fn in depends for fn in inputs_):
            depends.add(node)
        own = {leaf} if isinstance(leaf, Tensor) and leaf.dim() > 1 else set()
        held[node] = own.union(*(held[fn] for fn in inputs_))
    if logits.grad_fn not in depends:
        return held[logits.grad_fn], False
    found: set[Tensor] = set()
    ahead, seen = [logits.grad_fn], {logits.grad_fn}
    while ahead:
        inputs_ = [fn for fn, _ in ahead.pop().next_functions if fn is not None]
        weights = set().union(*(held[fn] for fn in inputs_ if fn not in depends))
        if weights:
            found |= weights
            continue
        onward = [fn for fn in inputs_ if fn in depends and fn not in seen]
        seen.update(onward)
        ahead += onward
    return found, True


def _graph(root: Any) -> list[Any]:
    """The nodes of autograd's graph below one, inputs before what is made of them."""
    order: list[Any] = []
    entered, left = set(), set()
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in entered:
            entered.add(node)
            stack += [fn for fn, _ in node.next_functions if fn is not None and fn not in entered]
            continue
        stack.pop()
        if node not in left:
            left.add(node)
            order.append(node)
    return order


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
