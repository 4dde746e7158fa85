"""The sampler's keys, the end tokens, the tokenizer and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import tokenizers
from convert_files import edit_json, read_keys

from pydiffgguf import DiffusionModel
from pydiffgguf.convert import convert
from pydiffgguf.errors import ModelFormatError, UnsupportedError


def test_sampler_values_and_end_tokens_are_optional(source: Path, copy: Path, tmp_path: Path) -> None:
    """Without generation_config.json, or with nulls in it, the keys are left out; the report says so."""
    (copy / "generation_config.json").unlink()
    report = convert(copy, tmp_path / "x.gguf", type="f32")
    assert not any(k.startswith("diffusion.eb_") for k in read_keys(tmp_path / "x.gguf"))
    assert any("sampler" in note for note in report.notes)
    (copy / "generation_config.json").write_text('{"t_min": null, "t_max": 0.5, "stability_threshold": 0}')
    convert(copy, tmp_path / "x.gguf", type="f32")
    keys = read_keys(tmp_path / "x.gguf")
    assert {k: v for k, v in keys.items() if k.startswith("diffusion.eb_")} == {
        "diffusion.eb_t_max": ("FLOAT32", 0.5),
        "diffusion.eb_stability_threshold": ("UINT32", 0),
    }


@pytest.mark.parametrize(
    ("eos", "written"),
    [([1, 6, 7], None), ([7, 1, 6, 6], None), (1, [1]), ([1, 6, 20], [1, 6, 20]), (None, None), ([], None)],
)
def test_the_eos_list_is_written_where_it_differs_from_the_texts(
    copy: Path, tmp_path: Path, eos: object, written: list[int] | None
) -> None:
    """`<eos>`, `<turn|>` and `<|tool_response>` (1, 6, 7 here) are found by text; another list gets its key."""
    edit_json(copy / "generation_config.json", lambda c: c.update(eos_token_id=eos))
    convert(copy, tmp_path / "x.gguf", type="f32")
    assert read_keys(tmp_path / "x.gguf").get("diffusion.eos_token_ids") == (written and ("ARRAY UINT32", written))


@pytest.mark.parametrize(("mode", "written"), [("raw", ("STRING", "raw")), ("chat", ("STRING", "chat")), (None, None)])
def test_the_form_of_infill_is_written_where_it_is_said(
    copy: Path, tmp_path: Path, mode: str | None, written: tuple[str, str] | None
) -> None:
    edit_json(copy / "config.json", lambda c: c.update(infill_mode=mode))
    convert(copy, tmp_path / "x.gguf", type="f32")
    assert read_keys(tmp_path / "x.gguf").get("diffusion.infill_mode") == written


def test_an_unknown_form_of_infill_is_refused(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", lambda c: c.update(infill_mode="fim"))
    with pytest.raises(ModelFormatError, match=r"infill_mode.*'fim'"):
        convert(copy, tmp_path / "x.gguf", type="f32")


def test_the_vocabulary_arrives_whole(source: Path, tmp_path: Path) -> None:
    """Tokens by id, types by the GGUF convention, merges in order, special ids, and the template's text."""
    report = convert(source, tmp_path / "x.gguf", type="f32")
    keys = {name: value for name, (_, value) in read_keys(tmp_path / "x.gguf").items()}
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == 512
    assert {token: i for i, token in enumerate(tokens[: len(vocab)])} == vocab
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert set(keys["tokenizer.ggml.scores"]) == {-1000.0}
    types = keys["tokenizer.ggml.token_type"]
    specials = {token: types[vocab[token]] for token in tiny_checkpoint.SPECIAL_TOKENS}
    assert specials.pop("<unk>") == 2
    assert set(specials.values()) == {3}
    assert {types[vocab[t]] for t in tiny_checkpoint.PLAIN_ADDED_TOKENS} == {4}
    assert {types[vocab[f"<0x{b:02X}>"]] for b in range(256)} == {6}
    assert types[vocab["\u2581the\u2581"]] == 1
    assert set(types[len(vocab) :]) == {5}
    assert any(f"{512 - len(vocab)} of 512 ids" in note for note in report.notes)
    ids = {k: v for k, v in keys.items() if k.endswith("_token_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }
    assert keys["tokenizer.ggml.model"] == "gemma4"
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_space_prefix"]) == (True, False)
    assert keys["tokenizer.chat_template"] == tiny_checkpoint.CHAT_TEMPLATE


def test_merges_may_be_strings_or_pairs(source: Path, copy: Path, tmp_path: Path) -> None:
    """Older tokenizer.json files spell a merge "a b"."""

    def as_strings(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]

    edit_json(copy / "tokenizer.json", as_strings)
    for path, name in ((source, "a"), (copy, "b")):
        convert(path, tmp_path / name, type="f32")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_bytes_are_noted(copy: Path, tmp_path: Path) -> None:
    """transformers runs such a tokenizer: a character that lacks a byte is the unknown token."""
    edit_json(copy / "tokenizer.json", lambda t: t["model"]["vocab"].pop("<0xF0>"))
    notes = convert(copy, tmp_path / "x.gguf", type="f16").notes
    assert "1 of 256 byte tokens are missing: characters become the unknown token" in notes
    reference = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    with DiffusionModel(tmp_path / "x.gguf") as model:
        for text in ("the cat", "a 😀 b", "é"):
            assert model.tokenize(text, add_bos=False) == reference.encode(text, add_special_tokens=False).ids


def test_a_chat_template_that_cannot_be_used_is_noted(copy: Path, tmp_path: Path) -> None:
    """Not only when somebody wants to chat; what training marks in a template is no fault."""
    marked = tiny_checkpoint.CHAT_TEMPLATE.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    for template, note in ((marked, None), ("{% nonsense %}", "unknown tag 'nonsense'")):
        (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
        notes = convert(copy, tmp_path / "x.gguf", type="f16").notes
        assert [n for n in notes if "chat" in n] == ([] if note is None else [n for n in notes if note in n])
        assert note is None or any(note in n for n in notes)


def test_the_chat_template_may_stand_in_the_tokenizer_config(copy: Path, tmp_path: Path) -> None:
    """As a string or a list of named ones; chat_template.jinja wins; none at all is noted."""
    for template, expected in [
        ("{{ messages }}", "{{ messages }}"),
        (
            [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0] }}"}],
            "{{ messages[0] }}",
        ),
        (None, None),
    ]:
        edit_json(copy / "tokenizer_config.json", lambda c, t=template: c.update(chat_template=t))
        convert(copy, tmp_path / "x.gguf", type="f32")
        assert read_keys(tmp_path / "x.gguf")["tokenizer.chat_template"][1] == tiny_checkpoint.CHAT_TEMPLATE
        (copy / "chat_template.jinja").rename(copy / "away")
        report = convert(copy, tmp_path / "x.gguf", type="f32")
        (copy / "away").rename(copy / "chat_template.jinja")
        got = read_keys(tmp_path / "x.gguf").get("tokenizer.chat_template")
        assert (got and got[1]) == expected
        assert any("chat template" in note for note in report.notes) == (expected is None)


def test_a_missing_tokenizer_is_an_error_unless_allowed(copy: Path, tmp_path: Path) -> None:
    """Allowed, the keys are left out, and the end tokens, which no text can tell, are written as ids."""
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelFormatError, match=r"no tokenizer\.json"):
        convert(copy, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    report = convert(copy, tmp_path / "x.gguf", type="f32", allow_missing_tokenizer=True)
    keys = read_keys(tmp_path / "x.gguf")
    assert not any(k.startswith("tokenizer.") for k in keys)
    assert keys["diffusion.eos_token_ids"] == ("ARRAY UINT32", [1, 6, 7])
    assert any("token ids" in note for note in report.notes)


TokenizerEdit = Callable[[dict[str, Any]], object]
FOREIGN_TOKENIZERS: dict[str, tuple[TokenizerEdit, type[Exception], str]] = {
    "another kind": (lambda t: t["model"].update(type="Unigram"), UnsupportedError, "BPE"),
    "no byte fallback": (lambda t: t["model"].update(byte_fallback=False), UnsupportedError, "byte_fallback"),
    "no normalizer": (lambda t: t.update(normalizer=None), UnsupportedError, "normalizer"),
    "two normalizers": (
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [t["normalizer"], {"type": "NFC"}]}),
        UnsupportedError,
        "normalizer",
    ),
    "byte level": (lambda t: t.update(pre_tokenizer={"type": "ByteLevel"}), UnsupportedError, "pre_tokenizer"),
    "id past the end": (lambda t: t["model"]["vocab"].update(zzz=512), ModelFormatError, "id 512"),
    "negative id": (lambda t: t["model"]["vocab"].update(zzz=-1), ModelFormatError, "id -1"),
    "two tokens, one id": (lambda t: t["model"]["vocab"].update(zzz=400), ModelFormatError, "id 400 stands for both"),
    "two ids, one token": (lambda t: t["added_tokens"][0].update(id=450), ModelFormatError, "'<pad>' has id 450"),
    "half a surrogate pair": (lambda t: t["model"]["vocab"].update({"\ud800": 450}), ModelFormatError, "valid Unicode"),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), ModelFormatError, "vocab"),
    "no merges": (lambda t: t["model"].pop("merges"), ModelFormatError, "merges"),
    "a merge of three": (lambda t: t["model"]["merges"].append(["a", "b", "c"]), ModelFormatError, "merge 78"),
    "a merge of nothing": (lambda t: t["model"]["merges"].append(["qq", "zz"]), ModelFormatError, "merge 78"),
    "a space in a merge": (lambda t: t["model"]["merges"].append(["a ", "b"]), UnsupportedError, "space"),
    "no bos": (
        lambda t: (t["model"]["vocab"].pop("<bos>"), t["added_tokens"].pop(2)),
        ModelFormatError,
        "'<bos>' is not in the vocabulary",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_TOKENIZERS)
def test_other_kinds_of_tokenizer_are_refused(copy: Path, tmp_path: Path, case: str) -> None:
    """What the keys cannot express is refused, since a reader would split text otherwise."""
    edit, error, text = FOREIGN_TOKENIZERS[case]
    edit_json(copy / "tokenizer.json", edit)
    with pytest.raises(error, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_gemmas_own_split_at_spaces_is_no_obstacle(copy: Path, tmp_path: Path) -> None:
    """Gemma's tokenizer.json splits at ' ' after all spaces were replaced, which splits nothing."""
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    edit_json(copy / "tokenizer.json", lambda t: t.update(pre_tokenizer=split))
    convert(copy, tmp_path / "x.gguf", type="f32")
