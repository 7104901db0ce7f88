"""Numbers of a few bits each as bytes, and back: what a codec's payload is made of.

Code i takes the bits ``i b .. (i + 1) b - 1`` of the payload, bit 0 being the lowest of the first byte; what is left of
the last byte is zero.
"""

from __future__ import annotations

import numpy as np

#: Codes at a time where they do not divide bytes; a multiple of 8, so that every block ends with a byte.
_AT_ONCE = 1 << 16


def packed_size(size: int, bits: int) -> int:
    """How many bytes so many codes take: ``ceil(size bits / 8)``."""
    return -(-size * bits // 8)


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Codes as bytes.

    Args:
        codes: ``int64 [n]`` in ``0 .. 2^bits - 1``.
        bits: bits a code, 1 to 32.

    Returns:
        ``ceil(n bits / 8)`` bytes.

    Raises:
        ValueError: for a code that does not fit.
    """
    codes = np.asarray(codes)
    _fit(bits)
    if codes.size and (codes.min() < 0 or codes.max() >> bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit into {bits} bits")
    if bits == 1:
        return np.packbits(codes.astype(np.uint8), bitorder="little").tobytes()
    if bits in (8, 16, 32):
        return codes.astype(f"<u{bits // 8}").tobytes()
    if bits in (2, 4):
        return _pack_in_bytes(codes, bits)
    return b"".join(_pack_across(codes[i : i + _AT_ONCE], bits) for i in range(0, len(codes), _AT_ONCE))


def unpack(payload: bytes, bits: int, size: int) -> np.ndarray:
    """The codes of a payload of :func:`pack`, ``int64 [size]``.

    Raises:
        ValueError: for a payload of another length.
    """
    _fit(bits)
    if len(payload) != packed_size(size, bits):
        raise ValueError(f"{len(payload)} bytes do not hold {size} codes of {bits} bits")
    raw = np.frombuffer(payload, np.uint8)
    if bits == 1:
        return np.unpackbits(raw, count=size, bitorder="little").astype(np.int64)
    if bits in (8, 16, 32):
        return raw.view(f"<u{bits // 8}").astype(np.int64)
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (raw[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)[:size].astype(np.int64)
    step = packed_size(_AT_ONCE, bits)
    parts = [
        _unpack_across(raw[i : i + step], bits, min(_AT_ONCE, size - n * _AT_ONCE))
        for n, i in enumerate(range(0, len(raw), step))
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _fit(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise ValueError(f"{bits} bits a code; give 1 to 32")


def _pack_in_bytes(codes: np.ndarray, bits: int) -> bytes:
    """Several codes to a byte, none across two."""
    in_byte = 8 // bits
    whole = np.zeros(packed_size(len(codes), bits) * in_byte, np.uint8)
    whole[: len(codes)] = codes
    packed = whole[::in_byte].copy()
    for place in range(1, in_byte):
        packed |= whole[place::in_byte] << np.uint8(place * bits)
    return packed.tobytes()


def _pack_across(codes: np.ndarray, bits: int) -> bytes:
    """Eight codes make ``bits`` bytes, whichever bytes each of them touches."""
    eights = np.zeros((-(-len(codes) // 8), 8), np.uint64)
    eights.reshape(-1)[: len(codes)] = codes
    packed = np.zeros((len(eights), bits), np.uint8)
    for place in range(8):
        for byte, shift in _touched(place, bits):
            moved = eights[:, place] << np.uint64(shift) if shift >= 0 else eights[:, place] >> np.uint64(-shift)
            packed[:, byte] |= (moved & np.uint64(255)).astype(np.uint8)
    return packed.tobytes()[: packed_size(len(codes), bits)]


def _unpack_across(raw: np.ndarray, bits: int, size: int) -> np.ndarray:
    whole = np.zeros((-(-size // 8), bits), np.uint8)
    whole.reshape(-1)[: len(raw)] = raw
    eights = np.zeros((len(whole), 8), np.uint64)
    for place in range(8):
        for byte, shift in _touched(place, bits):
            wide = whole[:, byte].astype(np.uint64)
            eights[:, place] |= wide >> np.uint64(shift) if shift >= 0 else wide << np.uint64(-shift)
    return (eights & np.uint64((1 << bits) - 1)).astype(np.int64).reshape(-1)[:size]


def _touched(place: int, bits: int) -> list[tuple[int, int]]:
    """The bytes that the code at a place of eight touches, and how far it is shifted to the left in each."""
    start = place * bits
    return [(byte, start - 8 * byte) for byte in range(start // 8, -(-(start + bits) // 8))]
