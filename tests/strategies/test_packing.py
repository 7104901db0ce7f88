"""Codes of a few bits as bytes: every bit where it should be, and none more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.packing import pack, packed_size, unpack


def drawn(size: int, bits: int) -> np.ndarray:
    return np.random.default_rng(size * 64 + bits).integers(0, 1 << bits, size, dtype=np.int64)


def as_one_number(codes: np.ndarray, bits: int) -> bytes:
    """The definition: code i stands at bit i b of one long little-endian number."""
    number = sum(int(code) << i * bits for i, code in enumerate(codes))
    return number.to_bytes(packed_size(len(codes), bits), "little")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1001])
@pytest.mark.parametrize("bits", range(1, 33))
def test_payloads_are_what_the_definition_says_and_come_back(bits, size):
    codes = drawn(size, bits)
    payload = pack(codes, bits)
    assert payload == as_one_number(codes, bits)
    assert np.array_equal(unpack(payload, bits, size), codes)


@given(bits=st.integers(1, 32), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_codes_come_back(bits, data):
    codes = np.array(data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=70)), dtype=np.int64)
    returned = unpack(pack(codes, bits), bits, len(codes))
    assert returned.dtype == np.int64
    assert np.array_equal(returned, codes)


@pytest.mark.parametrize("bits", [3, 4, 13])
def test_long_rows_are_packed_in_blocks_that_meet_at_bytes(bits):
    codes = drawn(200_001, bits)
    payload = pack(codes, bits)
    assert len(payload) == packed_size(200_001, bits)
    assert np.array_equal(unpack(payload, bits, 200_001), codes)


def test_a_thousand_and_one_codes_take_this_many_bytes():
    assert {bits: len(pack(drawn(1001, bits), bits)) for bits in (8, 4, 2, 1)} == {8: 1001, 4: 501, 2: 251, 1: 126}


def test_the_lowest_bit_of_the_first_byte_comes_first():
    assert pack(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1) == bytes([1, 1])
    assert pack(np.array([0x1, 0x2, 0x3]), 4) == bytes([0x21, 0x03])
    assert pack(np.array([0b001, 0b010, 0b111]), 3) == bytes([0b11_010_001, 0b1])


@pytest.mark.parametrize("codes", [[-1], [16]])
def test_what_does_not_fit_is_refused(codes):
    with pytest.raises(ValueError, match="4 bits"):
        pack(np.array(codes), 4)


@pytest.mark.parametrize("bits", [0, 33])
def test_widths_beyond_32_bits_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 32"):
        pack(np.zeros(1, np.int64), bits)


@pytest.mark.parametrize("payload", [b"", b"12"])
def test_a_payload_of_another_length_is_refused(payload):
    with pytest.raises(ValueError, match="do not hold 3 codes of 2 bits"):
        unpack(payload, 2, 3)
