"""Runs stages one after the other, each in a process of its own and within its limit, and keeps what each one found.

Standard library alone, as stages.py.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from first_hour.stages import STAGES, Context, Stage, log_file, result_file, stage, write_json

SCRIPT = Path(__file__).resolve().parents[1] / "gpu_first_hour.py"
#: Seconds of a whole run.
TOTAL = 25 * 60.0
#: Lines of a failed stage's log that are its error.
LAST_LINES = 12


def command(python: str, context: Context) -> list[str]:
    """What runs one stage: this script again."""
    words = [python, str(SCRIPT), "--stage", context.name, "--place", context.place, "--out", str(context.out)]
    words += ["--limit", str(context.limit)]
    words += ["--installed"] if context.installed else []
    words += ["--model", str(context.model)] if context.model else []
    return words


def run_here(context: Context) -> None:
    """The stage itself, in this process."""
    module, function = stage(context.name).entry.split(":")
    getattr(importlib.import_module(f"first_hour.{module}"), function)(context)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage's process and all that it started, which share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(words: Sequence[str], context: Context) -> dict[str, Any]:
    """Its status ("done", "failed", "timed out"), seconds, result, and error where there is one."""
    result, log = result_file(context.out, context.name), log_file(context.out, context.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    began = time.monotonic()
    with open(log, "wb") as out:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        code: int | None = None
        status = "timed out"
        try:
            code = process.wait(timeout=context.limit)
        except subprocess.TimeoutExpired:
            pass
        except (KeyboardInterrupt, Terminated):
            status = "interrupted"
        finally:
            end(process)
    seconds = round(time.monotonic() - began, 1)
    found: dict[str, Any] = {"status": "done", "seconds": seconds, "limit": context.limit}
    if code is None:
        found |= {"status": status, "error": f"ended after {seconds:.0f} s"}
    elif code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found |= {"status": "failed", "error": "\n".join(lines[-LAST_LINES:]) or f"exit status {code}"}
    with contextlib.suppress(FileNotFoundError):
        found["result"] = json.loads(result.read_text(encoding="utf-8"))
    return found


class Terminated(BaseException):
    """The run got SIGTERM."""


def on_terminate(number: int, frame: object) -> None:
    """SIGTERM is an exception, so that the stage under way is ended with the run, and what it found is kept."""
    raise Terminated(number)


def why_not(one: Stage, place: str, stages: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of a stage that is not to run, or None."""
    if place not in one.places:
        return {"status": "not for this place", "error": f"it runs with --place {one.places[0]}"}
    if one.needs is not None and stages.get(one.needs, {}).get("status") != "done":
        return {"status": "not run", "error": f"the stage {one.needs!r} did not succeed"}
    return None


def earlier(out: Path, place: str) -> dict[str, Any] | None:
    """What an earlier run at this place left in results.json, or None."""
    try:
        found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found if found["place"] == place else None


def run_all(
    chosen: Sequence[Stage], context: Context, *, total: float = TOTAL, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs the stages; returns what results.json holds, which is written after each of them. `before`: an earlier
    run's, whose other stages stay.

    A stage that fails or takes too long does not stop the next one. No stage gets more time than the run has left.
    """
    began = time.monotonic()
    stages: dict[str, Any] = dict(before["stages"]) if before else {}
    results: dict[str, Any] = {
        "commands": [
            *(before["commands"] if before else ()),
            shlex.join(["python", "benchmarks/gpu_first_hour.py", *sys.argv[1:]]),
        ],
        "place": context.place,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": before["load"] if before else 0.0,  # at most, over a minute before a stage's end: this run is in it
    }
    spent = before["seconds"] if before else 0.0
    python = stages.get("build", {}).get("result", {}).get("python", sys.executable)
    handler = signal.signal(signal.SIGTERM, on_terminate)
    try:
        for one in chosen:
            left = total - (time.monotonic() - began)
            found = why_not(one, context.place, stages)
            if found is None and left < 1.0:
                found = {"status": "not run", "error": f"the run's {total:.0f} s were over"}
            if found is None:
                print(f"{one.name}: {one.title}", flush=True)
                here = replace(context, name=one.name, limit=min(one.limit, left), result={})
                found = run_stage(command(python, here), here)
                print(f"  {found['status']} after {found['seconds']} s", flush=True)
            stages[one.name] = found
            python = found.get("result", {}).get("python", python)
            results["seconds"] = round(spent + time.monotonic() - began, 1)
            results["load"] = max(results["load"], round(os.getloadavg()[0], 1))
            results["stages"] = {one.name: stages[one.name] for one in (*STAGES, *chosen) if one.name in stages}
            write_json(context.out / "results.json", results)
            if found["status"] == "interrupted":
                break
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(context.out / "work", ignore_errors=True)
    return results
