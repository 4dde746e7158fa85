"""What each command does once its arguments are read: each returns an exit code, or raises what cli.py puts in words.

What is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Sampling options of the Python interface, as flags: name, type, what it does.
SAMPLING: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("steps", int, "denoise steps of the temperature schedule"),
    ("max_steps", int, "stop a canvas after this many steps, whatever the schedule"),
    ("t_min", float, "temperature that the schedule falls to"),
    ("t_max", float, "temperature of the first step"),
    (
        "entropy_bound",
        float,
        "uncertainty that a step may accept: the most certain tokens whose entropies add up to this many nats; higher "
        "is faster and riskier",
    ),
    ("stability_threshold", int, "stop when the draft has not changed for this many steps"),
    ("confidence_threshold", float, "mean entropy in nats, below which a stable canvas is finished"),
)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of DiffusionModel.generate, from the flags that were given."""
    return _given(args, "max_tokens", "canvas_length", "narrow", "seed", "stop") | sampling_options(args)


def _form(args: argparse.Namespace) -> dict[str, Any]:
    """What the answer must be, by the options of `DiffusionModel.generate`."""
    import json

    from pydiffgguf.text.document import decode, read_bytes

    if args.json_schema is not None:
        text = args.json_schema
        if not text.lstrip().startswith(("{", "true", "false")):
            text = decode(*read_bytes(text))
        try:
            schema = json.loads(text)
        except ValueError as error:
            args.command.error(f"--json-schema: it is not JSON: {error}")
        return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    if args.grammar is not None:
        return {"grammar": decode(*read_bytes(args.grammar))}
    return {name: value for name, value in (("regex", args.regex), ("choices", args.choice)) if value is not None}


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same for what every denoising takes."""
    limit = {} if args.time_limit is None else {"time_limit_s": args.time_limit}
    return _given(args, *(name for name, _, _ in SAMPLING)) | limit


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def open_model(args: argparse.Namespace, **more: Any) -> Any:
    """The DiffusionModel that the arguments name, with `more` of its options."""
    from pydiffgguf import DiffusionModel
    from pydiffgguf.hub import resolve_model

    options = {
        "n_ctx": args.ctx,
        "n_threads": args.threads,
        "n_gpu_layers": args.gpu_layers,
        "n_cpu_moe": args.cpu_moe,
        "tensor_split": args.tensor_split,
        "main_gpu": args.main_gpu,
        "offload_kv": False if args.no_offload_kv else None,
        "signal_copy": args.signal_copy,
        "rpc": args.rpc,
        "sampler": args.sampler,
        "type_kv": args.type_kv,
        "cpu": args.cpu,
        "n_sessions": getattr(args, "sessions", None),  # `serve` has it
        "lora": args.lora,
        "verbose": args.verbose or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return DiffusionModel(resolve_model(args.model), **given, **more)


def generate(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.talk import generate_once

    if args.json and args.json_lines:
        args.command.error("--json and --json-lines exclude each other")
    if args.raw and args.thinking:
        args.command.error("--thinking needs the chat template, which --raw leaves out")
    if args.prompt is None and args.file is None and sys.stdin.isatty():
        args.command.error("a prompt is needed: -p TEXT, -f FILE, or standard input")
    prompt = args.prompt if args.prompt is not None else _read_prompt(args.file)
    with open_model(args) as model:
        return generate_once(
            model,
            prompt,
            raw=args.raw,
            thinking=args.thinking,
            as_json=args.json,
            live=not args.no_live,
            options=generation_options(args) | _form(args),
            json_lines=args.json_lines,
        )


def _read_prompt(path: str | None) -> str:
    """The text of a file, or of stdin, without one last newline."""
    from pydiffgguf.text.document import decode, read_bytes

    return decode(*read_bytes(path or "-")).removesuffix("\n").removesuffix("\r")


def infill(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.talk import fill_template, infill_once
    from pydiffgguf.text.document import Document

    _check_infill(args)
    options = _given(args, "min_gap", "max_gap", "mode", "seed") | sampling_options(args)
    if args.no_heal:
        options["heal"] = False
    if args.stdio:
        return _infill_stdio(args, options)
    output = {"as_json": args.json, "live": not args.no_live, "json_lines": args.json_lines}
    document: Document | None = None
    offset = 0
    if args.template is not None:
        parts, gap = _template_parts(args)
        options |= gap
    else:
        options |= _given(args, "gap", "n")
        if args.file is not None:
            document = Document(args.file)
            try:
                if args.at is not None:
                    offset = document.offset(args.at)
                else:
                    offset = document.offset_at(args.at_offset, args.unit or "characters")
            except ValueError as error:
                args.command.error(f"{'--at' if args.at is not None else '--at-offset'}: {error}")
            if args.in_place:
                document.check_writable()
            parts = (document.text[:offset], document.text[offset:])
        else:
            parts = (Document(args.prefix_file).text, Document(args.suffix_file).text)
    if args.extra:
        options["extra"] = [(path, Document(path).text) for path in args.extra]
    if args.until is not None:
        if parts is None or parts[1].strip():
            args.command.error("--until says where a text ends that nothing follows, and here a text follows the gap")
        options["until"] = args.until
    with open_model(args) as model:
        if parts is None:
            return fill_template(model, args.template, **output, options=options)
        insert = None if not args.in_place or document is None else functools.partial(document.insert, offset)
        return infill_once(model, *parts, **output, insert=insert, options=options)


def _infill_stdio(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from pydiffgguf.cli.json_lines import LineWriter
    from pydiffgguf.cli.stdio import Stdio

    with open_model(args) as model:
        Stdio(model, options | _given(args, "gap", "n"), sys.stdin.buffer, LineWriter(sys.stdout)).run()
    return 0


def _check_infill(args: argparse.Namespace) -> None:
    """Leaves through SystemExit(2) unless the arguments name one gap, or one template, and what goes with it."""
    error = args.command.error
    if args.json_lines and (args.in_place or args.json):
        error("--json-lines goes with neither --json nor --in-place")
    if args.at is not None and args.at_offset is not None:
        error("--at and --at-offset name one place: give one of them")
    if args.unit is not None and args.at_offset is None:
        error("--unit says what --at-offset counts: give --at-offset N too")
    placed = args.at is not None or args.at_offset is not None
    if args.stdio:
        if any((args.file, placed, args.prefix_file, args.suffix_file, args.template, args.in_place, args.extra)):
            error("--stdio reads its texts from standard input: leave out FILE and what names a gap")
        if args.json or args.json_lines:
            error("--stdio always answers in JSON lines: leave out --json and --json-lines")
        return
    forms = [
        args.file is not None or placed,
        args.prefix_file is not None or args.suffix_file is not None,
        args.template is not None,
    ]
    ways = "FILE --at LINE[:COL], --prefix-file F --suffix-file F, or --template TEXT"
    if sum(forms) != 1:
        error(f"{'there are too many places' if any(forms) else 'no place'} for a gap: give {ways}")
    if forms[0] and not placed:
        error("FILE does not say where its gap is: give --at LINE[:COL] too")
    if forms[0] and args.file is None:
        error("--at needs the FILE that it counts in: pydiffgguf infill MODEL FILE --at LINE[:COL]")
    if forms[1] and (args.prefix_file is None or args.suffix_file is None):
        error("--prefix-file and --suffix-file go together; either file may be empty")
    if args.in_place and (not forms[0] or args.file == "-"):
        error("--in-place writes into a file: give FILE --at LINE[:COL]")
    if [args.file, args.prefix_file, args.suffix_file, *(args.extra or ())].count("-") > 1:
        error("- is standard input, and can be read but once: give files for the others")
    least, most = args.min_gap or 0, 128 if args.max_gap is None else args.max_gap
    if least > most:
        error(f"--min-gap {least} is more than --max-gap {most}: give a --max-gap of at least {least}")
    if isinstance(args.gap, int) and (args.min_gap is not None or args.max_gap is not None):
        error("--min-gap and --max-gap bound a gap of unknown length: leave them out, or give --gap auto")
    if isinstance(args.gap, int) and args.until is not None:
        error("--until and --gap N both say how long the gap is: leave one of them out")


def _template_parts(args: argparse.Namespace) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """(prefix and suffix, options) of a template with one gap; (None, {}) of one with more."""
    from pydiffgguf.infill import literal, parse_template

    try:
        markers = parse_template(args.template, **_given(args, "min_gap", "max_gap"))
    except ValueError as error:
        args.command.error(f"--template: {error}")
    if len(markers) > 1:
        if args.gap is not None:
            args.command.error("--gap is for one gap, and the template has several: write <gap len=N/> there")
        if args.n is not None:
            args.command.error("-n ranks the fillings of one gap, and the template has several: leave it out")
        return None, {}
    (marker,) = markers
    if marker.gap != "auto" and args.gap is not None:
        args.command.error(f"the template says that its gap has {marker.gap} tokens: leave out --gap")
    gap = args.gap if marker.gap == "auto" and args.gap is not None else marker.gap
    bounds = {"gap": gap, "min_gap": marker.min_gap, "max_gap": marker.max_gap}
    return (literal(args.template[: marker.start]), literal(args.template[marker.end :])), bounds | _given(args, "n")


def chat(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.chat import Chat

    with open_model(args) as model:
        options = generation_options(args)
        return Chat(model, args.system, thinking=args.thinking, live=not args.no_live, options=options).run()


def convert(args: argparse.Namespace) -> int:
    from pydiffgguf._text import human
    from pydiffgguf.cli.terminal import conversion_progress
    from pydiffgguf.convert import convert
    from pydiffgguf.hub import resolve_model, resolve_source

    source = resolve_source(args.source)
    with conversion_progress(sys.stderr) as progress:
        report = convert(
            source,
            args.out,
            type=args.type,
            tensor_types=args.tensor_type or (),
            imatrix=args.imatrix,
            threads=args.threads or 0,
            name=args.name,
            allow_missing_tokenizer=args.allow_missing_tokenizer,
            region=args.region,
            base=None if args.base is None else resolve_model(args.base),
            progress=progress,
        )
    types = ", ".join(f"{count} {kind}" for kind, count in report.types.items())
    print(f"{report.path}: {human(report.n_bytes)}, {report.n_tensors} tensors ({types}), {report.seconds:.1f} s")
    for note in report.notes:
        print(f"note: {note}")
    groups: dict[tuple[int, str, str], list[str]] = {}
    for fallback in report.fallbacks:
        groups.setdefault((fallback.row, fallback.wanted, fallback.written), []).append(fallback.tensor)
    for (row, wanted, written), names in groups.items():
        print(
            f"note: rows of {row} do not divide into blocks of {wanted}; {written} in {len(names)}: {', '.join(names)}"
        )
    return 0


def imatrix(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.terminal import chunk_progress
    from pydiffgguf.convert import collect
    from pydiffgguf.text.document import Document

    text = Document(args.file).text
    name = "stdin" if args.file == "-" else os.path.basename(args.file)
    with open_model(args) as model, chunk_progress(sys.stderr) as progress:
        report = collect(model, text, args.out, chunks=args.chunks, seed=args.seed, dataset=name, progress=progress)
    print(
        f"{report.path}: {report.tensors} matrices over {report.tokens} tokens in {report.chunks} chunks, "
        f"{report.seconds:.1f} s"
    )
    if report.idle:
        idle = sum(report.idle.values())
        print(f"note: {idle} experts in {len(report.idle)} tensors were never chosen; other text may reach them")
    return 0


def inspect(args: argparse.Namespace) -> int:
    from pydiffgguf.convert.adapter.opening import is_adapter_source
    from pydiffgguf.convert.inspection import fit
    from pydiffgguf.convert.inspection.inspect import inspect_file
    from pydiffgguf.convert.inspection.report import render, to_dict
    from pydiffgguf.hub import open_header

    if (args.file is None) == (args.diff is None):
        args.command.error("give one FILE, or two files behind --diff")
    if args.signal_copy and (args.fit is None or args.fit.upper() == "RAM"):
        args.command.error("--signal-copy goes with --fit SIZE: it is for devices")
    if args.diff is not None:
        return inspect_diff(args)
    if args.data:
        args.command.error("--data goes with --diff")
    path, source = open_header(args.file)
    if source is None and is_adapter_source(path):
        return inspect_adapter(args, path)
    if args.base is not None:
        args.command.error(f"--base is for adapters, and {args.file} is none")
    in_memory = args.fit is not None and args.fit.upper() == "RAM"
    device = None if args.fit is None or in_memory else fit.parse_size(args.fit)
    report = inspect_file(path, n_ctx=args.ctx, type_kv=args.type_kv or "f16", source=source)
    adapters = 0
    if args.lora:
        if args.fit is None:
            args.command.error("--lora goes with --fit")
        from pydiffgguf.engine.adapters import bytes_of, find_all

        adapters = bytes_of(find_all(args.lora))
    placing = {"adapter_bytes": adapters, "signal_copy": args.signal_copy}
    plan = None if device is None else fit.plan(report, device, **placing)
    if in_memory:
        text, found = fit.in_memory(report, adapters)
        if args.json:
            _print_json({**to_dict(report, tensors=args.tensors), "fit": found})
        else:
            _print_rich(render(report, tensors=args.tensors))
            print(text)
    elif args.json:
        out = to_dict(report, tensors=args.tensors)
        _print_json(out if plan is None else {**out, "fit": plan.to_dict()})
    else:
        _print_rich(render(report, tensors=args.tensors))
        if plan is not None:
            _print_rich(fit.render(plan))
    return 0


def inspect_adapter(args: argparse.Namespace, path: Path) -> int:
    from pydiffgguf.convert.adapter.report import inspect_adapter, render
    from pydiffgguf.hub import resolve_model

    if args.tensors or any(value is not None for value in (args.ctx, args.type_kv, args.fit)):
        args.command.error("--tensors, --ctx, --type-kv and --fit do not go with an adapter")
    report = inspect_adapter(path, base=None if args.base is None else resolve_model(args.base))
    if args.json:
        _print_json(report.to_dict())
    else:
        _print_rich(render(report))
    return 0


def inspect_diff(args: argparse.Namespace) -> int:
    from pydiffgguf.convert.inspection.diff import compare_files
    from pydiffgguf.convert.inspection.report import diff_to_dict, render_diff
    from pydiffgguf.hub import resolve_model

    if args.tensors or any(value is not None for value in (args.ctx, args.type_kv, args.fit)):
        args.command.error("--tensors, --ctx, --type-kv and --fit do not go with --diff")
    diff = compare_files(*(resolve_model(name) for name in args.diff), data=args.data)
    if args.json:
        _print_json(diff_to_dict(diff))
    else:
        _print_rich(render_diff(diff))
    return 0


def bench(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.bench import measure, table

    with open_model(args) as model:
        options = generation_options(args)
        compare = None
        if args.compare:
            engine, compare = args.compare
            if engine != "transformers":
                args.command.error(f"--compare knows transformers alone, not {engine!r}")
        result = measure(model, args.prompt, prefill=args.prefill, repeat=args.repeat, options=options, compare=compare)
    if args.json:
        _print_json(result)
    else:
        _print_rich(table(result))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.doctor import examine, render

    report = examine()
    if args.json:
        _print_json(report)
    else:
        print(render(report))
    return 1 if report["problems"] else 0


def rpc_server(args: argparse.Namespace) -> int:
    import signal

    from pydiffgguf._binding.functions import serve_rpc
    from pydiffgguf.rpc import numeric_address

    host = numeric_address(args.host)
    if not host.startswith("127."):
        print(
            f"pydiffgguf: warning: whoever reaches {host}:{args.port} can read and write this process's memory: RPC "
            "has no authentication. Only in a network of which every member is trusted.",
            file=sys.stderr,
        )
    # The call below never comes back to Python, which could not see a Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve_rpc(f"{host}:{args.port}", n_threads=args.threads or 0)
    return 0


def demo(args: argparse.Namespace) -> int:
    from pydiffgguf.cli.demo import run_demo

    return run_demo(live=not args.no_live)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False))


def _print_rich(value: Any) -> None:
    from rich.console import Console

    # Without a terminal there is no width to keep to, and a cell that is cut in two cannot be searched for.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(value)
