"""What a caller hands in as token ids: plain text, a conversation, a document in a user's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydiffgguf._arguments import integer
from pydiffgguf.errors import ModelFormatError, UnsupportedError
from pydiffgguf.text.messages import conversation
from pydiffgguf.text.rendering import chat_parts
from pydiffgguf.text.tokenizer import Tokenizer, read_tokenizer
from pydiffgguf.text.tools import Tool

__all__ = ["Prompts"]


class Prompts:
    """A file's tokenizer and chat template.

    Args:
        name: the file's, for messages.
        metadata: its keys.
        n_vocab: tokens of its vocabulary.

    A tokenizer that cannot be used is none, and `tokenizer_fault` says why.
    """

    def __init__(self, name: str, metadata: Mapping[str, Any], n_vocab: int) -> None:
        self._name = name
        self._metadata = metadata
        self._n_vocab = n_vocab
        #: None where the file holds no tokenizer, or one that cannot be used.
        self.tokenizer_or_none: Tokenizer | None = None
        self.tokenizer_fault: str | None = None
        try:
            self.tokenizer_or_none = read_tokenizer(metadata, n_vocab)
        except (ModelFormatError, UnsupportedError) as error:
            self.tokenizer_fault = f"its tokenizer cannot be used ({error}): pass token ids instead of text"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedError where the file holds none that can be used."""
        if self.tokenizer_fault is not None:
            raise UnsupportedError(f"{self._name}: {self.tokenizer_fault}")
        if self.tokenizer_or_none is None:
            raise UnsupportedError(f"{self._name} holds no tokenizer: pass token ids instead of text")
        return self.tokenizer_or_none

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset() if self.tokenizer_or_none is None else self.tokenizer_or_none.end_ids

    @property
    def template(self) -> str | None:
        """The chat template, Jinja source; None without one. Raises ModelFormatError when it is not text."""
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ModelFormatError("key tokenizer.chat_template is not a string")
        return template

    def of(self, prompt: object, raw: bool) -> list[int]:
        """Ids of a prompt: see `DiffusionModel.generate`."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty")
            if raw or not self.template:
                return self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos)
            return self.chat([{"role": "user", "content": prompt}])
        ids = [integer(f"prompt[{i}]", token, 0, self._n_vocab - 1) for i, token in enumerate(_sequence(prompt))]
        if not ids:
            raise ValueError("the prompt is empty")
        return ids

    def chat(self, messages: object, *, thinking: bool = False, tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of a conversation and the opening of the model's turn. Special tokens that contents spell are ordinary
        text: nobody's words end a turn. The messages are those of `conversation`."""
        if not self.template:
            raise UnsupportedError(f"{self._name} holds no chat template: use generate() with raw text")
        parts = chat_parts(
            self.template,
            conversation(messages),
            self.tokenizer,
            name=self._name,
            tools=tools,
            enable_thinking=thinking,
        )
        return self._with_bos(self.tokenizer.encode_parts(parts))

    def turn(self, content: str) -> list[int]:
        """Ids of one user turn and the opening of the model's."""
        return self.chat([{"role": "user", "content": content}])

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Most templates write the bos token themselves; the model has never seen a prompt without one."""
        bos = self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids


def _sequence(prompt: object) -> Sequence[Any]:
    """Raises TypeError, with what helps, for what is no sequence of token ids."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError(f"prompt is {type(prompt).__name__}: decode it to a str, or pass a list of token ids")
    if isinstance(prompt, Mapping) or not hasattr(prompt, "__len__") or not hasattr(prompt, "__getitem__"):
        raise TypeError(f"prompt must be a str or a sequence of token ids, not {type(prompt).__name__}")
    if len(prompt) and isinstance(prompt[0], Mapping):
        raise TypeError("prompt is a list of messages: use chat()")
    if len(prompt) and isinstance(prompt[0], str):
        raise TypeError("prompt is a list of strings: call once for each of them")
    return prompt  # type: ignore[return-value]
