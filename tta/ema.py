"""Teachers: averaged copies of the model, part of the saved state."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, in its present state, whose parameters get no gradient: the initial teacher.

    Parameters that the model does not learn either are not copied: they stay one set. To be called when it is settled which
    ones it learns.
    """
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, frozen).requires_grad_(False)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy that has the model's own parameters, which stay one set, and buffers (statistics) of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, share: float | Tensor, when: Tensor) -> None:
    """Move the teacher towards the student: ``teacher = (1 - share) * teacher + share * student``.

    Only parameters that the student learns move, never buffers: all others are the same in both.

    Args:
        teacher: a :func:`frozen_copy` of the student.
        student: what it was copied from.
        share: of the student, in [0, 1]; a scalar.
        when: boolean scalar, may be on a GPU; if false the teacher stays as it is.
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    learned = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
    blend([average for average, _ in learned], [parameter for _, parameter in learned], share, when)


@torch.no_grad()
def blend(tensors: Iterable[Tensor], others: Iterable[Tensor], share: float | Tensor, when: Tensor) -> None:
    """Move each tensor towards another: ``tensor = (1 - share) * tensor + share * other``.

    Args:
        tensors, others: equally many, of the same shapes.
        share: of the others, in [0, 1]; a scalar.
        when: boolean scalar, may be on a GPU; if false the tensors stay as they are.
    """
    weight = share * when.float()
    for tensor, other in zip(tensors, others, strict=True):
        tensor.lerp_(other, weight.to(tensor.dtype))


@torch.no_grad()
def overwrite(parameters: Iterable[Tensor], values: Iterable[Tensor], where: Iterable[Tensor]) -> None:
    """Overwrite single weights with those of ``values`` where the masks are true.

    Args:
        parameters: changed in place.
        values: one of the same shape for each.
        where: boolean, one for each, may be on a GPU.
    """
    for parameter, value, mask in zip(parameters, values, where, strict=True):
        parameter.copy_(torch.where(mask, value, parameter))
