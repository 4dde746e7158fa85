"""Adapters of csrc/diffgguf.h: opened for one model, immutable, run by any number of its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydiffgguf._arguments import real
from pydiffgguf._binding.library import StrPath, call, check_readable, encode_path, ffi, lib, text_of
from pydiffgguf._binding.native import NativeModel, NativeSession

REGIONS: dict[str | None, int] = {
    None: lib.DG_REGION_OF_FILE,
    "both": lib.DG_REGION_BOTH,
    "decoder": lib.DG_REGION_DECODER,
    "encoder": lib.DG_REGION_ENCODER,
}


class NativeAdapter:
    """A low-rank adapter for `model`, from the GGUF file `path`, or from `data`, the bytes of one.

    `name` begins every message. `region` other than None says where the layers' pairs act. Raises OSError,
    ModelFormatError, UnsupportedError, OutOfMemoryError; ValueError for a region that the adapter cannot have.
    """

    def __init__(
        self, model: NativeModel, path: StrPath, name: str, *, data: bytes | None = None, region: str | None = None
    ) -> None:
        if region not in REGIONS:
            raise ValueError(f"region is {region!r}: it must be one of both, decoder, encoder")
        if data is None:
            check_readable(path)
        out = ffi.new("dg_adapter **")
        call(
            lib.dg_adapter_open,
            out,
            model._open_pointer(),
            encode_path(path),
            ffi.NULL if data is None else ffi.from_buffer(data),
            0 if data is None else len(data),
            name.encode(),
            REGIONS[region],
        )
        self._pointer: Any = ffi.gc(out[0], lib.dg_adapter_free)
        info = lib.dg_adapter_get_info(self._pointer)
        #: Which sets the layers' pairs are in: of "both", "decoder", "encoder".
        self.regions: tuple[str, ...] = tuple(r for r in ("both", "decoder", "encoder") if getattr(info, r))
        self.n_pairs: int = info.n_pairs
        self.n_zero: int = info.n_zero
        self.n_bytes: int = info.n_bytes
        self.ranks: tuple[int, ...] = tuple(lib.dg_adapter_rank(self._pointer, i) for i in range(info.n_ranks))
        self.base: str | None = text_of(lib.dg_adapter_base(self._pointer)) or None


def _arrays(adapters: Sequence[tuple[NativeAdapter, float]]) -> tuple[Any, Any]:
    pointers = ffi.new("dg_adapter *[]", [adapter._pointer for adapter, _ in adapters])
    return pointers, ffi.new("float[]", [real("scale", scale) for _, scale in adapters])


def encoder_key(adapters: Sequence[tuple[NativeAdapter, float]]) -> int:
    """What a prefix that is encoded with these adapters and scales depends on besides its tokens; 0: nothing."""
    return int(lib.dg_encoder_key(*_arrays(adapters), len(adapters)))


def set_adapters(session: NativeSession, adapters: Sequence[tuple[NativeAdapter, float]]) -> int:
    """The session runs these adapters from here on, each times its scale; returns how many tokens of its prefix were
    encoded again. Raises ValueError for adapters of another model or a scale that is not finite, CancelledError."""
    encoded = ffi.new("int32_t *")
    call(lib.dg_session_set_adapters, session._open_pointer(), *_arrays(adapters), len(adapters), encoded)
    return int(encoded[0])
