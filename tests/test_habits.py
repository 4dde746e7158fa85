"""What people type by habit: it works where the meaning is the same, else the error says how it is written here."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import LOCAL

from pydiffgguf import (
    DenoiseStep,
    DiffusionModel,
    ModelClosedError,
    Prefill,
    Progress,
    UnsupportedError,
    demo_model_path,
)

FAST: dict[str, Any] = {"seed": 1, "steps": 2, "max_tokens": 4}


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=256, n_threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("call", "option", "answer"),
    [
        ("generate", "max_new_tokens", "it is called max_tokens here"),
        ("generate", "n_predict", "it is called max_tokens here"),
        ("generate", "temperature", "the temperature falls from t_max to t_min"),
        ("generate", "top_p", "entropy_bound"),
        ("generate", "top_k", "entropy_bound"),
        ("generate", "stream", r"call stream\(\)"),
        ("generate", "system", r'call chat\(\) with a first message {"role": "system"'),
        ("generate", "thinking", r"call chat\(messages, thinking=True\)"),
        ("generate", "suffix", r"call infill\(prefix, suffix\)"),
        ("generate", "num_steps", "it is called steps here"),
        ("generate", "timeout", "it is called time_limit_s here"),
        ("generate", "stability_treshold", "did you mean stability_threshold"),
        ("generate", "zyx", r"unknown option 'zyx'; generate\(\) takes raw, .*max_tokens, .*seed, stop"),
        ("chat", "enable_thinking", "it is called thinking here"),
        ("infill", "max_tokens", "it is called max_gap here"),
        ("infill", "max_new_tokens", "it is called max_gap here"),
    ],
)
def test_other_libraries_names_are_answered_with_ours(
    model: DiffusionModel, call: str, option: str, answer: str
) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "generate": ("x",),
        "chat": ([{"role": "user", "content": "x"}],),
        "infill": ("a", "b"),
    }
    with pytest.raises(TypeError, match=f"unknown option '{option}'.*") as error:
        getattr(model, call)(*arguments[call], **{option: 1})
    error.match(answer)


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("model_path", "the path is the first argument"),
        ("seed", r"give it to each call, such as generate\(\)"),
        ("device", "it is called n_gpu_layers here"),
        ("type_k", "it is called type_kv here"),
        ("n_ctxx", "did you mean n_ctx"),
    ],
)
def test_the_constructor_answers_too(option: str, answer: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{option}': {answer}"):
        DiffusionModel(demo_model_path(), **{option: 1})
    with pytest.raises(TypeError, match=f"unknown option '{option}': {answer}"):
        DiffusionModel(**{option: 1})


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("unsloth/diffusiongemma-26B-A4B-it-GGUF", '"hf:unsloth/diffusiongemma-26B-A4B-it-GGUF"'),
        ("owner/repo:Q4_K_M", '"hf:owner/repo:Q4_K_M"'),
        ("https://huggingface.co/owner/repo", '"hf:owner/repo"'),
        ("https://huggingface.co/owner/repo/resolve/main/x-Q4_K_M.gguf?download=true", '"hf:owner/repo:x-Q4_K_M.gguf"'),
        ("https://example.org/x.gguf", "download the file first"),
        ("demo", r"the bundled model is demo_model_path\(\)"),
        ("~/x.gguf", r"os.path.expanduser\('~/x.gguf'\)"),
    ],
)
def test_a_repository_that_is_no_path_is_named_as_it_is_written(name: str, answer: str) -> None:
    with pytest.raises(FileNotFoundError, match=answer):
        DiffusionModel(name)


def test_a_plain_missing_file_is_told_plainly() -> None:
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: 'missing.gguf'$"):
        DiffusionModel("missing.gguf")


@pytest.mark.parametrize("path", [b"demo.gguf", None, 3, ["demo.gguf"]])
def test_a_path_of_another_type_is_a_type_error(path: Any) -> None:
    with pytest.raises(TypeError, match="path must be a str or a Path, not"):
        DiffusionModel(path)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (b"abc", "prompt is bytes: decode it to a str"),
        (bytearray(b"abc"), "prompt is bytearray: decode it"),
        (memoryview(b"abc"), "prompt is memoryview: decode it"),
        (None, "prompt must be a str or a sequence of token ids, not NoneType"),
        (3, "not int"),
        ({"role": "user"}, "not dict"),
        ([{"role": "user", "content": "x"}], r"prompt is a list of messages: use chat\(\)"),
        (["a", "b"], "prompt is a list of strings"),
        ([1.5], r"prompt\[0\] must be an integer"),
    ],
)
def test_what_is_no_prompt_says_what_it_is(model: DiffusionModel, prompt: Any, answer: str) -> None:
    with pytest.raises(TypeError, match=answer):
        model.generate(prompt)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model: model.generate("x", raw="no"), "raw"),
        (lambda model: model.infill("a", "b", heal="no"), "heal"),
        (lambda model: model.infill("a", "b", ends=0), "ends"),
        (lambda model: DiffusionModel(model.path, use_mmap="false"), "use_mmap"),
        (lambda model: DiffusionModel(model.path, offload_kv="no"), "offload_kv"),
        (lambda model: DiffusionModel(model.path, signal_copy=1), "signal_copy"),
        (lambda model: DiffusionModel(model.path, verbose=2), "verbose"),
    ],
)
def test_a_string_is_not_true(model: DiffusionModel, call: Callable[[DiffusionModel], object], name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        call(model)


@pytest.mark.parametrize("seed", [None, -1, np.int64(-1)])
def test_no_seed_draws_one_everywhere(model: DiffusionModel, seed: Any) -> None:
    """And tells which: the same one gives the same text."""
    drawn = model.generate("x", seed=seed, steps=2, max_tokens=4)
    assert model.generate("x", seed=drawn.stats.seed, steps=2, max_tokens=4).tokens == drawn.tokens
    infill = model.infill("a", " b", gap=2, seed=seed, steps=2)
    assert model.infill("a", " b", gap=2, seed=infill.stats.seed, steps=2).text == infill.text
    others = [
        model.fill("a<gap len=2/> b", seed=seed, steps=2).stats.seed,
        model.edit("one two", [(0, 3)], seed=seed, steps=2).stats.seed,
        model.choose("one <x/>", {"x": ["a", "b"]}, seed=seed).stats.seed,
    ]
    seeds = [drawn.stats.seed, infill.stats.seed, *others]
    assert len(set(seeds)) == 5 and min(seeds) >= 0


def test_values_that_mean_the_same_are_taken(model: DiffusionModel) -> None:
    """No stop strings, other files as a dict, no servers, token ids of numpy, all layers as llama.cpp writes it."""
    assert model.generate("x", stop=None, **FAST).tokens == model.generate("x", stop=(), **FAST).tokens
    infill: dict[str, Any] = {"gap": 2, "steps": 2, "mode": "raw"}
    as_dict = model.infill("a", " b", extra={"n.py": "text"}, **infill)
    assert (
        as_dict.stats.prompt_tokens == model.infill("a", " b", extra=[("n.py", "text")], **infill).stats.prompt_tokens
    )
    assert model.generate(np.array([2, 20, 21]), **FAST).tokens == model.generate([2, 20, 21], **FAST).tokens
    DiffusionModel(model.path, rpc=None, n_gpu_layers=0).close()  # type: ignore[arg-type]
    for layers in () if LOCAL else (-1, "all"):
        with pytest.raises(UnsupportedError, match="need a device"):
            DiffusionModel(model.path, n_gpu_layers=layers)  # type: ignore[arg-type]


def test_doubles_are_taken_where_floats_are_meant(model: DiffusionModel) -> None:
    with model.session() as session:
        session.encode([2, 20, 21])
        canvas = np.arange(model.config.canvas_length, dtype=np.int64) + 30
        logits = session.denoise(canvas)
        again = session.denoise(canvas, logits.astype(np.float64))
        np.testing.assert_array_equal(again, session.denoise(canvas, logits))
        with pytest.raises(TypeError, match="self_conditioning must have dtype float32, but has int64"):
            session.denoise(canvas, logits.astype(np.int64))


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda model: model.generate("x", noise=object()), "noise must have the methods canvas, uniform and renoise"),
        (lambda model: DiffusionModel(model.path, rpc=[1]), 'rpc must be a list of "host:port"'),
        (lambda model: model.memory(foo=1), "unknown option 'foo'"),
        (lambda model: model.detokenize([1.5]), r"ids\[0\] must be an integer"),
        (lambda model: DiffusionModel(model.path, progress=3), "progress must be a function"),
    ],
)
def test_other_mistakes_are_told_in_the_callers_words(
    model: DiffusionModel, call: Callable[[DiffusionModel], object], answer: str
) -> None:
    with pytest.raises(TypeError, match=answer):
        call(model)


def test_events_are_short_to_print_and_can_be_compared(model: DiffusionModel) -> None:
    runs = [list(model.stream("x", **FAST)) for _ in range(2)]
    steps = [[event for event in run if isinstance(event, DenoiseStep)] for run in runs]
    assert steps[0] == steps[1] and steps[0][0] != steps[0][1] and steps[0][0] in steps[1]
    assert len({*steps[0], *steps[1]}) == len(steps[0])
    for event in (event for run in runs for event in run):
        assert "\n" not in repr(event) and len(repr(event)) < 300
    assert repr(steps[0][0]).startswith("DenoiseStep(canvas=0, step=1/2, ") and "accepted, text=" in repr(steps[0][0])
    assert any(isinstance(event, Prefill) for event in runs[0])
    with model.session() as session:
        session.encode([2, 20])
        canvases = [session.run_canvas(seed=1, steps=2, trace=True) for _ in range(2)]
    assert canvases[0] == canvases[1] and canvases[0].trace[0] == canvases[1].trace[0]
    assert canvases[0].trace[0] != canvases[0].trace[1] and "\n" not in repr(canvases[0])


def test_pickling_says_what_to_do(model: DiffusionModel) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(
            TypeError, match=r"a model cannot be pickled or copied: hand on its path, .*DiffusionModel\("
        ):
            copied(model)
        with model.session() as session, pytest.raises(TypeError, match="a session cannot be pickled or copied"):
            copied(session)


def test_a_closed_model_is_not_entered(tiny_gguf: Path) -> None:
    model = DiffusionModel(tiny_gguf)
    model.close()
    with pytest.raises(ModelClosedError, match=r"tiny\.gguf is closed"), model:
        pass


def test_opening_tells_how_far_it_is(tiny_gguf: Path) -> None:
    seen: list[Progress] = []
    DiffusionModel(tiny_gguf, progress=seen.append).close()
    size = tiny_gguf.stat().st_size
    assert seen == [Progress("opening", "tiny.gguf", 0, size), Progress("opening", "tiny.gguf", size, size)]
