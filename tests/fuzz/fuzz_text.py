"""Fuzzes what a stranger's files do in Python: the chat template, the tokenizer, PEFT's adapters.

    python tests/fuzz/fuzz_text.py [--seconds N] [--seed N] [--found FOLDER]

Templates are put together from pieces of Jinja and changed character by character; vocabularies and adapters start
from a small whole one. Each is refused with ModelFormatError (or UnsupportedError), or it works, within 2 s of
processor time and with bounded output. Anything else ends the run with exit status 1 and the input in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from pydiffgguf.convert.adapter.opening import read_adapter
from pydiffgguf.errors import ModelFormatError, UnsupportedError
from pydiffgguf.text.template import BASE_UNITS, UNITS_PER_CHARACTER, ChatTemplate, TemplateRefusal
from pydiffgguf.text.tokenizer import Tokenizer

HANG_SECONDS = 2.0
MOST_CHARACTERS = 4000

# Statements; those from USUAL_FORMS on are rarely legal. These tables are packed by hand (fmt: skip): formatted, each
# has as many lines as entries, over a hundred together.
USUAL_FORMS = 12
FORMS = (
    "{{ VALUE }}", "plain text\n", "{% for m in VALUE %}BODY{% endfor %}", "{% for x in range(999) %}BODY{% endfor %}",
    "{% for x in VALUE recursive %}{{ loop(VALUE) }}{% endfor %}", "{% if VALUE %}BODY{% else %}BODY{% endif %}",
    "{% set x = VALUE %}BODY", "{% set ns.a = VALUE %}", "{% set ns = namespace(a=VALUE) %}BODY",
    "{% macro f(x) %}BODY{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(VALUE) }}", "{% with x = VALUE %}BODY{% endwith %}",
    "{% filter upper %}BODY{% endfilter %}",
    "{% call f(VALUE) %}BODY{% endcall %}", "{% break %}", "{% continue %}", "{% include VALUE %}", "{% do VALUE %}",
    "{% import VALUE as x %}", "{% extends VALUE %}", "{% block a %}BODY{% endblock %}", "{% raw %}BODY{% endraw %}",
)  # fmt: skip

EXPRESSIONS = (
    "messages", "messages[0]", "messages[-1].content", "m", "m.role", "m['content']", "x", "loop.index", "'a'",
    "'ab' * 9", "1", "-1", "10 ** 9", "9999999999", "0.5", "true", "none", "[]", "[x, x]", "{}", "{'a': x}", "(x, m)",
    "range(9)", "range(99999)", "namespace(a=1)", "ns.a", "dict(a=x)", "''.join('ab')", "strftime_now('%Y')", "f(x)",
    "bos_token", "x[::-1]", "x[1:999]", "'a,b'.split(',')", "x.upper()", "'x'.replace('', 'y')", "messages|tojson",
)  # fmt: skip
FILTERS = (
    "trim", "length", "upper", "list", "join(',')", "tojson", "tojson(indent=2)", "replace('a', 'aaaa')", "reverse",
    "sort", "map('upper')", "map(attribute='role')", "select", "selectattr('role')", "default('x')", "first", "last",
    "indent(99)", "int", "float", "string", "safe", "groupby('role')", "unique", "items", "dictsort", "truncate(9)",
)  # fmt: skip
# Never legal here, or only with luck: one of them ends most templates, so they are rare.
RARE_EXPRESSIONS = (
    "loop", "1e400", "self", "caller()", "x.__class__", "x['__init__']", "cycler(1)", "lipsum()", "''.format", "x()",
    "undefined.a", "raise_exception('no')", "varargs", "kwargs", "super()", "loop.cycle(x)", "loop(messages)",
)  # fmt: skip
RARE_FILTERS = (
    "batch(3)", "center(999999999)", "format(1)", "wordwrap(1)", "urlize", "attr('__class__')", "pprint", "xmlattr",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "//", "**", "%", "~", "==", "<", "in", "not in", "and", "or", "is", "if", "|")
TESTS = ("defined", "none", "string", "mapping", "iterable", "divisibleby(0)", "sameas x", "in x", "odd", "filter")
BROKEN = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "\0",
    "\ud800",
    "\u2028",
    "\\",
    "'",
    '"',
    "\r",
    "{%-",
    "-%}",
    "\U0010ffff",
)


class Templates:
    """Jinja sources, mostly well-formed: those reach furthest."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def expression(self, depth: int = 0) -> str:
        pick = self.rng.random()
        if depth > 3 or pick < 0.4:
            return self.rng.choice(RARE_EXPRESSIONS if self.rng.random() < 0.02 else EXPRESSIONS)
        left = self.expression(depth + 1)
        if pick < 0.55:
            return f"({left} {self.rng.choice(OPERATORS)} {self.expression(depth + 1)})"
        if pick < 0.75:
            return f"{left} | {self.rng.choice(RARE_FILTERS if self.rng.random() < 0.02 else FILTERS)}"
        if pick < 0.82:
            return f"({left} is {self.rng.choice(TESTS)})"
        if pick < 0.9:
            return f"{left}[{self.expression(depth + 1)}]"
        return f"[{left}, {self.expression(depth + 1)}]"

    def statement(self, depth: int = 0) -> str:
        inner = "" if depth > 4 else "".join(self.statement(depth + 1) for _ in range(self.rng.randrange(3)))
        value = self.expression()
        form = FORMS[self.rng.randrange(len(FORMS) if self.rng.random() < 0.1 else USUAL_FORMS)]
        return form.replace("VALUE", value).replace("BODY", inner)

    def make(self) -> str:
        text = "".join(self.statement() for _ in range(self.rng.randrange(1, 6)))[:MOST_CHARACTERS]
        if self.rng.random() < 0.05:  # deep nesting
            text = self.rng.choice(["(", "[", "{% if x %}", "{{ x|", "not ", "-"]) * self.rng.randrange(400) + text
        for _ in range(self.rng.choice((0, 0, 0, 1, 3))):
            at = self.rng.randrange(len(text) + 1)
            cut = at + self.rng.randrange(3)
            text = text[:at] + self.rng.choice((*BROKEN, "", chr(self.rng.randrange(0x20, 0x7F)))) + text[cut:]
        return text


def try_template(source: str) -> bool:
    """Whether it renders; raises AssertionError for a broken promise."""
    messages = [{"role": "user", "content": "hello"}, {"role": "model", "content": "a b " * 20}]
    variables: dict[str, Any] = {"messages": messages, "add_generation_prompt": True, "bos_token": "<bos>"}
    size = len(source) + 100
    try:
        text = ChatTemplate(source).render(variables, size)
    except (ModelFormatError, TemplateRefusal) as error:
        assert isinstance(error, TemplateRefusal) or "\n" not in str(error), "a message is one line"
        return False
    assert isinstance(text, str)
    assert len(text) <= BASE_UNITS + UNITS_PER_CHARACTER * size, "the output is bounded"
    return True


TEXTS = ("", "hello world", "a  b\n\n\n", "\u2581\u2581", "é\U0001f600\u0301", "<bos>x<eos>", "\0", "<0x0A>", "ab" * 50)


class Vocabularies:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn|>", "\u2581", *(f"<0x{i:02X}>" for i in range(256))]
        tokens += [*"abcdehlorw", "ab", "he", "ll", "hell", "\u2581w", "abab", "\n", "\n\n"]
        merges = ["a b", "h e", "l l", "he ll", "\u2581 w", "ab ab", "\n \n"]
        types = [3, 3, 3, 2, 3, 1, *[6] * 256, *[1] * 17, 4]
        self.whole: dict[str, Any] = {
            "tokens": tokens, "token_types": types[: len(tokens)], "merges": merges, "bos_id": 2, "eos_id": 1,
            "unk_id": 3, "pad_id": 0, "add_bos": True, "extra_end_ids": [4],
        }  # fmt: skip

    def text(self) -> str:
        pieces = (*TEXTS, *BROKEN, " ", "  ", "a", "b", "ab", "\ufffd", "\udcff", "x" * 5000)
        return "".join(self.rng.choice(pieces) for _ in range(self.rng.randrange(3)))

    def make(self) -> dict[str, Any]:
        v = {key: list(value) if isinstance(value, list) else value for key, value in self.whole.items()}
        for _ in range(self.rng.randrange(1, 5)):
            name = self.rng.choice(("tokens", "tokens", "merges", "merges", "token_types", "ids", "cut"))
            if name == "ids":
                key = self.rng.choice(("bos_id", "eos_id", "unk_id", "pad_id"))
                v[key] = self.rng.choice((None, -1, 0, 5, 6, 10**6, 2**40, len(v["tokens"])))
                v["extra_end_ids"] = self.rng.choice(([], [0], [-1], [2**40], [4, 4]))
            elif name == "cut":
                key = self.rng.choice(("tokens", "merges", "token_types"))
                v[key] = v[key][: self.rng.randrange(len(v[key]) + 1)] if v[key] else v[key]
            elif v[name] is not None and v[name]:
                at = self.rng.randrange(len(v[name]))
                if name == "token_types":
                    v[name][at] = self.rng.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1))
                elif name == "merges":
                    parts = (self.rng.choice((*v["tokens"], self.text())) for _ in range(self.rng.choice((1, 2, 2, 3))))
                    v[name][at] = " ".join(parts)
                else:
                    v[name][at] = self.text()
                if self.rng.random() < 0.2:
                    v[name].insert(at, v[name][at])
        return v


def try_vocabulary(v: dict[str, Any]) -> bool:
    """Whether it becomes a tokenizer; raises AssertionError for a broken promise."""
    try:
        tokenizer = Tokenizer.from_gguf(**v)
    except (ModelFormatError, UnsupportedError) as error:
        assert "\n" not in str(error), "a message is one line"
        return False
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, special=special)
            assert all(0 <= i < tokenizer.n_vocab for i in ids), "ids are in the vocabulary"
            tokenizer.decode(ids)
    for id_ in range(tokenizer.n_vocab):
        tokenizer.piece(id_)
    tokenizer.extending("a")
    return True


NAMES = (
    "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_B.weight",
    "base_model.model.model.encoder.language_model.layers.1.mlp.up_proj.lora_A.weight",
    "base_model.model.model.encoder.language_model.layers.1.mlp.up_proj.lora_B.weight",
    "base_model.model.model.decoder.layers.0.experts.lora_A.weight", "base_model.model.lm_head.lora_A.default.weight",
    "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "__metadata__", "",
    "base_model.model.model.decoder.embed_tokens.lora_embedding_A", "layers.9999999.router.proj.lora_B.weight",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 4, 8, 2**31, 2**53, 2**63, -(2**70), 0.5, 1e300, "", "4", "F32", "BF16", "I8", "F64",
    [], {}, [0], [4, 8], [8, 4], [2**40, 2**40], [-4, 8], [4, 8, 1], [0, 128], [128, 256], [0, 2**60], [None], "\0",
    {"q_proj": 2}, {"(": 1}, {"([a-z.]+)+!": 4}, "rslora", "\ud800",
)  # fmt: skip
CONFIG_KEYS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "peft_version",
    "init_lora_weights", "target_modules", "target_parameters", "modules_to_save", "bias", "lora_bias",
    "base_model_name_or_path", "layer_replication",
)  # fmt: skip


class Adapters:
    """PEFT folders, as text for the config and for the header: a whole one with some values replaced."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def make(self) -> dict[str, Any]:
        rng = self.rng
        config: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2"}
        header: dict[str, Any] = {}
        for i, name in enumerate(NAMES[:4]):
            shape, begin = [[4, 8], [8, 4]][i % 2], 128 * i
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 128]}
        for _ in range(rng.randrange(1, 4)):
            pick = rng.random()
            if pick < 0.4:
                config[rng.choice(CONFIG_KEYS)] = deepcopy(rng.choice(VALUES))
            elif pick < 0.5:
                header[rng.choice(NAMES)] = deepcopy(rng.choice((*VALUES, *header.values())))
            elif pick < 0.6 and header:
                del header[rng.choice(list(header))]
            elif entries := [entry for entry in header.values() if isinstance(entry, dict)]:
                entry = rng.choice(entries)
                entry[rng.choice(("dtype", "shape", "data_offsets", "other"))] = deepcopy(rng.choice(VALUES))
        texts = [json.dumps(config), json.dumps(header)]
        for i in range(2):
            if rng.random() < 0.2:
                at = rng.randrange(len(texts[i]) + 1)
                texts[i] = texts[i][:at] + rng.choice((*BROKEN, "", "9" * 400, "[" * 3000)) + texts[i][at + 1 :]
        size = rng.choice((None,) * 9 + (0, 2**63, 2**64 - 1, 10))
        return {"config": texts[0], "header": texts[1], "size": size, "data": rng.choice((512,) * 9 + (0, 511, 513))}


def try_adapter(folder: Path, value: dict[str, Any]) -> bool:
    """Whether it is read; raises AssertionError for a broken promise."""
    header = value["header"].encode("utf-8", "surrogatepass")
    size = len(header) if value["size"] is None else value["size"]
    data = b"\0\0\x80\x3f" * (value["data"] // 4) + b"x" * (value["data"] % 4)
    (folder / "adapter_config.json").write_bytes(value["config"].encode("utf-8", "surrogatepass"))
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", size) + header + data)
    try:
        adapter = read_adapter(folder)
    except (ModelFormatError, UnsupportedError) as error:
        assert "\n" not in str(error), "a message is one line"
        return False
    assert adapter.pairs, "an adapter that is read does something"
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--found", type=Path, default=Path())
    options = parser.parse_args()
    rng = random.Random(options.seed)
    templates, vocabularies, adapters = Templates(rng), Vocabularies(rng), Adapters(rng)
    scratch = tempfile.TemporaryDirectory()
    warnings.simplefilter("ignore")  # what is odd about an adapter
    kinds: tuple[tuple[str, Callable[[], Any], Callable[[Any], bool]], ...] = (
        ("template", templates.make, try_template),
        ("vocabulary", vocabularies.make, try_vocabulary),
        ("adapter", adapters.make, partial(try_adapter, Path(scratch.name))),
    )
    runs = {name: 0 for name, _, _ in kinds}
    good = dict(runs)
    slowest = dict.fromkeys(runs, 0.0)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        name, make, attempt = kinds[rng.randrange(len(kinds))]
        value = make()
        began = time.thread_time()
        try:
            good[name] += attempt(value)
            seconds = time.thread_time() - began
            assert seconds < HANG_SECONDS, f"it took {seconds:.1f} s"
        except BaseException as error:  # a panic in tokenizers is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            path = options.found / f"{name}-{options.seed}-{runs[name]}.json"
            path.write_text(json.dumps(value))
            print(f"{name}: {type(error).__name__}: {error}; input kept: {path}", file=sys.stderr)
            return 1
        runs[name] += 1
        slowest[name] = max(slowest[name], seconds)
    for name in runs:
        print(f"{name}: {runs[name]} runs, {good[name]} accepted, slowest {slowest[name]:.2f} s, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
