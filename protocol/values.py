"""The values of a payload as bytes: exactly, or in 16 bits, 8 bits or 1 bit each.

Rounding happens once: what ``decode`` gives is encoded again to the same bytes, under any
key.  So a method goes on with ``rounded`` and holds what everybody else holds.  Numbers are
little-endian, and bits fill a byte from the least significant.

- f32: IEEE 754 binary32, 4 bytes each.
- f16: E (1 signed byte), then numbers in binary16, 2 bytes each, to be multiplied by 2^E.
  E is the smallest from -125 to 112 with which the largest fits.
- bf16: the upper 16 bits of binary32.
- int8: for each block of 256 values, the last perhaps shorter, a scale (binary32, the last 7
  bits 0; 0 or a normal number); then for each value a signed byte, to be multiplied by the
  scale.  The largest |byte| of a block is 127, or 0 where the scale is 0.
- sign: a scale (binary32, not negative; 0 for no values), then for each value a bit, 1 for
  minus the scale.  What is left of the last byte is 0.
"""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
import numpy.typing as npt

from protocol import kernels
from protocol.wire import RemoteProtocolError

Coding = Literal["f32", "f16", "bf16", "int8", "sign"]
Flat = npt.NDArray[np.float32]
Frame = bytes | memoryview
F32, F16, I8 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("i1")
U32, U16 = np.dtype("<u4"), np.dtype("<u2")

BLOCK = 256  # values that share a scale in int8
STEPS = 127  # of a scale, from 0 to the largest of a block


def nbytes(coding: Coding, count: int) -> int:
    """The size of ``count`` values."""
    match coding:
        case "f32":
            return 4 * count
        case "f16":
            return 1 + 2 * count
        case "bf16":
            return 2 * count
        case "int8":
            return 4 * _num_blocks(count) + count
        case "sign":
            return 4 + (count + 7) // 8


def encode(coding: Coding, values: Flat, key: int) -> bytes:
    """The values, (count,), in ``nbytes`` bytes.

    With L the largest of |values|, a value v comes back with an error of at most

    - f16: |v| 2^-11 or L 2^-39, whichever is larger;
    - bf16: |v| 2^-8 or 2^-134;
    - int8: a step, L / 126, with L of the block; but a block whose L is below 127 x 2^-126
      becomes zeros.  The mean error over the keys is 0 to 2^-8 of a step, and to 2^-16 of
      one but for what is so near L;
    - sign: L.  The mean of |values| stays, to 24 bits.

    f16 and bf16 round to the nearest, ties to even, and at the very top of binary32 to their
    largest number, not to infinity.

    Args:
        coding: which.
        values: finite.
        key: of the uniform stream by which int8 rounds up or down, element i by number i.

    Raises:
        ArithmeticError: a value is not finite.
    """
    values = np.ascontiguousarray(values, F32)
    if not np.isfinite(values).all():
        raise ArithmeticError("a value to be sent is not finite")
    match coding:
        case "f32":
            return values.tobytes()
        case "f16":
            return _encode_f16(values)
        case "bf16":
            return _encode_bf16(values)
        case "int8":
            return _encode_int8(values, key)
        case "sign":
            return _encode_sign(values)


def decode(coding: Coding, count: int, buffer: Frame) -> Flat:
    """The values that a buffer stands for, (count,); as f32 they share its memory.

    Raises:
        RemoteProtocolError: ``encode`` could not have made the buffer of ``count`` values.
    """
    if count < 0 or len(buffer) != nbytes(coding, count):
        raise RemoteProtocolError(f"{len(buffer)} bytes for {count} values as {coding}")
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        values = _decode(coding, count, buffer)
    if not np.isfinite(values).all():
        raise RemoteProtocolError("a value of the payload is not finite")
    return values


def rounded(coding: Coding, values: Flat, key: int) -> Flat:
    """What the values are for whoever receives them; not to be written to.

    Raises:
        ArithmeticError: a value is not finite.
    """
    return decode(coding, len(values), encode(coding, values, key))


def _decode(coding: Coding, count: int, buffer: Frame) -> Flat:
    match coding:
        case "f32":
            return np.frombuffer(buffer, F32)
        case "f16":
            return _decode_f16(buffer)
        case "bf16":
            return (np.frombuffer(buffer, U16).astype(U32) << 16).view(F32)
        case "int8":
            return _decode_int8(count, buffer)
        case "sign":
            return _decode_sign(count, buffer)


# --- 16 bits ---------------------------------------------------------------------------


def _encode_f16(values: Flat) -> bytes:
    fraction, power = np.frexp(np.abs(values).max(initial=0.0))
    overflows = fraction * 2.0**16 >= 65520  # binary16 rounds that to infinity
    exponent = int(np.clip(power - 16 + overflows, -125, 112)) if fraction else -125
    scaled = np.clip(values * np.float32(2.0**-exponent), -65504, 65504)  # matters with 112 only
    halves: npt.NDArray[np.float16] = scaled.astype(F16)
    return struct.pack("<b", exponent) + halves.tobytes()


def _decode_f16(buffer: Frame) -> Flat:
    (exponent,) = struct.unpack_from("<b", buffer)
    values: Flat = np.frombuffer(buffer, F16, offset=1).astype(F32)
    # a largest below 2^15 would fit with a smaller exponent
    is_smallest = exponent == -125 or np.abs(values).max(initial=0.0) >= 2**15
    _must(-125 <= exponent <= 112 and bool(is_smallest), "exponent")
    return values * np.float32(2.0**exponent)  # exact: the last bit is worth 2^-149 or more


def _encode_bf16(values: Flat) -> bytes:
    raw = values.view(U32)
    nearest = (raw + (0x7FFF + (raw >> 16 & 1))) >> 16
    nearest -= nearest & 0x7FFF == 0x7F80  # infinity: back to the largest number
    return nearest.astype(U16).tobytes()


# --- 8 bits and 1 bit ------------------------------------------------------------------


def _encode_int8(values: Flat, key: int) -> bytes:
    count = len(values)
    blocks = np.zeros((_num_blocks(count), BLOCK), F32)
    blocks.reshape(-1)[:count] = np.abs(values)
    scales: Flat = blocks.max(axis=1) / np.float32(STEPS)
    # 17 significant bits, rounded down: 127 times that is exact, and the largest comes to 127
    # whatever is drawn, so that a second rounding finds the same scale and changes nothing
    scales = (scales.view(U32) & 0xFFFFFF80).view(F32)
    scales[scales < 2.0**-126] = 0
    blocks /= np.where(scales, scales, np.float32(1))[:, None]
    steps = blocks.reshape(-1)[:count]
    draws = np.full(count, 0.5, F32)
    kernels.add_(draws, [key], [0.5], kind="uniform")  # (2 lane + 1) / 2^17, exactly
    steps = np.minimum(np.floor(steps + draws), STEPS)  # up with the fraction's probability
    signed: npt.NDArray[np.int8] = np.copysign(steps, values).astype(I8)
    return scales.tobytes() + signed.tobytes()


def _decode_int8(count: int, buffer: Frame) -> Flat:
    scales = np.frombuffer(buffer, F32, _num_blocks(count))
    steps = np.zeros((len(scales), BLOCK), F32)
    steps.reshape(-1)[:count] = np.frombuffer(buffer, I8, offset=scales.nbytes)
    raw = scales.view(U32)
    is_scale = (raw == 0) | ((scales >= 2.0**-126) & (raw & 0x7F == 0))
    _must(bool(is_scale.all()), "scale")
    _must(bool((np.abs(steps).max(axis=1) == np.where(raw, STEPS, 0)).all()), "scale")
    steps *= scales[:, None]
    return steps.reshape(-1)[:count]


def _encode_sign(values: Flat) -> bytes:
    scale = float(np.abs(values).sum(dtype=np.float64)) / max(len(values), 1)
    bits: npt.NDArray[np.uint8] = np.packbits(np.signbit(values), bitorder="little")
    return struct.pack("<f", scale) + bits.tobytes()


def _decode_sign(count: int, buffer: Frame) -> Flat:
    scale = np.frombuffer(buffer, F32, 1)[0]
    _must(not np.signbit(scale) and (count > 0 or scale == 0), "scale")
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8, offset=4), bitorder="little")
    _must(not bits[count:].any(), "spare bit")
    values: Flat = np.where(bits[:count], -scale, scale)
    return values


def _num_blocks(count: int) -> int:
    return -(-count // BLOCK)


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise RemoteProtocolError(f"the {what} of the values is not as they are coded")
