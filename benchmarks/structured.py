"""Constrained answers: whether all are valid, and what that costs.

    python benchmarks/structured.py                      # 1,000 schemas on the demo model and two nets, and tasks
    python benchmarks/structured.py --schemas 100 --net "untrained, canvas 256" --out structured.json
    python benchmarks/structured.py --texts              # stories and programs, in which something is forced
    python benchmarks/structured.py --vocabulary         # the grammar engine with Gemma's 262,144 tokens

Schemas are drawn by tests/schemas.py, the same every time. Each is answered at its shortest budget, one token more,
seven more, one canvas and one and a half, in turn; `jsonschema` and `re` judge. The nets are untrained. Tasks: the
questions of tests/data/demo_tasks.jsonl, free and held to an expression that every answer matches, same seeds. Texts:
the demo model's own stories and programs, in which something is forced that must come again: right is a text that is
valid and has it there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from pydiffgguf import DiffusionModel, UnsupportedError, demo_model_path
from pydiffgguf.convert import convert
from pydiffgguf.structured.constraint import Grammar, read_constraint
from pydiffgguf.structured.tables import Tables
from pydiffgguf.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from schemas import FIXED, REGEXES, SCHEMAS  # noqa: E402
from tiny_checkpoint import make_checkpoint  # noqa: E402


def drawn(n: int) -> list[dict[str, Any]]:
    """Schemas, the same every time."""
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=n,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def collect(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect()
    return found


@contextmanager
def nets() -> Iterator[dict[str, DiffusionModel]]:
    """The demo model and two untrained ones."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"demo, canvas 64": DiffusionModel(demo_model_path())}
        for canvas in (32, 256):
            path = Path(folder) / f"{canvas}.gguf"
            make_checkpoint(Path(folder) / str(canvas), canvas_length=canvas, sc_scale=0.3, tokenizer=True)
            convert(Path(folder) / str(canvas), path, type="f32")
            models[f"untrained, canvas {canvas}"] = DiffusionModel(path)
        yield models
        for model in models.values():
            model.close()


def least(model: DiffusionModel, constraint: dict[str, Any]) -> int:
    """Tokens of the shortest answer."""
    try:
        model.stream("x", max_tokens=1, raw=True, **constraint).close()
    except ValueError as error:
        return int(str(error).rsplit(" ", 1)[1])
    return 1


def run(model: DiffusionModel, items: list[tuple[dict[str, Any], Any]], steps: int) -> dict[str, Any]:
    """Answers each constraint once; `valid` says what is left of them."""
    canvas = model.config.canvas_length
    counts: dict[str, Any] = {"asked": 0, "valid": 0, "refused": 0, "wrong": [], "steps": 0, "canvases": 0}
    grammar_s, began = 0.0, time.perf_counter()
    for i, (constraint, judge) in enumerate(items):
        try:
            shortest = least(model, constraint)
        except UnsupportedError:
            counts["refused"] += 1
            continue
        budget = (shortest, shortest + 1, shortest + 7, canvas, canvas * 3 // 2)[i % 5]
        result = model.generate("x", raw=True, seed=i, steps=steps, max_tokens=max(shortest, budget), **constraint)
        counts["asked"] += 1
        counts["steps"] += sum(result.stats.steps)
        counts["canvases"] += len(result.stats.steps)
        assert result.stats.constraint is not None
        grammar_s += result.stats.constraint.grammar_s
        if judge(result):
            counts["valid"] += 1
        else:
            counts["wrong"].append([constraint, result.text])
    n = max(1, counts["asked"])
    return {
        **counts,
        "steps_per_canvas": round(counts["steps"] / max(1, counts["canvases"]), 1),
        "grammar_ms_per_document": round(1e3 * grammar_s / n, 2),
        "ms_per_document": round(1e3 * (time.perf_counter() - began) / n, 1),
    }


def schema_item(schema: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    def judge(result: Any) -> bool:
        return bool(jsonschema.Draft202012Validator(schema).is_valid(json.loads(result.text)))

    return {"response_format": {"type": "json_schema", "schema": schema}}, judge


def regex_item(regex: str) -> tuple[dict[str, Any], Any]:
    return {"regex": regex}, lambda result: re.fullmatch(regex, result.text) is not None


def tasks(model: DiffusionModel) -> dict[str, Any]:
    """Questions right and steps made, free and held."""
    path = ROOT / "tests" / "data" / "demo_tasks.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "question"]
    found: dict[str, Any] = {"questions": len(rows)}
    for name, constraint in (("free", {}), ("held", {"regex": r"[A-Za-z0-9 .,']+"})):
        results = [model.generate(row["prompt"], seed=row["id"], **constraint) for row in rows]  # type: ignore[arg-type]
        right = sum(result.text.strip() == row["answer"] for result, row in zip(results, rows, strict=True))
        found[name] = {"right": right, "steps": sum(sum(result.stats.steps) for result in results)}
    return found


#: Of a text: its beginning, the expression that forces something, and one that a text matches which goes on from there.
TEXTS: dict[str, tuple[str, str, str]] = {
    "nothing forced": ("On {day} {name} found a", r"[A-Za-z ,.]+", r".* gave the (\w+ \w+) to .*"),
    "a colour": (
        "On {day} {name} found a",
        r" {colour} [A-Za-z ,.]+",
        r" {colour} (\w+) in .* gave the {colour} \1 to .*",
    ),
    "a sentence in the middle": (
        "On {day} {name} found a",
        r" [a-z]+ [a-z]+ in [a-z ]+\. {name} gave the [a-z]+ [a-z]+ to {other}\. [A-Za-z ,.]+",
        r" (\w+) (\w+) in .* gave the \1 \2 to {other}\. {other} took the \2 .*",
    ),
    "an ending": (
        "On {day} {name} found a",
        r"[A-Za-z ,]+\. [A-Za-z ,]+\. [A-Za-z ,]+ the {place}\.",
        r".* in the {place}\. .* went back to the {place}\.",
    ),
    "a function's name": (
        "def",
        r" show_{list}\([a-z, ]+\):\n(.|\n)+",
        r" show_{list}\({list}, (\w+)\):\n(.|\n)* in {list}:\n(.|\n)*\nshow_{list}\({list}, \1\)(.|\n)*",
    ),
}
WORDS = {
    "day": ["Sunday", "Monday", "Friday"],
    "name": ["Emma", "Hugo", "Anna", "Finn"],
    "other": ["Mia", "Kate", "Sam", "Leo"],
    "colour": ["red", "blue", "green", "yellow", "black", "white", "brown", "pink"],
    "place": ["school", "forest", "library", "market"],
    "list": ["items", "cards", "coins"],
}


def texts(model: DiffusionModel, n: int) -> dict[str, Any]:
    """Texts valid, and right, free and held, of 64 tokens."""
    found: dict[str, Any] = {}
    for name, (prompt, forced, good) in TEXTS.items():
        counts: dict[str, Any] = {"texts": n}
        for i in range(n):
            words = {key: values[(i * 7 + i // len(values)) % len(values)] for key, values in WORDS.items()}
            start, regex, judge = (fill(part, words) for part in (prompt, forced, good))
            for way in ("free", "held"):
                constraint: dict[str, Any] = {} if way == "free" else {"regex": regex}
                result = model.generate(start, raw=True, seed=i, max_tokens=64, **constraint)
                text = result.text.partition("\n\n")[0] if way == "free" and "(.|" not in regex else result.text
                valid = re.fullmatch(regex, text) is not None
                right = valid and re.fullmatch(judge, text) is not None
                for key, value in (("valid", valid), ("right", right), ("steps", sum(result.stats.steps))):
                    counts[f"{way} {key}"] = counts.get(f"{way} {key}", 0) + int(value)
        found[name] = counts
        print(name, counts, flush=True)
    return found


def fill(text: str, words: dict[str, str]) -> str:
    """The text with its {words}, and no other braces, filled in."""
    return re.sub(r"\{(\w+)\}", lambda match: words[match[1]], text)


def resident() -> int:
    """Bytes that this process holds, on Linux."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def vocabulary() -> dict[str, Any]:
    """Times of the grammar engine with Gemma's own vocabulary."""
    from gemma_vocabulary import gemma_vocabulary

    words = gemma_vocabulary()
    ids = {text: words.tokens.index(text) for text in ("<bos>", "<eos>", "<unk>", "<pad>")}
    merges = [" ".join(pair) for pair in words.merges]
    tokenizer = Tokenizer.from_gguf(
        words.tokens,
        words.types,
        merges,
        bos_id=ids["<bos>"],
        eos_id=ids["<eos>"],
        unk_id=ids["<unk>"],
        pad_id=ids["<pad>"],
        add_bos=True,
    )
    before = resident()
    began = time.perf_counter()
    tables = Tables(tokenizer)
    _ = tables.table
    found: dict[str, Any] = {
        "tokens": tables.n_vocab,
        "table_s": round(time.perf_counter() - began, 2),
        "table_mb": round((resident() - before) / 1e6),
    }
    forms = {name: {"response_format": {"type": "json_schema", "schema": schema}} for name, schema in FIXED.items()}
    for name, options in {**forms, "a date": {"regex": REGEXES[0]}, "free text": {"regex": REGEXES[2]}}.items():
        constraint = read_constraint(options)
        assert constraint is not None
        began = time.perf_counter()
        grammar = Grammar(constraint, tables)
        compiled = time.perf_counter() - began
        matcher = grammar.matcher()
        rng = np.random.default_rng(0)
        times = []
        for _ in range(60):
            began = time.perf_counter()
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            times.append(time.perf_counter() - began)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            token = int(rng.choice(allowed)) if allowed.size else tables.end
            if token in tables.ends or not matcher.consume_token(token):
                break
        found[name] = {
            "compile_ms": round(1e3 * compiled, 2),
            "mask_us_mean": round(1e6 * float(np.mean(times))),
            "mask_us_worst": round(1e6 * max(times)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of a canvas at most, of the schemas and expressions"
    )
    parser.add_argument("--net", action="append", help="one of the nets; may be given again (all of them)")
    parser.add_argument("--texts", type=int, nargs="?", const=40, help="texts of each kind (40)")
    parser.add_argument("--vocabulary", action="store_true", help="the grammar engine alone, with Gemma's vocabulary")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.vocabulary:
        found = vocabulary()
    elif args.texts:
        with DiffusionModel(demo_model_path()) as demo:
            found = texts(demo, args.texts)
    else:
        schemas = [schema_item(schema) for schema in drawn(args.schemas)]
        fixed = [schema_item(schema) for schema in FIXED.values() for _ in range(5)]
        regexes = [regex_item(regex) for regex in REGEXES for _ in range(5)]
        with nets() as models:
            for name, model in models.items():
                if args.net and name not in args.net:
                    continue
                found[name] = {
                    "schemas": run(model, schemas, args.steps),
                    "fixed schemas": run(model, fixed, args.steps),
                    "expressions": run(model, regexes, args.steps),
                }
                print(name, json.dumps(found[name]), flush=True)
            if not args.net:
                found["tasks"] = tasks(models["demo, canvas 64"])
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
