"""Counter-based random numbers: each is a hash of (image number, seed, purpose, position), independent of drawing order.

The numbers are the same on every device and in every batch. The mixing function is the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) on wrapping int64 tensors.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Draws = dict[str, Tensor]  # the random numbers of one corruption, (n, ...) each
Keys = Callable[[str], Tensor]  # purpose of the numbers -> (n,), see `keys`
Setting = Any  # a corruption's constants at one severity: a number or a tuple, as its functions take it
Size = tuple[int, int]  # height, width


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of an integer."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FACTOR_1 = _signed(0xBF58476D1CE4E5B9)
_FACTOR_2 = _signed(0x94D049BB133111EB)


def _mix_(z: Tensor, rounds: int = 1) -> Tensor:
    """SplitMix64's finaliser, in place: int64 -> int64, a bijection; every output bit depends on every input bit."""
    for _ in range(rounds):
        # torch shifts int64 arithmetically; the masks make the shifts logical.
        z.bitwise_xor_((z >> 30).bitwise_and_(2**34 - 1)).mul_(_FACTOR_1)
        z.bitwise_xor_((z >> 27).bitwise_and_(2**37 - 1)).mul_(_FACTOR_2)
        z.bitwise_xor_((z >> 31).bitwise_and_(2**33 - 1))
    return z


def keys(index: Tensor, *, seed: int, purpose: str) -> Tensor:
    """The starting point of a random sequence for each image.

    Args:
        index: (n,), int64, image numbers.
        seed: any integer.
        purpose: name of their use; different purposes get unrelated sequences.

    Returns:
        (n,), int64.
    """
    salt = torch.tensor([_signed(seed), zlib.crc32(purpose.encode())])
    salt = _mix_(salt + _INCREMENT)
    shared = _mix_((salt[:1] * 3).bitwise_xor_(salt[1:])).to(index.device)
    return _mix_(_mix_(index.to(torch.int64, copy=True).add_(_INCREMENT)).add_(shared))


def uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float64 (n, *shape), 53 random bits each; ``keys``: (n,), see :func:`keys`."""
    steps = torch.arange(1, math.prod(shape) + 1, device=keys.device).mul_(_INCREMENT)
    bits = _mix_(keys[:, None] + steps).bitwise_right_shift_(11).bitwise_and_(2**53 - 1)
    return bits.to(torch.float64).mul_(2.0**-53).reshape(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 (n, *shape), by Box and Muller's transform; ``keys``: (n,), see :func:`keys`."""
    count = math.prod(shape)
    pairs = uniform(keys, (2, (count + 1) // 2))
    radius = pairs[:, 0].neg().add_(1).log_().mul_(-2).sqrt_()
    angle = pairs[:, 1].mul(2 * math.pi)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :count].reshape(len(keys), *shape).to(torch.float32)
