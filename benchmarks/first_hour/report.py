"""The table of a run: one row for each figure, with a column for each place. Standard library alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from first_hour.stages import NOT_MEASURED, PLACES, STAGES

#: Titles of the stages' columns.
COLUMN = {"cuda": "GPU", "cpu": "CPU"}
UNITS = {
    "copy_gb_s": "copy, read and written, GB/s",
    "pinned_gb_s": "to the card from pinned memory, GB/s",
    "pageable_gb_s": "to the card from pageable memory, GB/s",
    "bf16_tflops": "product of 8192 x 8192 in BF16, TFLOP/s",
    "bf16_256_rows_tflops": "the same with 256 rows",
    "f16_tflops": "in F16, TFLOP/s",
    "f16_256_rows_tflops": "the same with 256 rows",
    "f32_tflops": "in F32, TFLOP/s",
    "f32_256_rows_tflops": "the same with 256 rows",
    "tf32_tflops": "in TF32, TFLOP/s",
    "int8_tops": "in INT8, TOP/s",
    "eager_launch_us": "a short kernel, launched, us",
    "replayed_launch_us": "a short kernel in a replayed graph, us",
}
ON_BOTH = ("copy_gb_s", "f32_tflops")
GPU = ("cuda",)
SAMPLERS = ("kernels", "operators", "host")
KERNELS = ("dg_sample_rows, keeping logits", "dg_sample_rows", "dg_finish_canvases", "dg_gather_signal")
PARTS = ("products", "experts", "attention", "head", "self_conditioning", "sampling", "other")
TOKEN_STEPS = (12, 16, 24)


class Row(NamedTuple):
    """`values`: by place. `note`: what it is to be compared with. `places`: those that have such a figure."""

    stage: str
    what: str
    values: dict[str, str]
    note: str = ""
    places: tuple[str, ...] = PLACES

    def cell(self, place: str) -> str:
        """The value; empty where the place has no such figure."""
        return self.values.get(place, NOT_MEASURED if place in self.places else "")


def number(value: float, digits: int = 3) -> str:
    """With `digits` significant ones, and thousands set apart."""
    if value == 0:
        return "0"
    whole = f"{value:,.0f}"
    return whole if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def ms(seconds: float) -> str:
    return number(seconds * 1e3)


def at(place: str, value: str | None) -> dict[str, str]:
    return {} if value is None else {place: value}


def shown(value: Any, form: Any = number) -> str | None:
    """A number as text; None for what is not there."""
    return form(value) if isinstance(value, (int, float)) else None


def of_checks(place: str, results: dict[str, Any]) -> Iterator[Row]:
    """The stages that say right or wrong."""
    twins = results.get("kernels", {}).get("twins")
    text = f"{twins['passed']} passed, {twins['failed'] + twins['error']} failed" if twins else None
    # The bodies run on the host wherever the script runs.
    yield Row("kernels", "tests of the kernels' bodies on the host", at("cpu", text), "", ("cpu",))
    kernels = results.get("kernels", {}).get("kernels")
    by_name = {k["kernel"]: k for k in kernels} if isinstance(kernels, list) else {}
    for name in KERNELS:
        found = by_name.get(name, {})
        floor = shown(found.get("floor_ms"))
        yield Row(
            "kernels", f"`{name}`, ms", at("cuda", shown(found.get("ms"))), f"floor {floor}" if floor else "", GPU
        )
    parity = results.get("parity", {})
    tests = parity.get("tests")
    text = f"{tests['passed']} passed, {tests['failed'] + tests['error']} failed" if isinstance(tests, dict) else tests
    yield Row("parity", "tests against transformers: logits, trajectories", at(place, text))
    for key, what in (
        ("texts", "texts equal to the CPU's"),
        ("texts_float32", "texts equal to the CPU's, without TF32"),
    ):
        if key == "texts_float32" and place == "cpu":
            continue
        texts = parity.get(key)
        same = f"{sum(t['same'] for t in texts)} of {len(texts)}" if texts else None
        yield Row("parity", f"the demo model's {what}", at(place, same))
    yield Row(
        "sanitizer", "compute-sanitizer, memcheck", at(place, results.get("sanitizer", {}).get("memcheck")), "", GPU
    )


def of_ceilings(results: dict[str, Any]) -> Iterator[Row]:
    found = results.get("ceilings", {})
    for key, what in UNITS.items():
        values: dict[str, str] = {}
        for place in PLACES:
            here = found.get(place)
            if isinstance(here, dict):
                values |= at(place, shown(here.get(key)))
        yield Row("ceilings", what, values, "", PLACES if key in ON_BOTH else GPU)


def of_steps(place: str, stage: str, found: dict[str, Any]) -> Iterator[Row]:
    """Steps of one shape."""
    note = ""
    if found.get("layers") is not None and found["layers"] != found["layers_of_shape"]:
        note = f"{found['layers']} of {found['layers_of_shape']} layers"
    floor = shown(found.get("floor_s"), ms)
    samplers = found.get("samplers", {})
    for sampler in SAMPLERS:
        here = samplers.get(sampler, {})
        value = "failed" if "error" in here else shown(here.get("step_s"), ms)
        notes = [note, f"floor {floor}" if floor and sampler == "kernels" else ""]
        yield Row(
            stage,
            f"a step, sampler {sampler!r}, ms",
            at(place, value),
            "; ".join(filter(None, notes)),
            GPU if sampler == "kernels" else PLACES,
        )
    own: dict[str, Any] = next((s for s in samplers.values() if "step_s" in s), {})
    for key, what in (
        ("first_step_s", "a canvas's first step, ms"),
        ("first_step_of_second_canvas_s", "the second canvas's first step, ms"),
        ("encode_canvas_s", "a canvas into the cache, ms"),
    ):
        yield Row(stage, what, at(place, shown(own.get(key), ms)), note)
    for part in PARTS:
        value = shown(own.get("parts_s", {}).get(part), ms)
        yield Row(stage, f"of a step: {part.replace('_', '-')}, ms", at(place, value), note)
    for n in TOKEN_STEPS:
        tokens = found.get("tokens", {}).get(str(n), {})
        how = "" if tokens.get("how") in (None, "measured") else tokens["how"]
        text = "; ".join(filter(None, (note, how)))
        yield Row(stage, f"tokens/s at {n} steps", at(place, shown(tokens.get("tokens_s"))), text)


def of_launches(results: dict[str, Any]) -> Iterator[Row]:
    calls = {call["what"]: call for call in results.get("launches", {}).get("calls", [])}
    for what in ("canvas 1, step 1", "canvas 1, step 2", "canvas 1, step 5", "canvas 2, step 1", "canvas 2, step 5"):
        call = calls.get(what)
        text = None
        if call is not None:
            names = ("launches", "graph_launches", "captures", "instantiations")
            text = ", ".join(f"{call.get(name, 0):,} {name.replace('_', ' ')}" for name in names)
        yield Row("launches", what, at("cuda", text), "", GPU)


def of_candidates(place: str, found: dict[str, Any]) -> Iterator[Row]:
    for prompt, steps in found.get("prompts", {}).items():
        for step in sorted({0, len(steps) // 2, len(steps) - 1}):
            here = steps[step]
            text = f"{here['median']:.0f} by the bound, {here['median_by_mass']:.0f} by mass"
            what = f"candidates a row, median, step {here['step'] + 1} of {len(steps)}: {prompt!r}"
            yield Row("candidates", what, {place: text}, f"of {found['n_vocab']:,} tokens")


def rows(run: dict[str, Any]) -> list[Row]:
    """Every row, measured or not."""
    place = run["place"]
    results = {name: stage.get("result", {}) for name, stage in run["stages"].items()}
    out = [*of_checks(place, results), *of_ceilings(results)]
    for stage in ("steps 724m", "steps released"):
        out += of_steps(place, stage, results.get(stage, {}))
    return [*out, *of_launches(results), *of_candidates(place, results.get("candidates", {}))]


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in every)


def machine(run: dict[str, Any]) -> str:
    """The machine in a line or two."""
    facts = run["stages"].get("facts", {}).get("result", {})
    gpu = facts.get("gpu")
    parts = [
        f"{gpu['name']} ({gpu['memory']:,} MiB, driver {gpu['driver']}, nvcc {facts.get('nvcc')})" if gpu else "no GPU",
        f"{facts.get('cores')} cores of {facts.get('processor')}",
        f"{facts.get('memory_gb')} GB",
        f"Python {facts.get('python_version')}",
        f"torch {facts.get('torch') or 'missing'}",
        str(facts.get("compiler")),
        f"load up to {run['load']}",
    ]
    return ", ".join(parts)


def table(run: dict[str, Any]) -> str:
    """The run as Markdown: how it was made, its stages, its figures."""
    facts = run["stages"].get("facts", {}).get("result", {})
    stages = []
    titles = {one.name: one for one in STAGES}
    for name, stage in run["stages"].items():
        seconds = f"{stage['seconds']:.0f}" if "seconds" in stage else ""
        stages.append([name, titles[name].title, stage["status"], seconds, f"{titles[name].limit:.0f}"])
    figures = [[row.stage, row.what, *(row.cell(place) for place in PLACES), row.note] for row in rows(run)]
    errors = [
        f"### {name}: {stage['status']}\n\n```\n{stage['error']}\n```"
        for name, stage in run["stages"].items()
        if stage["status"] in ("failed", "timed out", "interrupted", "not run")
    ]
    parts = [
        "# A GPU's first hour",
        "\n".join(f"    {command}" for command in run["commands"]),
        f"Machine: {machine(run)}. {run['date']}. Commit {facts.get('commit')}. "
        f"{run['seconds'] / 60:.1f} minutes in all.",
        markdown(["stage", "what", "status", "s", "limit, s"], stages),
        markdown(["stage", "figure", *(COLUMN[place] for place in PLACES), "note"], figures),
        *errors,
    ]
    return "\n\n".join(parts) + "\n"
