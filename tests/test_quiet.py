"""Nothing on stdout or stderr unless asked, and everything on the logger "pydiffgguf" for who asks."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_rewrite import DROP, rewrite

from pydiffgguf import Choice, DiffusionModel, ModelFormatError, ModelWarning, Stats, demo_model_path
from pydiffgguf._binding import library
from pydiffgguf._log import from_ggml

PREFIX = "On Sunday Emma found a"
SUFFIX = " in the school. Emma gave the white cup to Mia. Mia took the cup home"


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), n_threads=1) as model:
        yield model


def interpreter(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)


ALL_CALLS = f"""
from pydiffgguf import DiffusionModel, DiffGGUFError, demo_model_path
model = DiffusionModel(demo_model_path())
model.generate("Put in order: 9 7 1.", seed=7)
model.chat([{{"role": "user", "content": "Put in order: 9 7 1."}}], seed=7)
model.infill({PREFIX!r}, {SUFFIX!r})
model.fill({PREFIX + "<gap/>" + SUFFIX!r})
model.edit({PREFIX + " red cup" + SUFFIX!r}, [({len(PREFIX)}, {len(PREFIX) + 4})])
model.choose({PREFIX + "<a/>" + SUFFIX!r}, {{"a": [" white cup", " red cup"]}})
try:
    DiffusionModel(__import__("sys").argv[1])
except DiffGGUFError:
    pass
"""

ENDINGS = {
    "with all objects alive": "session = model.session(); stream = model.stream('x', raw=True); next(stream)",
    "with a prefix encoded": "session = model.session(); session.encode([2])",
    "in a cycle": "model.me = model; model.stream_it = model.stream('x', raw=True); next(model.stream_it)",
    "closed": "model.close()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_printed(tmp_path: Path, ending: str) -> None:
    """Not by any call, not by a file that is refused, and not when the interpreter ends, whatever is alive then."""
    (tmp_path / "broken.gguf").write_bytes(demo_model_path().read_bytes()[:1000])
    done = interpreter(ALL_CALLS + ENDINGS[ending], str(tmp_path / "broken.gguf"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_is_printed_when_a_thread_is_at_work_at_the_end() -> None:
    """A daemon thread inside the engine does not come back into an interpreter that is gone."""
    script = f"""
import threading, time
from pydiffgguf import DiffusionModel, demo_model_path
model = DiffusionModel(demo_model_path())
def work():
    while True:
        model.infill({PREFIX!r}, {SUFFIX!r})
threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
"""
    done = interpreter(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_logger_tells_what_was_opened_and_what_it_cost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pydiffgguf"), DiffusionModel(demo_model_path(), n_threads=1) as model:
        model.generate("Put in order: 9 7 1.", seed=7)
        model.infill(PREFIX, SUFFIX, gap=2)
    levels = {(record.levelname, record.getMessage().split()[0]) for record in caplog.records}
    assert {("INFO", "opened"), ("INFO", "weights"), ("INFO", "closed")} <= levels
    assert {("DEBUG", "session:"), ("DEBUG", "generated:"), ("DEBUG", "infilled:")} <= levels
    assert all(record.name.startswith("pydiffgguf") for record in caplog.records)


def test_a_broken_file_is_an_exception_and_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is checked before ggml reads it, so there is nothing to tell beside the exception."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_model_path().read_bytes()[:1000])
    with caplog.at_level(logging.DEBUG, "pydiffgguf"), pytest.raises(ModelFormatError, match="at byte 997"):
        DiffusionModel(broken)
    assert not caplog.records


def test_a_line_that_c_hands_over_reaches_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """The function that the C library is given, called as C calls it; bytes that are no UTF-8 are shown escaped."""
    log = library.ffi.addressof(library.lib, "dg_python_log")
    with caplog.at_level(logging.DEBUG, "pydiffgguf"):
        log(3, library.ffi.new("char[]", b"no \xff room\n"), library.ffi.NULL)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("pydiffgguf.ggml", "WARNING", "no \\xff room")
    ]


def test_lines_of_ggml_keep_their_level(caplog: pytest.LogCaptureFixture) -> None:
    """Errors become warnings, since an exception says what went wrong. Dots of progress and empty lines are dropped."""
    with caplog.at_level(logging.DEBUG, "pydiffgguf.ggml"):
        for level, text in ((1, "a\n"), (2, "b\n"), (3, "c\n"), (4, "d\n"), (5, "e"), (2, "...."), (2, "\n")):
            from_ggml(level, text)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "a"),
        ("INFO", "b"),
        ("WARNING", "c"),
        ("WARNING", "d"),
        ("DEBUG", "e"),
    ]


def test_context_that_is_left_out_is_a_warning_on_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with DiffusionModel(demo_model_path(), n_ctx=192, n_threads=1) as model, caplog.at_level(logging.WARNING):
        model.infill("word " * 400 + PREFIX, SUFFIX, gap=2)
        text = "word " * 400 + PREFIX + " red" + SUFFIX
        model.edit(text, [(2000 + len(PREFIX), 2000 + len(PREFIX) + 4)])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["infill", "edit"]


def test_every_result_has_stats(model: DiffusionModel) -> None:
    """Seed, prompt tokens and seconds of whatever was computed."""
    template = PREFIX + "<gap max=4/>" + SUFFIX + "<gap len=2/>."
    text = PREFIX + " red cup" + SUFFIX
    results = {
        "generate": model.generate("Put in order: 9 7 1.", seed=7).stats,
        "chat": model.chat([{"role": "user", "content": "Put in order: 9 7 1."}], seed=7).stats,
        "infill": model.infill(PREFIX, SUFFIX, seed=7).stats,
        "fill": model.fill(template, seed=7).stats,
        "edit": model.edit(text, [(len(PREFIX), len(PREFIX) + 4), (len(text) - 5, len(text))], seed=7).stats,
        "choose": model.choose(PREFIX + "<a/>" + SUFFIX, {"a": [" white", " red"]}, draws=3, seed=7).stats,
    }
    for name, stats in results.items():
        assert stats.seed == 7, name
        assert stats.prompt_tokens > 0, name
        assert stats.denoise_s > 0, name
    chosen = results["choose"]
    assert isinstance(chosen, Stats) and chosen.steps == [1] * 3  # one for each draw


def test_the_stats_of_a_template_are_those_of_its_gaps(model: DiffusionModel) -> None:
    result = model.fill(PREFIX + "<gap max=4/>" + SUFFIX + "<gap len=2/>.", seed=7)
    assert len(result.gaps) == 2
    for name in ("prompt_tokens", "reused_tokens", "encoded_tokens", "candidates", "forwards", "rows", "denoise_s"):
        assert getattr(result.stats, name) == pytest.approx(sum(getattr(gap.stats, name) for gap in result.gaps)), name


def test_a_choice_is_a_dict(model: DiffusionModel) -> None:
    choice = model.choose(PREFIX + "<a/>" + SUFFIX, {"a": [" white", " red"]})
    assert isinstance(choice, Choice) and choice == {"a": choice["a"]} and choice["a"][" white"] > 0.9


def test_an_odd_file_warns_and_logs(tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Python's warning for who reads a terminal, the logger for who reads logs; both can be turned off."""
    odd = tmp_path / "odd.gguf"
    rewrite(tiny_gguf, odd, tensors={f"blk.{i}.enc_layer_output_scale.weight": DROP for i in range(6)})
    with caplog.at_level(logging.WARNING), pytest.warns(ModelWarning):
        DiffusionModel(odd).close()
    assert caplog.records
