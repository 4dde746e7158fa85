"""GGUF headers made byte by byte, and a collection of those that no reader may trust."""

from __future__ import annotations

import struct


def gguf_text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def tensor_info(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(keys: list[bytes], tensors: list[bytes], data: int = 4096) -> bytes:
    """A GGUF of diffusion-gemma with these raw keys and tensor infos, and `data` zero bytes behind."""
    architecture = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("diffusion-gemma")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys) + 1) + architecture
    return head + b"".join(keys) + b"".join(tensors) + bytes(data)


def u32(name: str, value: int) -> bytes:
    return gguf_text(name) + struct.pack("<II", 4, value)


#: What is wrong: the file, and a part of what `inspect` says of it.
HOSTILE = {
    "counts": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "expected at most 65536"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62) + bytes(1000), "expected at most 4096"),
    "array of strings": (gguf_bytes([gguf_text("a") + struct.pack("<IIQ", 9, 8, 2**61)], []), "truncated"),
    "array of bytes": (gguf_bytes([gguf_text("a") + struct.pack("<IIQ", 9, 0, 2**63)], []), "truncated"),
    "string": (gguf_bytes([gguf_text("a") + struct.pack("<IQ", 8, 2**63)], []), "truncated"),
    "key's name": (gguf_bytes([struct.pack("<Q", 2**40)], []), "a key, at byte .* needs 1099511627776 bytes"),
    "nested array": (gguf_bytes([gguf_text("a") + struct.pack("<IIQ", 9, 9, 1)], []), "value type 9"),
    "value type": (gguf_bytes([gguf_text("a") + struct.pack("<I", 77)], []), "value type 77"),
    "key twice": (gguf_bytes([u32("a", 1), u32("a", 2)], []), "key a is there twice"),
    "key without a name": (gguf_bytes([u32("", 1)], []), "0 bytes, expected 1 to 65535"),
    "key with a NUL": (gguf_bytes([u32("a\0b", 1)], []), "holds a NUL"),
    "alignment 0": (gguf_bytes([u32("general.alignment", 0)], []), "power of 2"),
    "alignment 48": (gguf_bytes([u32("general.alignment", 48)], []), "power of 2"),
    "alignment text": (
        gguf_bytes([gguf_text("general.alignment") + struct.pack("<I", 8) + gguf_text("32")], []),
        "another type than u32",
    ),
    "many dimensions": (gguf_bytes([], [tensor_info("t", (1,) * 5)]), "5 dimensions"),
    "shape 0": (gguf_bytes([], [tensor_info("t", (4, 0))]), "dimension 1 of tensor t is 0"),
    "shape overflow": (gguf_bytes([], [tensor_info("t", (2**40, 2**40))]), "at most 2\\^48 elements"),
    "tensor type": (gguf_bytes([], [tensor_info("t", (4,), kind=999)]), "tensor t has the type number 999, which ggml"),
    "removed type": (gguf_bytes([], [tensor_info("t", (32,), kind=4)]), "tensor t has the type number 4, which ggml"),
    "blocks": (gguf_bytes([], [tensor_info("t", (31,), kind=8)]), "multiple of 32 for type q8_0"),
    "offset past the end": (gguf_bytes([], [tensor_info("t", (4,), offset=2**40)]), "tensor t lies at .* truncated"),
    "offset odd": (gguf_bytes([], [tensor_info("t", (4,), offset=3)]), "a multiple of the alignment, 32"),
    "tensor twice": (gguf_bytes([], [tensor_info("t", (4,)), tensor_info("t", (4,))]), "tensor t is there twice"),
    "data too short": (gguf_bytes([], [tensor_info("t", (4096,))]), "tensor t lies at .* truncated"),
}
