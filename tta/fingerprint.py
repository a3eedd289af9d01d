"""Content hashes that tie a result to the exact weights and images it came from."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and every byte of the tensors, in the order given.

    The same on every device and for every memory format; one flipped bit changes it.

    Args:
        tensors: pairs (name, tensor).

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_model(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by name (see :func:`of_tensors`)."""
    return of_tensors(sorted((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)))
