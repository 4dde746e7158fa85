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
    "counts": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "announces"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62) + bytes(1000), "announces"),
    "array of strings": (gguf_bytes([gguf_text("a") + struct.pack("<IIQ", 9, 8, 2**61)], []), "cut short"),
    "array of bytes": (gguf_bytes([gguf_text("a") + struct.pack("<IIQ", 9, 0, 2**63)], []), "cut short"),
    "string": (gguf_bytes([gguf_text("a") + struct.pack("<IQ", 8, 2**63)], []), "cut short"),
    "key's name": (gguf_bytes([struct.pack("<Q", 2**40)], []), "a name of 1099511627776 bytes"),
    "nested array": (gguf_bytes([gguf_text("a") + struct.pack("<IIQ", 9, 9, 1)], []), "array of the unknown type 9"),
    "value type": (gguf_bytes([gguf_text("a") + struct.pack("<I", 77)], []), "unknown type 77"),
    "key twice": (gguf_bytes([u32("a", 1), u32("a", 2)], []), "key 'a' is there twice"),
    "key not text": (gguf_bytes([gguf_text(b"\xff\xfe") + struct.pack("<II", 4, 1)], []), "not valid UTF-8"),
    "alignment 0": (gguf_bytes([u32("general.alignment", 0)], []), "power of two"),
    "alignment 48": (gguf_bytes([u32("general.alignment", 48)], []), "power of two"),
    "alignment text": (
        gguf_bytes([gguf_text("general.alignment") + struct.pack("<I", 8) + gguf_text("32")], []),
        "has type str: expected u32",
    ),
    "no dimensions": (gguf_bytes([], [tensor_info("t", ())]), "0 dimensions"),
    "many dimensions": (gguf_bytes([], [tensor_info("t", (1,) * 5)]), "5 dimensions"),
    "shape 0": (gguf_bytes([], [tensor_info("t", (4, 0))]), "impossible shape"),
    "shape overflow": (gguf_bytes([], [tensor_info("t", (2**40, 2**40))]), "impossible shape"),
    "tensor type": (gguf_bytes([], [tensor_info("t", (4,), kind=999)]), "unknown type 999"),
    "removed type": (gguf_bytes([], [tensor_info("t", (32,), kind=4)]), "unknown type 4"),
    "blocks": (gguf_bytes([], [tensor_info("t", (31,), kind=8)]), "blocks of 32 of Q8_0"),
    "offset past the end": (gguf_bytes([], [tensor_info("t", (4,), offset=2**40)]), "cut short: tensor 't' ends"),
    "offset odd": (gguf_bytes([], [tensor_info("t", (4,), offset=3)]), "multiple of the alignment"),
    "tensor twice": (gguf_bytes([], [tensor_info("t", (4,)), tensor_info("t", (4,))]), "tensor 't' is there twice"),
    "data too short": (gguf_bytes([], [tensor_info("t", (4096,))]), "cut short: tensor 't' ends"),
}
