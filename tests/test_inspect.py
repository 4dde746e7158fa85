"""The look into a GGUF: agreement with gguf's own reader, findings for what is missing, and hostile files."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoint
from gguf import GGUFValueType
from gguf_rewrite import DROP, Typed, rewrite
from hostile_headers import HOSTILE, gguf_bytes, gguf_text, tensor_info
from rich.console import Console

from pydiffgguf import DiffusionModel
from pydiffgguf.convert import FileReport, convert, inspect_file
from pydiffgguf.convert.inspection.fit import plan
from pydiffgguf.convert.inspection.gguf_file import GGUFHead, read_head
from pydiffgguf.convert.inspection.report import render, to_dict
from pydiffgguf.errors import ContextOverflowError, ModelFormatError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny checkpoint as a Q8_0 file."""
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint.make_checkpoint(folder / "tiny", tokenizer=True)
    convert(folder / "tiny", folder / "x.gguf", type="q8_0")
    return folder / "x.gguf"


def findings(report: FileReport) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in report.findings]


def as_text(report: FileReport, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(report, tensors=True))
    return console.export_text()


# ------------------------------------------------------------------------------------------------ a sound file


def test_the_head_is_what_ggufs_own_reader_sees(model: Path) -> None:
    """Keys with types and values, tensors with shapes, types, offsets and sizes."""
    ours, theirs = read_head(model), gguf.GGUFReader(model)
    codes = {"u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING"}

    def spelled(kind: str) -> str:
        return f"ARRAY {codes[kind[4:-1]]}" if kind.startswith("arr[") else codes[kind]

    expected = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.keys) == list(expected)
    for name, field in expected.items():
        assert spelled(ours.keys[name].type) == " ".join(t.name for t in field.types), name
        assert ours.keys[name].value == field.contents(), name
    assert [(t.name, list(t.shape), t.code, t.offset, t.n_bytes, t.n_elements) for t in ours.tensors.values()] == [
        (t.name, t.shape.tolist(), t.tensor_type, t.data_offset, t.n_bytes, t.n_elements) for t in theirs.tensors
    ]
    assert (ours.version, ours.data_offset, ours.size) == (3, theirs.data_offset, model.stat().st_size)


def test_a_converted_file_lacks_nothing(model: Path) -> None:
    """No findings; types and classes add up to the whole file."""
    report = inspect_file(model)
    assert findings(report) == []
    assert report.types["Q8_0"].tensors == 57
    assert report.types["F32"].tensors == 87
    by_class = [s for kinds in report.classes.values() for s in kinds.values()]
    for field in ("tensors", "values", "n_bytes"):
        assert sum(getattr(s, field) for s in by_class) == sum(getattr(s, field) for s in report.types.values())
    assert report.n_parameters == 1_835_804
    assert set(report.classes) == {
        "attention",
        "dense FFN",
        "embedding",
        "experts",
        "norm",
        "rope",
        "router",
        "scalar",
        "self-conditioning",
    }
    assert report.classes["router"] == {"F32": report.classes["router"]["F32"]}
    assert report.memory.weight_bytes == sum(t.n_bytes for t in report.tensors)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 5 sliding layers of 2 x 32, 1 full layer of 1 x 64, window 16: K and V, 64 wide on every layer.
        ({}, 2 * 64 * 2 * (5 * (15 + 513) + 4096)),
        ({"n_ctx": 100}, 2 * 64 * 2 * (5 * 100 + 100)),
        ({"n_ctx": 3000, "type_kv": "f32"}, 2 * 64 * 4 * (5 * 528 + 3000)),
        ({"n_ctx": 3000, "type_kv": "bf16"}, 2 * 64 * 2 * (5 * 528 + 3000)),
        ({"n_ctx": 3000, "type_kv": "q8_0"}, 2 * (5 * 35904 + 204000)),
    ],
)
def test_the_kv_cache_is_counted_by_layer(model: Path, options: dict[str, Any], expected: int) -> None:
    """Full layers keep all positions, sliding ones window - 1, the largest pass and one row; Q8_0: 34 bytes per 32."""
    assert inspect_file(model, **options).memory.kv_bytes == expected


@pytest.mark.parametrize("type_kv", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("n_ctx", [None, 100, 1000])
def test_the_estimate_is_what_the_engine_takes(model: Path, n_ctx: int | None, type_kv: str) -> None:
    """Weights and KV cache to the byte, without opening the model."""
    estimate = inspect_file(model, n_ctx=n_ctx, type_kv=type_kv).memory
    with DiffusionModel(model, n_ctx=n_ctx, type_kv=type_kv) as opened:
        memory = opened.memory()
    assert (estimate.weight_bytes, estimate.kv_bytes) == (memory.weights, memory.kv_cache)


@pytest.mark.parametrize("options", [{"type_kv": "q4_0"}, {"n_ctx": 0}])
def test_options_out_of_range_name_themselves(model: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        inspect_file(model, **options)


def test_a_session_that_the_model_cannot_have_is_refused(model: Path) -> None:
    """As the engine does, with its words."""
    for n_ctx, part in ((8, "a prefix of one token and the canvas need"), (10**6, "the file's context_length is 4096")):
        with pytest.raises(ContextOverflowError, match=part):
            inspect_file(model, n_ctx=n_ctx)


def test_figures_that_no_engine_takes_are_as_good_as_none(model: Path, tmp_path: Path) -> None:
    """The rest of the report is there; what asks for the memory says why there is none."""
    for key, value in ((".expert_used_count", DROP), (".embedding_length", 2**31 - 1), (".context_length", 8)):
        rewrite(model, tmp_path / "x.gguf", keys={f"diffusion-gemma{key}": value})
        report = inspect_file(tmp_path / "x.gguf")
        assert (report.memory.needs, report.memory.kv_bytes, report.memory.n_ctx) == (None, None, None)
        assert len(report.tensors) == 144 and as_text(report)
        with pytest.raises(ModelFormatError, match="the keys do not tell its layers"):
            plan(report, 16 * 10**9)


def test_the_report_is_json(model: Path) -> None:
    """It survives a round trip; long arrays are cut, with their length kept; tensors come when asked for."""
    report = inspect_file(model)
    value = to_dict(report, tensors=True)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert "tensors" not in to_dict(report)
    assert len(value["tensors"]) == value["n_tensors"] == 144
    tokens = value["keys"]["tokenizer.ggml.tokens"]
    assert (tokens["type"], tokens["count"], len(tokens["value"])) == ("arr[str]", 512, 64)
    pattern = value["keys"]["diffusion-gemma.attention.sliding_window_pattern"]
    assert pattern["value"] == [True, True, True, True, True, False]
    assert value["memory"]["kv_bytes"] == report.memory.kv_bytes
    assert value["classes"]["experts"]["Q8_0"]["tensors"] == 12


@pytest.mark.parametrize("width", [120, 40])
def test_the_table_shows_keys_types_memory_and_tensors(model: Path, width: int) -> None:
    """Also in a narrow terminal, where cells fold."""
    text = as_text(inspect_file(model), width)
    if width == 120:
        for part in ("MOSTLY_Q8_0", "diffusion.canvas_length", "self-conditioning", "KV cache, 4096 positions in f16"):
            assert part in text
        assert "blk.5.ffn_gate_up_exps.weight" in text
    assert all(len(line) <= width for line in text.splitlines())


# ------------------------------------------------------------------------------------------------ what is missing

# What to change: `keys` and `tensors` of gguf_rewrite.rewrite.
Edit = dict[str, dict[str, Any]]


def drop(part: str) -> Callable[[GGUFHead], Edit]:
    """Removes every key and tensor whose name contains `part`."""

    def edit(head: GGUFHead) -> Edit:
        out = {
            "keys": {name: DROP for name in head.keys if part in name},
            "tensors": {name: DROP for name in head.tensors if part in name},
        }
        assert any(out.values())
        return out

    return edit


def key(name: str, value: Any, kind: GGUFValueType) -> Callable[[GGUFHead], Edit]:
    return lambda head: {"keys": {name: Typed(value, kind)}}


def tensor(name: str, *shape: int) -> Callable[[GGUFHead], Edit]:
    """Adds or replaces a tensor; `shape` is row-major."""
    return lambda head: {"tensors": {name: np.zeros(shape)}}


def split_experts(head: GGUFHead) -> Edit:
    tensors: dict[str, Any] = {}
    for i in range(6):
        tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = DROP
        tensors[f"blk.{i}.ffn_gate_exps.weight"] = np.zeros((8, 64, 128))
        tensors[f"blk.{i}.ffn_up_exps.weight"] = np.zeros((8, 64, 128))
    return {"tensors": tensors}


def half_split(head: GGUFHead) -> Edit:
    edit = split_experts(head)
    del edit["tensors"]["blk.0.ffn_up_exps.weight"]
    return edit


def rival(head: GGUFHead) -> Edit:
    edit = drop("diffusion.")(head)
    edit["tensors"] |= drop("enc_layer_output_scale")(head)["tensors"]
    edit["tensors"] |= {"self_cond_pre_norm.weight": DROP, "self_cond_norm.weight": np.ones(128)}
    return edit


CASES: dict[str, tuple[Callable[[GGUFHead], Edit], list[tuple[str, str]]]] = {
    "required key": (drop(".expert_used_count"), [("error", "key diffusion-gemma.expert_used_count is missing")]),
    "canvas": (
        drop("diffusion.canvas_length"),
        [("warning", "key diffusion.canvas_length is missing: 256 is used, the default of transformers")],
    ),
    "key's type": (
        key("diffusion-gemma.block_count", "6", GGUFValueType.STRING),
        [("error", "'diffusion-gemma.block_count' has type str, the dialect has u32")],
    ),
    "key's width": (
        key("diffusion-gemma.context_length", 4096, GGUFValueType.UINT64),
        [("note", "'diffusion-gemma.context_length' has type u64, the dialect has u32")],
    ),
    "sampler": (drop("diffusion.eb_"), [("note", "no sampler keys: the released model's values")]),
    "one sampler key": (drop("diffusion.eb_t_min"), [("note", "no diffusion.eb_t_min: the released")]),
    "tokenizer": (drop("tokenizer."), [("warning", "no tokenizer: ")]),
    "merges": (drop("tokenizer.ggml.merges"), [("warning", "no tokenizer.ggml.merges: ")]),
    "broken template": (
        key("tokenizer.chat_template", "{% if %}", GGUFValueType.STRING),
        [("warning", "chat is not possible: tokenizer.chat_template does not compile")],
    ),
    "deaf template": (
        key("tokenizer.chat_template", "{{ bos_token }}Hello!", GGUFValueType.STRING),
        [("warning", "chat is not possible: the chat template leaves out what the user says")],
    ),
    "template": (drop("tokenizer.chat_template"), [("note", "no chat template")]),
    "other tokenizer": (
        key("tokenizer.ggml.model", "llama", GGUFValueType.STRING),
        [("warning", "tokenizer.ggml.model is 'llama'")],
    ),
    "no end token": (
        lambda head: {"keys": {"tokenizer.ggml.tokens": ["a"] * 512}},
        [("warning", "none of the end tokens <eos>, <turn|>, <|tool_response>")],
    ),
    "encoder scalars": (
        drop("enc_layer_output_scale"),
        [("warning", "no encoder scalars in every layer: the decoder's")],
    ),
    "one encoder scalar": (drop("blk.2.enc_layer"), [("warning", "no encoder scalars in layers [2]")]),
    "self-conditioning": (drop("self_cond_"), [("warning", "no self-conditioning tensors")]),
    "half of it": (drop("self_cond_up"), [("error", "some of the self-conditioning tensors are missing")]),
    "global tensor": (drop("output_norm.weight"), [("error", "tensor 'output_norm.weight' is missing")]),
    "layer tensor": (drop("blk.4.ffn_down_exps.scale"), [("error", "tensor 'blk.4.ffn_down_exps.scale' is missing")]),
    "split experts": (split_experts, [("note", "gate and up of the experts stand apart in 6 layers")]),
    "half of the split": (
        half_split,
        [("error", "tensor 'blk.0.ffn_gate_up_exps.weight' is missing"), ("note", "apart in 5 layers")],
    ),
    "untied": (
        tensor("output.weight", 512, 128),
        [("error", "'output.weight' is there: an untied head")],
    ),
    "V on a full layer": (
        tensor("blk.5.attn_v.weight", 64, 128),
        [("error", "'blk.5.attn_v.weight' is there: full layers have no V")],
    ),
    "shape": (
        tensor("blk.1.attn_q_norm.weight", 64),
        [("error", "'blk.1.attn_q_norm.weight' has shape [64], the keys say [32]")],
    ),
    "turned shape": (
        tensor("blk.1.ffn_down.weight", 96, 128),
        [("error", "'blk.1.ffn_down.weight' has shape [128, 96], the keys say [96, 128]")],
    ),
    "vision": (
        tensor("v.patch_embd.weight", 2, 2),
        [("note", "1 tensors are not part of a text model")],
    ),
    "scale": (
        tensor("blk.0.attn_q.scale", 1),
        [
            ("error", "'blk.0.attn_q.scale' is there: scales beside a tensor"),
            ("note", "1 tensors are not part of a text model"),
        ],
    ),
    "rival dialect": (
        rival,
        [
            ("warning", "diffusion.canvas_length is missing: 256 is used"),
            ("warning", "no encoder scalars in every layer"),
            ("note", "no sampler keys"),
            ("note", "written in the rival dialect"),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_or_unusual_is_told(model: Path, tmp_path: Path, case: str) -> None:
    """Exactly the expected findings, errors first; table and JSON carry them."""
    edit, expected = CASES[case]
    rewrite(model, tmp_path / "x.gguf", **edit(read_head(model)))
    report = inspect_file(tmp_path / "x.gguf")
    got = findings(report)
    assert [level for level, _ in got] == [level for level, _ in expected]
    for (_, text), (_, part) in zip(got, expected, strict=True):
        assert part in text
    assert [f["text"] for f in to_dict(report)["findings"]] == [text for _, text in got]
    folded = " ".join(as_text(report, 400).split())
    assert all(text in folded for _, text in got)


def test_an_unchanged_rewrite_has_no_findings(model: Path, tmp_path: Path) -> None:
    """So what the cases above find is what they changed."""
    rewrite(model, tmp_path / "x.gguf")
    assert findings(inspect_file(tmp_path / "x.gguf")) == []


# ------------------------------------------------------------------------------------------------ hostile files


def test_a_file_that_is_no_gguf_is_told_apart(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        inspect_file(tmp_path / "nowhere.gguf")
    with pytest.raises(IsADirectoryError):
        inspect_file(tmp_path)
    file = tmp_path / "x.gguf"
    data = model.read_bytes()
    for content, text in [
        (b"", "the file is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04" + b"x" * 100, "not a GGUF file"),
        (data[:4], "truncated"),
        (b"GGUF" + struct.pack("<I", 1) + data[8:], "version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + data[8:], "big-endian"),
        (
            data.replace(b"diffusion-gemma", b"diffusion-gemmb"),
            '"diffusion-gemmb", expected "diffusion-gemma"; other .* llama.cpp or Ollama',
        ),
        (data.replace(b"general.architecture", b"general.architectura"), "general.architecture is missing"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ModelFormatError, match=text) as caught:
            inspect_file(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_cut_file_is_noticed_wherever_it_ends(model: Path, tmp_path: Path) -> None:
    """200 places from the first byte to the last but the padding, the head's every part among them."""
    data = model.read_bytes()
    head = read_head(model)
    last = max(t.offset + t.n_bytes for t in head.tensors.values())
    places = np.linspace(1, head.data_offset, 120).astype(int).tolist()
    places += np.linspace(head.data_offset, last - 1, 80).astype(int).tolist()
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    for place in sorted(places, reverse=True):
        os.truncate(file, place)
        with pytest.raises(ModelFormatError, match=r"truncated|not a GGUF file"):
            inspect_file(file)


def test_random_damage_gives_a_report_or_one_kind_of_error(model: Path, tmp_path: Path) -> None:
    """400 heads with some bytes replaced: never another exception, and every report can be shown."""
    data = model.read_bytes()
    end = read_head(model).data_offset
    rng = random.Random(7)
    outcomes = {"report": 0, "error": 0}
    file = tmp_path / "x.gguf"
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, end)
            damaged[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        file.write_bytes(damaged)
        try:
            report = inspect_file(file)
        except ModelFormatError as e:
            assert "\n" not in str(e)
            outcomes["error"] += 1
        else:
            json.dumps(to_dict(report, tensors=True), allow_nan=False)
            with suppress(ModelFormatError):
                plan(report, 16 * 10**9)
            if outcomes["report"] % 10 == 0:
                assert as_text(report)
            outcomes["report"] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_heads_are_refused_at_once(tmp_path: Path, case: str) -> None:
    """Counts, lengths, types and places that make no sense: one line, and no loop over what is not there."""
    data, part = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(data)
    started = time.monotonic()
    with pytest.raises(ModelFormatError, match=part) as caught:
        inspect_file(tmp_path / "x.gguf")
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)


def test_strings_of_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Escape sequences, line breaks and rich's markup in names and values come out as visible text."""
    evil = "\x1b[2J\x07[bold]x[/nothing]\r\n\u202egnp"
    keys = [
        gguf_text(evil) + struct.pack("<I", 8) + gguf_text(evil),
        gguf_text("general.name") + struct.pack("<I", 8) + gguf_text(evil),
    ]
    keys.append(gguf_text("nan") + struct.pack("<If", 6, float("nan")))
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, [tensor_info(evil, (4,))]))
    report = inspect_file(tmp_path / "x.gguf")
    shown = as_text(report, 200)
    assert not any(c in shown for c in "\x1b\x07\r\u202e")
    assert r"\x1b[2J\x07[bold]x[/nothing]\r\n\u202egnp" in shown
    assert json.loads(json.dumps(to_dict(report), allow_nan=False))["keys"]["nan"]["value"] is None


def test_a_vocabulary_of_full_size_is_read_in_seconds(tmp_path: Path) -> None:
    """262,144 tokens and 514,906 merges; only the beginning of such an array is kept."""
    tokens = struct.pack("<IIQ", 9, 8, 262_144) + b"".join(gguf_text(f"t{i}") for i in range(262_144))
    merges = struct.pack("<IIQ", 9, 8, 514_906) + gguf_text("a b") * 514_906
    keys = [gguf_text("tokenizer.ggml.tokens") + tokens, gguf_text("tokenizer.ggml.merges") + merges]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(keys, []))
    started = time.monotonic()
    head = read_head(tmp_path / "x.gguf")
    assert time.monotonic() - started < 20
    value = head.keys["tokenizer.ggml.tokens"]
    assert isinstance(value.value, list)
    assert (value.count, len(value.value), value.value[-1]) == (262_144, 4096, "t4095")
