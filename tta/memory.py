"""What a method remembers: averaged copies of the model, banks of samples. All of it is part of the saved state."""

import copy

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, in its present state, whose parameters get no gradient: a teacher to begin with."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, share: float, when: Tensor) -> None:
    """Move the teacher towards the student: ``teacher = (1 - share) * teacher + share * student``.

    Only parameters that the student learns move, never buffers: the others are the same in both.

    Args:
        teacher: a :func:`frozen_copy` of the student.
        student: what it was copied from.
        share: of the student, in [0, 1].
        when: boolean scalar, may lie on a GPU; the teacher stays where it is if false.
    """
    weight = share * when.float()
    for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
        if parameter.requires_grad:
            average.lerp_(parameter, weight.to(average.dtype))
