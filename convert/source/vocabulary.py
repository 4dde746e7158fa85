"""The tokenizer files of a checkpoint as GGUF keys: vocabulary, merges, token types, special ids, chat template.

Only tokenizers of the Gemma kind can be written down with these keys (`tokenizer.ggml.model` = "gemma4"): BPE over raw
UTF-8 with spaces as U+2581, byte fallback, no pre-split. Others are refused, since a reader would split text otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydiffgguf.errors import ModelFormatError, UnsupportedError
from pydiffgguf.text.rendering import template_fault

from ..names import END_TOKENS
from .config import Reader, read_json

SPACE = "\u2581"

# Token types of the GGUF convention.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Gemma's vocabulary has merges instead of scores; the published files hold this value for every token.
SCORE = -1000.0

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# GGUF key -> (name in tokenizer_config.json, Gemma's spelling of the token, for when that file does not name it).
SPECIAL_IDS = {
    "tokenizer.ggml.bos_token_id": ("bos_token", "<bos>"),
    "tokenizer.ggml.eos_token_id": ("eos_token", "<eos>"),
    "tokenizer.ggml.unknown_token_id": ("unk_token", "<unk>"),
    "tokenizer.ggml.padding_token_id": ("pad_token", "<pad>"),
    "tokenizer.ggml.mask_token_id": ("mask_token", "<mask>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` and `types` by id; `merges` as "left right"; `special_ids` by GGUF key; `notes`: what is unusual."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int]
    chat_template: str | None
    notes: tuple[str, ...]

    def end_ids(self) -> set[int]:
        """The end tokens by their text."""
        return {i for i, token in enumerate(self.tokens) if token in END_TOKENS}


def read_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of the folder `path`.

    Ids of the model that the tokenizer does not use become unused tokens. ModelFormatError when tokenizer.json is
    missing or broken, UnsupportedError when it is not of the Gemma kind.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelFormatError(f"{path}: no tokenizer.json: without it the GGUF could not read or write text")
    tokenizer = read_json(file)
    model = Reader(str(file), tokenizer).mapping("model")
    refuse_other_kinds(str(file), tokenizer, model)
    tokens, types = read_tokens(str(file), tokenizer, model, vocab_size)
    n_bytes = len({token for token, kind in zip(tokens, types, strict=True) if kind == BYTE})
    merges = read_merges(str(file), model, set(tokens))

    config_file = path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    special_ids = find_special_ids(str(config_file), config, tokens)
    if "tokenizer.ggml.bos_token_id" not in special_ids:
        raise ModelFormatError(f"{file}: the vocabulary has no begin token '<bos>'")
    unknown = special_ids.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None:
        types[unknown] = UNKNOWN

    notes = []
    if n_bytes < 256:
        if unknown is None:
            raise ModelFormatError(
                f"{file}: byte fallback needs the tokens <0x00> to <0xFF> or an unknown token; {256 - n_bytes} lack"
            )
        notes.append(f"{256 - n_bytes} of 256 byte tokens are missing: characters become the unknown token")
    template = read_chat_template(path, config)
    if template is None:
        notes.append("no chat template: prompts will be used as plain text")
    elif fault := template_fault(template):
        notes.append(f"chat will not be possible: {fault}")
    unused = types.count(UNUSED)
    if unused:
        notes.append(f"{unused} of {vocab_size} ids are not in the tokenizer")
    if not any(token in END_TOKENS for token in tokens):
        notes.append(f"the vocabulary has none of the end tokens {', '.join(END_TOKENS)}")
    return Vocabulary(tokens, types, merges, special_ids, template, tuple(notes))


def refuse_other_kinds(where: str, tokenizer: dict[str, Any], model: dict[str, Any]) -> None:
    """UnsupportedError unless the pipeline is Gemma's, piece by piece."""
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedError(f"{where}: only BPE tokenizers of the Gemma kind are supported, got {kind!r:.60}")
    wanted = {
        "byte_fallback": (True,),
        "ignore_merges": (False, None),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "dropout": (None, 0, 0.0),
    }
    for key, values in wanted.items():
        if model.get(key) not in values:
            raise UnsupportedError(f"{where}: model.{key}: expected {values[0]!r}, got {model.get(key)!r:.60}")
    normalizers = steps(tokenizer.get("normalizer"), "normalizers")
    if [(n.get("type"), n.get("pattern"), n.get("content")) for n in normalizers] != [
        ("Replace", {"String": " "}, SPACE)
    ]:
        raise UnsupportedError(f"{where}: normalizer: expected the replacement of ' ' by '{SPACE}' alone")
    # Gemma's own file splits at spaces, of which the normalizer leaves none.
    for splitter in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if splitter.get("type") != "Split" or splitter.get("pattern") != {"String": " "}:
            raise UnsupportedError(f"{where}: pre_tokenizer: expected none, got {splitter.get('type')!r:.60}")


def steps(component: object, key: str) -> list[dict[str, Any]]:
    """The parts of a tokenizer component: of a Sequence its list under `key`, else the one component, or none."""
    if component is None:
        return []
    if isinstance(component, dict) and component.get("type") == "Sequence":
        parts = component.get(key)
        if isinstance(parts, list) and all(isinstance(p, dict) for p in parts):
            return parts
    return [component] if isinstance(component, dict) else [{}]


def read_tokens(
    where: str, tokenizer: dict[str, Any], model: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """(tokens, types) by id, `vocab_size` of each."""
    vocab = Reader(where, model, "model.").mapping("vocab")
    types: dict[str, int] = {}
    ids: dict[int, str] = {}

    def put(token: object, i: object, kind: int) -> None:
        if not isinstance(token, str) or type(i) is not int or not 0 <= i < vocab_size:
            raise ModelFormatError(
                f"{where}: token {token!r:.60} has id {i!r:.60}: expected an id from 0 to {vocab_size - 1}"
            )
        if ids.setdefault(i, token) != token:
            raise ModelFormatError(f"{where}: id {i} stands for both {ids[i]!r:.60} and {token!r:.60}")
        types[token] = kind

    for token, i in vocab.items():
        put(token, i, BYTE if BYTE_TOKEN.fullmatch(token) else NORMAL)
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(a, dict) for a in added):
        raise ModelFormatError(f"{where}: added_tokens: expected a list of objects")
    for a in added:
        content = a.get("content")
        if isinstance(content, str) and vocab.get(content, a.get("id")) != a.get("id"):
            raise ModelFormatError(
                f"{where}: added token {content!r:.60} has id {a.get('id')!r:.60}, the vocabulary says {vocab[content]}"
            )
        put(content, a.get("id"), CONTROL if a.get("special") else USER_DEFINED)
    if len(set(ids.values())) != len(ids):
        raise ModelFormatError(f"{where}: one token has two ids")
    try:
        "".join(ids.values()).encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise ModelFormatError(f"{where}: a token is not valid Unicode") from None
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return tokens, [types[ids[i]] if i in ids else UNUSED for i in range(vocab_size)]


def read_merges(where: str, model: dict[str, Any], tokens: set[str]) -> list[str]:
    """The merges in order, as "left right"; in the file they are such strings, or pairs."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ModelFormatError(f"{where}: model.merges: expected a list")
    out = []
    for n, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p for p in pair)):
            raise ModelFormatError(f"{where}: merge {n}: expected two tokens, got {merge!r:.60}")
        left, right = pair
        if " " in left or " " in right:
            raise UnsupportedError(
                f"{where}: merge {n}: a token with a space in it cannot be written down: {merge!r:.60}"
            )
        if left not in tokens or right not in tokens or left + right not in tokens:
            raise ModelFormatError(f"{where}: merge {n}: {merge!r:.60} is not made of tokens, or makes none")
        out.append(f"{left} {right}")
    return out


def find_special_ids(where: str, config: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """GGUF key -> id, by the names in tokenizer_config.json, else by Gemma's spelling; absent tokens are left out."""
    by_text = {token: i for i, token in enumerate(tokens)}
    ids = {}
    for key, (name, spelling) in SPECIAL_IDS.items():
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            text = spelling
        elif text not in by_text:
            raise ModelFormatError(f"{where}: key '{name}': {text!r:.60} is not in the vocabulary")
        if text in by_text:
            ids[key] = by_text[text]
    return ids


def read_chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers; of several, the one named "default"."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8") or None
        except UnicodeDecodeError as e:
            raise ModelFormatError(f"{file}: not valid UTF-8") from e
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        return None
    # JSON can spell half a surrogate pair, UTF-8 cannot.
    return template.encode("utf-8", errors="replace").decode("utf-8")
