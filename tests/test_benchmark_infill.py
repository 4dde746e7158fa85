"""benchmarks/infill.py: its files, its arithmetic on results made by hand, what executing a program may cost, and a run
on a part of the demo model's own set."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import infill
import pytest
from infill import Answer, Result, by_length, judge, parses, run, summarise
from infill_items import HUMAN_EVAL, SANTA_CODER, Item, ItemFileError, read_items
from sandbox import Limits, execute

from pydiffgguf import ContextOverflowError, DiffusionModel, demo_model_path

REPOSITORY = Path(__file__).parents[1]
DEMO_SET = REPOSITORY / "benchmarks" / "data" / "infill_demo.jsonl"

# ------------------------------------------------------------------------------------------------------------- files

#: A task each in the fields of the published files, written for this test.
HUMAN_EVAL_LINE = {
    "task_id": "SingleLineInfilling/HumanEval/0/L0",
    "prompt": "def twice(x: int) -> int:\n",
    "entry_point": "twice",
    "canonical_solution": "    return x + x\n",
    "suffix": "\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
}
SANTA_CODER_LINE = {
    "name": "HumanEval_0_twice",
    "language": "js",
    "prompt": "function twice(x) {\n",
    "suffix": "\n}\n",
    "canonical_solution": "    return x + x;",
    "tests": "assert.equal(twice(3), 6);\n",
}


def written(path: Path, *lines: dict[str, Any] | str) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.jsonl.gz"])
def test_human_eval_infilling_is_read_as_published(tmp_path: Path, name: str) -> None:
    """All fields, plain and compressed; blank lines count as lines and are passed over."""
    file = read_items(written(tmp_path / name, HUMAN_EVAL_LINE, "", {**HUMAN_EVAL_LINE, "task_id": "b", "more": [1]}))
    assert file.format == HUMAN_EVAL
    first, second = file.items
    assert (first.id, first.line, first.language) == (HUMAN_EVAL_LINE["task_id"], 1, "python")
    assert (first.prefix, first.middle, first.suffix) == (
        "def twice(x: int) -> int:\n",
        "    return x + x\n",
        "\n",
    )
    assert (second.id, second.line) == ("b", 3)
    program = first.program(first.middle)
    assert program is not None and execute(program).passed
    wrong = first.program("    return x\n")
    assert wrong is not None and not execute(wrong).passed


def test_santa_coder_fim_is_read_as_published(tmp_path: Path) -> None:
    """Its languages have short names, and its tests are of another harness: nothing to execute."""
    lines = [{**SANTA_CODER_LINE, "language": language} for language in ("js", "py", "java")]
    file = read_items(written(tmp_path / "benchmark.jsonl", *lines))
    assert file.format == SANTA_CODER
    assert [item.language for item in file.items] == ["javascript", "python", "java"]
    assert [item.is_python for item in file.items] == [False, True, False]
    assert file.items[0].id == "HumanEval_0_twice" and file.items[0].middle == "    return x + x;"
    assert all(item.program(item.middle) is None for item in file.items)


def test_limit_reads_the_first_tasks_and_no_further(tmp_path: Path) -> None:
    """What stands behind them is not looked at, broken or not."""
    file = read_items(written(tmp_path / "f.jsonl", HUMAN_EVAL_LINE, HUMAN_EVAL_LINE, HUMAN_EVAL_LINE, "{"), limit=2)
    assert len(file.items) == 2


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in HUMAN_EVAL_LINE.items() if key != name}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HUMAN_EVAL_LINE, "{'single': 'quotes'}"], r"bad\.jsonl:2: not JSON"),
        ([HUMAN_EVAL_LINE, HUMAN_EVAL_LINE, "[1, 2]"], r"bad\.jsonl:3: expected a JSON object, got list"),
        ([HUMAN_EVAL_LINE, without("suffix")], r"bad\.jsonl:2: suffix is missing"),
        ([{**HUMAN_EVAL_LINE, "prompt": 7}], r"bad\.jsonl:1: prompt must be a string, but is int"),
        ([{**HUMAN_EVAL_LINE, "canonical_solution": ""}], r"bad\.jsonl:1: canonical_solution is empty"),
        ([{**HUMAN_EVAL_LINE, "entry_point": "f(); g"}], r"bad\.jsonl:1: entry_point"),
        ([{"instruction": "x", "output": "y"}], r"bad\.jsonl:1: unknown format: the fields are instruction, output"),
        ([SANTA_CODER_LINE, HUMAN_EVAL_LINE], r"bad\.jsonl:2: language is missing: SantaCoder-FIM"),
        (["[" * 100_000], r"bad\.jsonl:1: "),
        ([""], r"bad\.jsonl: no tasks"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ItemFileError, match=message):
        read_items(written(tmp_path / "bad.jsonl", *lines))


def test_bytes_that_are_no_text_name_file_and_line(tmp_path: Path) -> None:
    """A second line of Latin-1; a compressed file cut short; one that is not compressed at all."""
    good = json.dumps(HUMAN_EVAL_LINE).encode() + b"\n"
    (tmp_path / "latin.jsonl").write_bytes(good + b'{"task_id": "\xe9"}\n')
    with pytest.raises(ItemFileError, match=r"latin\.jsonl:2: not UTF-8"):
        read_items(tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good * 50)[:-20])
    with pytest.raises(ItemFileError, match=r"cut\.jsonl\.gz:\d+: not a whole gzip file"):
        read_items(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(good)
    with pytest.raises(ItemFileError, match=r"plain\.jsonl\.gz:1: not a whole gzip file"):
        read_items(tmp_path / "plain.jsonl.gz")


# -------------------------------------------------------------------------------------------------------- arithmetic


def item(middle: str, language: str = "text", prefix: str = "a", suffix: str = "z") -> Item:
    return Item("id", 1, language, prefix, middle, suffix)


def test_similarity_is_one_minus_the_share_of_edits() -> None:
    """kitten to sitting takes 3 edits of at most 7 characters; nothing in common is 0; nothing at all is 1."""
    assert judge(item("sitting"), 1, Answer("kitten")).similarity == pytest.approx(1 - 3 / 7)
    assert judge(item("abc"), 1, Answer("xyz")).similarity == 0.0
    assert judge(item("abc"), 1, Answer("")).similarity == 0.0
    assert judge(item("abc"), 1, Answer("abc")).similarity == 1.0
    # In characters, not in bytes: one of four differs.
    assert judge(item("Größ"), 1, Answer("Grüß")).similarity == pytest.approx(3 / 4)


def test_exact_is_to_the_byte_and_stripped_is_not() -> None:
    for given, exact, stripped in (("x = 1", True, True), (" x = 1\n", False, True), ("x  = 1", False, False)):
        result = judge(item("x = 1"), 3, Answer(given))
        assert (result.exact, result.stripped) == (exact, stripped)


def test_only_python_is_parsed_and_the_whole_of_it() -> None:
    """A gap that is no code alone may make code, and the other way round."""
    python = {"language": "python", "prefix": "def f(", "suffix": ":\n    return 1\n"}
    assert judge(item("a, b)", **python), 3, Answer("c)")).parses is True
    assert judge(item("a, b)", **python), 3, Answer("1 + 1")).parses is False
    assert judge(item("a, b)"), 3, Answer("(")).parses is None
    assert not parses("x = '\0'") and not parses("(" * 10_000)
    assert parses("'\\d'")  # an invalid escape is a warning, and warnings are errors here


def test_a_refused_item_is_wrong_everywhere() -> None:
    refused = judge(item("", language="python"), 3, Answer(error="ContextOverflowError: too long"), Limits())
    assert (refused.exact, refused.stripped, refused.similarity, refused.parses) == (False, False, 0.0, False)


def result(gap: int, found: int, *, exact: bool = False, similarity: float = 0.5, **more: Any) -> Result:
    names = ("passes", "rows", "seconds", "error")
    answer = Answer("", found, **{name: more.pop(name) for name in names if name in more})
    values = {"language": "text", "stripped": exact, "parses": None, **more}
    return Result("id", 1, values.pop("language"), gap, answer, exact, similarity=similarity, **values)


def test_a_summary_counts_what_it_says() -> None:
    """Four results with known figures, one of them refused."""
    summary = summarise(
        [
            result(4, 4, exact=True, similarity=1.0, parses=True, passed=True, passes=8, rows=100, seconds=1.0),
            result(4, 7, similarity=0.5, parses=False, passed=False, passes=12, rows=300, seconds=3.0),
            result(9, 8, similarity=0.25, stripped=True, passes=16, rows=200, seconds=5.0),
            result(9, 0, similarity=0.0, parses=False, error="refused"),
        ]
    )
    assert (summary.items, summary.refused) == (4, 1)
    assert (summary.exact, summary.stripped, summary.similarity) == (0.25, 0.5, 0.4375)
    assert summary.parses == pytest.approx(1 / 3)  # of three that are Python
    assert summary.passed == 0.5  # of two that were executed
    assert summary.length_error == pytest.approx((0 + 3 + 1) / 3)  # of three that were answered
    assert summary.length_exact == 0.25
    assert (summary.passes, summary.rows, summary.seconds) == (12, 200, 3)


def test_what_no_result_has_is_none_and_no_results_are_an_error() -> None:
    summary = summarise([result(1, 0, error="refused")])
    assert (summary.parses, summary.passed, summary.length_error, summary.rows) == (None, None, None, None)
    with pytest.raises(ValueError, match="no results"):
        summarise([])


def test_results_fall_into_the_bucket_of_their_own_length() -> None:
    """Every bound on both sides; the found length plays no part; empty buckets are left out."""
    gaps = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 1000]
    buckets = by_length([result(gap, 1, exact=gap == 8) for gap in gaps])
    names = ["1-2", "3-4", "5-8", "9-16", "17-32", "33-64", "65+"]
    assert {name: buckets[name].items for name in names} == dict.fromkeys(names, 2)
    assert list(buckets) == [*names, "all"] and buckets["all"].items == len(gaps)
    assert buckets["5-8"].exact == 0.5 and buckets["9-16"].exact == 0.0
    assert list(by_length([result(70, 1), result(3, 1)])) == ["3-4", "65+", "all"]


class Parrot:
    """A model that knows `answers` by prefix: (text, tokens), or an exception; a word is a token. Notes every call."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.calls = answers, []

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        assert not special  # "<bos>" in a task is text
        return [0] * len(text.split())

    def infill(self, prefix: str, suffix: str, **options: Any) -> Any:
        self.calls.append((prefix, suffix, options))
        given = self.answers[prefix]
        if isinstance(given, BaseException):
            raise given
        return SimpleNamespace(text=given[0], gap_tokens=given[1], stats=SimpleNamespace(forwards=7, rows=90))


def test_known_hands_in_the_length_and_auto_does_not() -> None:
    """Both modes see every item with the same options; a refusal is a result, and the others go on."""
    items = [item("one two", prefix="p"), item("x", prefix="q"), item("y", prefix="r")]
    parrot: Any = Parrot({"p": ("one two", 2), "q": ContextOverflowError("too long"), "r": ("one more", 2)})
    known, auto = run(parrot, items, ["known", "auto"], options={"seed": 5, "max_gap": 9})
    assert [call[2]["gap"] for call in parrot.calls] == [2, "auto", 1, "auto", 1, "auto"]
    assert all(call[2]["seed"] == 5 and call[2]["max_gap"] == 9 for call in parrot.calls)
    assert [r.exact for r in known.results] == [True, False, False]
    assert [r.gap for r in auto.results] == [2, 1, 1] and [r.answer.tokens for r in auto.results] == [2, 0, 2]
    assert auto.results[1].answer.error == "ContextOverflowError: too long"
    assert (auto.results[0].answer.passes, auto.results[0].answer.rows) == (7, 90)
    assert by_length(auto.results)["all"].length_error == 0.5


def test_an_interruption_leaves_both_modes_with_the_same_items(capsys: pytest.CaptureFixture[str]) -> None:
    parrot: Any = Parrot({"p": ("x", 1), "q": KeyboardInterrupt()})
    runs = run(parrot, [item("x", prefix="p"), item("y", prefix="q")], ["known", "auto"], options={})
    assert [len(each.results) for each in runs] == [1, 1]
    assert "interrupted" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- execution

# By the clock a busy machine may take long over a second of processor time.
LIMITS = Limits(seconds=120.0, cpu_seconds=1.0, memory=512 << 20, file_size=1 << 20)


def test_a_program_that_runs_to_its_end_passes() -> None:
    assert execute("assert 1 + 1 == 2\nprint('x' * 10_000_000)", LIMITS).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "it ended itself"),
        ("import os; os._exit(0)", "it ended itself"),
        ("while True: pass", "too much processor time"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "MemoryError"),
        ("f = open('big', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20))", "File too large|SIGXFSZ"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise Exception('first line\\n' + 'b' * 5000)", r"\.\.\.$"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_that_fails_or_runs_away_is_stopped(program: str, reason: str) -> None:
    """Each of them says why, on one line."""
    outcome = execute(program, LIMITS)
    assert not outcome.passed
    assert re.search(reason, outcome.reason), outcome.reason
    assert "\n" not in outcome.reason and len(outcome.reason) <= 200


def test_a_program_that_sleeps_is_killed_with_its_children(tmp_path: Path) -> None:
    """Time by the clock; the child that it started does not outlive it."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    program = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nimport time\ntime.sleep(60)"
    )
    began = time.monotonic()
    outcome = execute(program, Limits(seconds=1.0))
    assert not outcome.passed and "1 s" in outcome.reason
    assert time.monotonic() - began < 10
    time.sleep(3)
    assert not mark.exists()


def test_a_program_starts_in_an_empty_folder_with_hardly_any_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    program = "import os\nassert os.listdir('.') == []\nassert 'SECRET_OF_THE_CALLER' not in os.environ"
    assert execute(program, LIMITS).passed


# ------------------------------------------------------------------------------------------------- the demo model's set


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path()) as model:
        yield model


def test_the_set_is_what_its_script_makes_of_the_held_out_tasks(tmp_path: Path) -> None:
    """Same lines, and every text is a task's prefix, gap and suffix."""
    script = REPOSITORY / "tools" / "demo_model" / "infill_set.py"
    tasks = REPOSITORY / "tests" / "data" / "demo_tasks.jsonl"
    subprocess.run([sys.executable, script, "--tasks", tasks, "--out", tmp_path / "again.jsonl"], check=True)
    assert (tmp_path / "again.jsonl").read_bytes() == DEMO_SET.read_bytes()
    lines = [json.loads(line) for line in tasks.read_text(encoding="utf-8").splitlines()]
    texts = {(t["prefix"], t["gap"], t["suffix"]) for t in lines if t["kind"] == "infill"}
    assert {(i.prefix, i.middle, i.suffix) for i in read_items(DEMO_SET).items} == texts


def test_the_right_text_of_every_python_task_parses_and_passes() -> None:
    """All parse; the first twenty that can be executed pass. They can fail: their own asserts are run."""
    items = [i for i in read_items(DEMO_SET).items if i.is_python]
    assert len(items) >= 50 and all(parses(i.prefix + i.middle + i.suffix) for i in items)
    judged = [judge(i, 1, Answer(i.middle), Limits()) for i in items if i.test][:20]
    assert len(judged) == 20 and all(r.passed for r in judged)


def test_the_benchmark_runs_on_the_demo_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 tasks, both modes, from the command line: the tables, the JSON, and what the card promises of known gaps."""
    out = tmp_path / "out.json"
    args = [str(demo_model_path()), str(DEMO_SET), "--mode", "raw", "--limit", "12", "--known-too", "--max-gap", "32"]
    assert infill.main([*args, "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert "12 tasks in the format of HumanEval-Infilling" in printed.err
    for title in ("length handed in", "length to be found", "known length against unknown"):
        assert title in printed.out
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written["modes"]) == {"known", "auto"}
    for mode in written["modes"].values():
        assert len(mode["items"]) == 12 and mode["by_length"]["all"]["items"] == 12
        assert mode["by_length"]["all"]["exact"] == sum(i["exact"] for i in mode["items"]) / 12
        assert all(i["answer"]["error"] is None for i in mode["items"])
    assert written["modes"]["known"]["by_length"]["all"]["exact"] >= 0.8


def test_errors_are_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task file that is none; a model that is none; bad usage is argparse's 2."""
    bad = written(tmp_path / "bad.jsonl", HUMAN_EVAL_LINE, "{")
    for args in ([str(demo_model_path()), str(bad)], [str(bad), str(DEMO_SET)], ["missing.gguf", str(DEMO_SET)]):
        assert infill.main(args) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("infill.py: error: ")
    with pytest.raises(SystemExit) as usage:
        infill.main([str(demo_model_path()), str(DEMO_SET), "--limit", "0"])
    assert usage.value.code == 2
