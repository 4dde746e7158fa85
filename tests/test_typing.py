"""What a type checker sees of the package: `mypy --strict` over programs that use it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import textwrap
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path

import pytest

import pydiffgguf
from pydiffgguf import DiffusionModel, ModelOptions, Sampling, SamplingOptions

RIGHT = """
    import threading
    from pydiffgguf import Block, DenoiseStep, DiffusionModel, Event, Generation, Memory, Prefill, Stream, Tokenizer

    def use(path: str) -> None:
        with DiffusionModel(path, type_kv="q8_0", sampler="host", n_ctx=None) as model:
            stop = threading.Event()
            stream: Stream[Event, Generation] = model.stream("x", steps=3, seed=None, stop=None, cancel=stop)
            for event in stream:
                if isinstance(event, Prefill):
                    print(event.done, event.total)
                elif isinstance(event, DenoiseStep):
                    print(event.tokens.shape, event.text)
                else:
                    print(event.tokens, event.text)
            print(stream.result.finish_reason, stream.result.stats.steps)
            messages: list[dict[str, str]] = [{"role": "user", "content": "x"}]
            print(model.chat(messages, thinking=True, max_tokens=3).reasoning)
            print(model.infill("a", "b", gap="auto", mode="raw", n=2, time_limit_s=1.0).candidates[0].text)
            print(model.infill("a", "b", gap=3).text, model.fill("a<gap/>b", max_gap=3).text)
            print(model.edit("abc", [(0, 1)], strength=0.5, steps=3).text, model.memory(n_ctx=64).kv_cache)
            memory: Memory = model.memory()
            tokenizer: Tokenizer = model.tokenizer
            print(memory.weights, tokenizer.bos_id, model.metadata["general.name"])
"""

#: A line of a program, and what of it mypy is to refuse.
WRONG = {
    'model.generate("x", foo=1)': "foo",
    'model.stream("x", temperature=0.7)': "temperature",
    "model.chat([], raw=True, stepz=1)": "stepz",
    'model.infill("a", "b", mode="foo")': "mode",
    'model.infill("a", "b", gap="five")': "gap",
    'model.fill("a", gap=3)': "gap",
    'model.edit("a", [(0, 1)], max_tokens=3)': "max_tokens",
    "model.memory(n_threads=3)": "n_threads",
    'DiffusionModel("x", type_kv="foo")': "type_kv",
    'DiffusionModel("x", sampler="greedy")': "sampler",
    'DiffusionModel.from_pretrained("a/b", type_kv="foo")': "type_kv",
    "model.session().run_canvas(foo=1)": "foo",
    'model.generate("x", cancel=True)': "cancel",
}


def mypy(path: Path, program: str) -> str:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    path.write_text(textwrap.dedent(program))
    root = Path(pydiffgguf.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    command += ["--python-version", "3.10", "--follow-imports", "silent", "--cache-dir", str(path.parent / "cache")]
    done = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, timeout=300, env={"MYPYPATH": str(root), "PATH": ""}
    )
    return done.stdout


@pytest.mark.slow
def test_mypy_takes_what_is_right_and_names_what_is_not(tmp_path: Path) -> None:
    """One file of each: every line of the second has an error that names the option, and no other line has one."""
    assert mypy(tmp_path / "right.py", RIGHT) == ""
    head = "from pydiffgguf import DiffusionModel\ndef use(model: DiffusionModel) -> None:\n"
    out = mypy(tmp_path / "wrong.py", head + "".join(f"    {line}\n" for line in WRONG)).splitlines()
    errors = {int(line.split(":")[1]): line for line in out if ": error:" in line}
    assert sorted(errors) == list(range(3, 3 + len(WRONG))), "\n".join(out)
    for number, (line, name) in enumerate(WRONG.items(), 3):
        assert f'"{name}"' in errors[number], f"{line}: {errors[number]}"


def test_the_names_for_type_checkers_are_those_at_run_time() -> None:
    """The two lists of public names in __init__.py are one."""
    tree = ast.parse(Path(pydiffgguf.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    static = {a.asname: (node.module or "").removeprefix("pydiffgguf.") for node in imports for a in node.names}
    static.pop(None, None)
    assert static == pydiffgguf._MODULE_OF


def test_option_types_name_what_is_taken() -> None:
    """The TypedDicts against what they describe: the constructor, and the sampler's record."""
    keywords = [p.name for p in signature(DiffusionModel).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    assert sorted(ModelOptions.__annotations__) == sorted(keywords)
    assert sorted(SamplingOptions.__annotations__) == sorted([*(f.name for f in fields(Sampling)), "time_limit_s"])
