"""The reference, transformers in float32, as far as ``bench --compare`` times it. Needs torch and transformers, which
the package itself does without."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

__all__ = ["Reference", "cache_keyword"]


def cache_keyword() -> str:
    """transformers' name for the argument that is the cache. From 5.24 on it warns of the older one."""
    from transformers import __version__

    major, minor = __version__.split(".")[:2]
    return "cache" if (int(major), int(minor)) >= (5, 24) else "past_key_values"


class Reference:
    """A checkpoint folder in transformers, on `threads` threads; each method returns the seconds that it timed."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        """Raises ImportError when torch or transformers is missing, OSError when the folder holds no model."""
        try:
            import torch
            from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise ImportError(
                f"--compare transformers needs torch and transformers (pip install torch transformers): {error}"
            ) from error
        torch.set_num_threads(threads)
        self.torch, self.cache_type = torch, DynamicCache
        quiet: Any = transformers_logging.disable_progress_bar
        quiet()
        load: Any = DiffusionGemmaForBlockDiffusion.from_pretrained
        self.model = load(checkpoint, dtype=torch.float32)
        self.cache: Any = None
        self.cache_keyword = cache_keyword()
        self.n_vocab = int(self.model.config.text_config.vocab_size)
        self.canvas = torch.arange(int(self.model.config.canvas_length))[None] % self.n_vocab
        self.signal: Any = None

    def prefill(self, ids: list[int]) -> float:
        """Encodes the ids into an empty cache, as `generate()` does it."""
        torch, encoder = self.torch, self.model.model.encoder
        tokens = torch.tensor([ids])
        positions = torch.arange(tokens.shape[1])[None]
        self.cache = self.cache_type(config=self.model.config.get_text_config(decoder=True))
        cache: dict[str, Any] = {self.cache_keyword: self.cache}
        began = time.perf_counter()
        with torch.inference_mode():
            masks = encoder.create_masks_for_generate(
                config=self.model.config,
                inputs_embeds=torch.empty((1, tokens.shape[1], 0), dtype=self.model.dtype),
                attention_mask=torch.ones_like(tokens, dtype=torch.bool),
                position_ids=positions,
                **cache,
            )
            encoder(input_ids=tokens, attention_mask=masks, position_ids=positions, **cache)
        return time.perf_counter() - began

    def step(self) -> float:
        """One decoder pass with self-conditioning behind what `prefill` encoded; no sampling."""
        torch = self.torch
        if self.signal is None:
            shape = (1, self.canvas.shape[1], self.n_vocab)
            self.signal = torch.from_numpy(np.random.default_rng(1).standard_normal(shape, np.float32))
        cache: dict[str, Any] = {self.cache_keyword: self.cache}
        began = time.perf_counter()
        with torch.inference_mode():
            self.model(decoder_input_ids=self.canvas, self_conditioning_logits=self.signal, **cache)
        return time.perf_counter() - began
