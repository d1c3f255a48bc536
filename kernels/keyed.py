"""Random numbers that are functions of keys, and not of order, company or device."""

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_BITS = 53  # of a uniform number
_CHUNK = 1 << 20  # numbers made at one time


def key_of(*parts: object) -> int:
    """A key, as torch's int64 has it, from what names something."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def signed(value: int) -> int:
    """A 64-bit pattern as torch's int64 has it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One key per row, int64 [rows], from `seeds` and `positions` of the same type and shape."""
    return _mix_(_mix_(seeds + signed(_GOLDEN)) + (positions + 1) * signed(_GOLDEN))


def row_bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """64 random bits each, int64 [rows, count]: SplitMix64 started from every row's key [rows]."""
    steps = torch.arange(1, count + 1, device=keys.device) * signed(_GOLDEN)
    return _mix_(keys[:, None] + steps)


def kept(keys: torch.Tensor, count: int, rate: float) -> torch.Tensor:
    """Which of `count` numbers of each row survive dropout at `rate`: bool [rows, count]."""
    least = round(rate * (1 << _BITS))
    found = torch.empty(len(keys), count, dtype=torch.bool, device=keys.device)
    size = max(1, _CHUNK // count)
    for start in range(0, len(keys), size):
        bits = row_bits(keys[start : start + size], count)
        bits = (bits >> (64 - _BITS)).bitwise_and_((1 << _BITS) - 1)
        torch.ge(bits, least, out=found[start : start + size])
    return found


def _mix_(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, in place on int64 (wrapping; `>>` is arithmetic, hence the masks).

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    z ^= (z >> 30).bitwise_and_((1 << 34) - 1)
    z *= signed(0xBF58476D1CE4E5B9)
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= signed(0x94D049BB133111EB)
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z
