"""The command ``pydiffgguf``: what its arguments are, and how it fails.

Exit codes: 0; 1 the operation failed, and one line on stderr says why; 2 bad usage; 130 interrupted. What is slow to
import is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["main"]

DESCRIPTION = (
    "DiffusionGemma from GGUF files, in your own process: convert, generate, chat, and watch the canvas denoise."
)
MODEL_HELP = "a GGUF file, or hf:OWNER/REPO[:PATTERN], such as hf:unsloth/diffusiongemma-26B-A4B-it-GGUF:Q4_K_M"

#: Sampling options of the Python interface, as flags: name, type, what it does.
SAMPLING: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("steps", int, "denoise steps of the temperature schedule"),
    ("max_steps", int, "stop a canvas after so many steps, whatever the schedule"),
    ("t_min", float, "temperature at the schedule's end"),
    ("t_max", float, "temperature at its beginning"),
    ("entropy_bound", float, "nats that a step may accept together, beyond the most certain token"),
    ("stability_threshold", int, "equal drafts in a row that a stop needs, besides the present one"),
    ("confidence_threshold", float, "mean entropy in nats, below which a stable canvas is finished"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. Bad usage leaves through SystemExit(2), as argparse does it."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that cannot show a character gets its escape instead of an error in the middle of a text.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _plain_warnings():
            code: int = args.run(args)
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone; Python would complain once more when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            print(f"pydiffgguf: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    from pydiffgguf.errors import DiffGGUFError

    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif isinstance(error, (DiffGGUFError, OSError, ValueError, TypeError, ImportError)) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}".removesuffix(": ") + " (--debug shows where)"
    return " ".join(text.split())


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """What the library warns of, on one line each and without the line of source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"pydiffgguf: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# ------------------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pydiffgguf", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pydiffgguf {_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, run: Callable[[argparse.Namespace], int], *examples: str) -> Any:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        sub.set_defaults(run=run, command=sub)
        return sub

    sub = command("demo", "run the bundled demo model; needs no network and no arguments", _demo, "pydiffgguf demo")
    sub.add_argument("--no-live", action="store_true", help="print the results only")

    sub = command(
        "generate",
        "text from a prompt",
        _generate,
        'pydiffgguf generate model.gguf -p "Why is the sky blue?"',
        "pydiffgguf generate model.gguf -f question.txt -n 1024 --seed 7 > answer.txt",
        "echo 'Once upon a time' | pydiffgguf generate model.gguf --raw --json",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    where = sub.add_mutually_exclusive_group()
    where.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; without -p and -f it is read from stdin")
    where.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a UTF-8 file, less one last newline")
    sub.add_argument("--raw", action="store_true", help="plain text: do not put the prompt through the chat template")
    sub.add_argument("--thinking", action="store_true", help="let the model write down its thoughts first")
    sub.add_argument("--json", action="store_true", help="print one object: text, tokens, steps, seconds, ...")
    sub.add_argument("--no-live", action="store_true", help="do not draw the canvas, print finished text only")
    _add_generation(sub)
    _add_model_options(sub)

    sub = command(
        "infill",
        "fill a gap: the text between what stands before and behind it",
        _infill,
        "pydiffgguf infill model.gguf main.py --at 12:5",
        "pydiffgguf infill model.gguf main.py --at 12 --gap 20 --in-place",
        "pydiffgguf infill model.gguf --prefix-file before.txt --suffix-file behind.txt -n 3 --json",
        'pydiffgguf infill model.gguf --template "The quick <gap/> fox jumps over the <gap len=2/> dog."',
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = sub.add_argument_group("where the gap is", "One of the three; what is read must be UTF-8, - is stdin.")
    group.add_argument("file", metavar="FILE", nargs="?", help="a text file; with --at")
    group.add_argument(
        "--at", type=_position, metavar="LINE[:COL]", help="counted from 1, in characters; no COL: the line's end"
    )
    group.add_argument("--prefix-file", metavar="F", help="the text before the gap, all of it")
    group.add_argument("--suffix-file", metavar="F", help="the text behind the gap")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="text with gaps: <gap/>, <gap max=8/>, <gap min=2 max=8/>, <gap len=3/> (<\\gap/> is the text <gap/>); of "
        "several gaps each is printed as a JSON string on its own line",
    )
    group = sub.add_argument_group("the gap")
    group.add_argument("--gap", type=_gap, metavar="N|auto", help="its length in tokens (auto: lengths are tried)")
    group.add_argument("--min-gap", type=_at_least(0), metavar="N", help="shortest that auto tries (0)")
    group.add_argument("--max-gap", type=_at_least(1), metavar="N", help="longest that auto tries (128)")
    group.add_argument("--mode", choices=("auto", "raw", "chat"), help="a document, or a request in the chat template")
    group.add_argument("--no-heal", action="store_true", help="do not go on with the prefix's last, unfinished word")
    group.add_argument("--extra", action="append", metavar="FILE", help="another file to know; may be given repeatedly")
    group.add_argument("-n", type=_at_least(1), metavar="N", help="rank so many fillings, which --json lists (1)")
    group.add_argument("--seed", type=int, metavar="N", help="keys all draws (0)")
    sub.add_argument("--in-place", action="store_true", help="write the filling into FILE; a pipe gets nothing then")
    sub.add_argument("--json", action="store_true", help="print one object: text, gap_tokens, score, candidates, ...")
    sub.add_argument("--no-live", action="store_true", help="do not draw the canvas, print finished text only")
    _add_sampling(sub)
    _add_model_options(sub)

    sub = command(
        "chat",
        "talk to a model",
        _chat,
        "pydiffgguf chat model.gguf",
        'pydiffgguf chat model.gguf --system "Answer in French." --thinking',
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--system", metavar="TEXT", help="the system turn")
    sub.add_argument("--thinking", action="store_true", help="let the model write down its thoughts first")
    sub.add_argument("--no-live", action="store_true", help="do not draw the canvas, print finished text only")
    _add_generation(sub)
    _add_model_options(sub)

    sub = command(
        "convert",
        "make a GGUF file from a checkpoint, or give a GGUF file other types",
        _convert,
        "pydiffgguf convert diffusiongemma-26B-A4B-it -o model.gguf",
        "pydiffgguf convert hf:google/diffusiongemma-26B-A4B-it -o model.gguf --type dg4",
        "pydiffgguf convert model-bf16.gguf -o small.gguf --type q4_k_m --imatrix imatrix.gguf",
        "pydiffgguf convert model-bf16.gguf -o mine.gguf --type q4_k_m --tensor-type 'ffn_.*_exps=iq4_nl'",
    )
    sub.add_argument(
        "source",
        metavar="SRC",
        help="a folder with config.json and safetensors, or hf:OWNER/REPO; a GGUF file, or hf:OWNER/REPO:PATTERN",
    )
    sub.add_argument("-o", "--out", metavar="OUT.gguf", required=True, help="appears only when it is whole")
    sub.add_argument(
        "--type",
        metavar="TYPE",
        default="q8_0",
        help="f32, f16, bf16, q8_0 (default), q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, iq4_nl, iq4_xs, q3_k_m, q2_k "
        "or mxfp4, tensor by tensor what llama.cpp gives; dg4, 4.6 bits a weight, is made for this model",
    )
    sub.add_argument(
        "--tensor-type",
        action="append",
        metavar="PATTERN=TYPE",
        help="tensors whose name has the regular expression get that ggml type; repeatable, the first match counts",
    )
    sub.add_argument(
        "--imatrix", metavar="F", help="an importance matrix: of pydiffgguf imatrix, or llama.cpp's in GGUF"
    )
    sub.add_argument("--threads", type=_at_least(1), metavar="N", help="quantize on so many cores (all)")
    sub.add_argument(
        "--name", metavar="NAME", help="general.name in the file; the folder's name, or the GGUF's, if not given"
    )
    sub.add_argument("--allow-missing-tokenizer", action="store_true", help="a folder without tokenizer.json will do")

    sub = command(
        "imatrix",
        "collect an importance matrix, by which convert spends the bits of small types where they matter",
        _imatrix,
        "pydiffgguf imatrix model-bf16.gguf -f text.txt -o imatrix.gguf",
        "pydiffgguf convert model-bf16.gguf -o small.gguf --type dg4 --imatrix imatrix.gguf",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument(
        "-f", "--file", metavar="FILE", required=True, help="UTF-8 text like what the model will write; - is stdin"
    )
    sub.add_argument("-o", "--out", metavar="OUT.gguf", required=True, help="in llama.cpp's imatrix GGUF format")
    sub.add_argument("--chunks", type=_at_least(1), metavar="N", help="run at most so many chunks of the text (all)")
    sub.add_argument("--seed", type=int, metavar="N", default=0, help="of the random tokens on the canvases (0)")
    _add_model_options(sub)

    sub = command(
        "inspect",
        "what a GGUF file holds, what memory it needs, what it lacks; or what sets two files apart",
        _inspect,
        "pydiffgguf inspect model.gguf",
        "pydiffgguf inspect model.gguf --tensors --json",
        "pydiffgguf inspect model.gguf --fit 16GB --ctx 32768",
        "pydiffgguf inspect --diff a.gguf b.gguf --data",
    )
    sub.add_argument("file", metavar="FILE", nargs="?", help=MODEL_HELP)
    sub.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="compare two files, in place of FILE: keys and tensors"
    )
    sub.add_argument("--data", action="store_true", help="with --diff: the weights too, byte for byte")
    sub.add_argument("--tensors", action="store_true", help="list every tensor")
    sub.add_argument("--json", action="store_true", help="print one object")
    sub.add_argument("--ctx", type=int, metavar="N", help="positions to reckon the memory for")
    sub.add_argument("--type-kv", metavar="TYPE", help="type of the cache to reckon with (f16)")
    sub.add_argument(
        "--fit",
        metavar="SIZE",
        help="what goes onto a device with so much memory free (16GB is 10^9 bytes each, 16GiB 2^30), and what stays",
    )

    sub = command(
        "rpc-server",
        "offer this machine's GPUs, or its CPU, to models on other machines",
        _rpc_server,
        "pydiffgguf rpc-server --port 50052",
        "pydiffgguf generate model.gguf --rpc 127.0.0.1:50052 -p Hello",
    )
    sub.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="where to listen (127.0.0.1); there is no authentication: never where strangers can reach it",
    )
    sub.add_argument("--port", type=_at_least(1), metavar="P", default=50052, help="(50052)")
    sub.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (as many as there are)")

    sub = command(
        "bench",
        "measure prefill and denoise step times, steps per canvas, tokens per second, peak memory",
        _bench,
        "pydiffgguf bench model.gguf",
        "pydiffgguf bench model.gguf --prefill 2048 --repeat 9 --threads 4 --json",
        "pydiffgguf bench model.gguf --compare transformers diffusiongemma-26B-A4B-it",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--prefill", type=int, metavar="N", default=512, help="tokens of the prompt to encode (512)")
    sub.add_argument("--repeat", type=int, metavar="N", default=5, help="times are medians of so many runs (5)")
    sub.add_argument("-p", "--prompt", metavar="TEXT", help="what to generate from")
    sub.add_argument(
        "--compare",
        nargs=2,
        metavar=("transformers", "CKPT"),
        help="time a checkpoint folder in transformers, float32, in turns with the model; needs torch and transformers",
    )
    sub.add_argument("--json", action="store_true", help="print one object")
    _add_generation(sub)
    _add_model_options(sub)

    sub = command(
        "doctor",
        "check the installation; exit code 1, and the cure, when something is off",
        _doctor,
        "pydiffgguf doctor",
        "pydiffgguf doctor --json",
    )
    sub.add_argument("--json", action="store_true", help="print one object")
    return parser


def _add_generation(sub: Any) -> None:
    sub.add_argument("-n", "--max-tokens", type=int, metavar="N", help="longest result in tokens (256)")
    sub.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (else a fresh one)")
    group = _add_sampling(sub)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given repeatedly")


def _add_sampling(sub: Any) -> Any:
    group = sub.add_argument_group("sampling", "What is not given comes from the file, then from the released model.")
    for name, kind, text in SAMPLING:
        group.add_argument(_flag(name), type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument("--time-limit", type=float, metavar="S", help="begin no step later than so many seconds")
    return group


def _add_model_options(sub: Any) -> None:
    group = sub.add_argument_group("model")
    group.add_argument(
        "--ctx", type=int, metavar="N", help="positions for prompt, text and canvas (8192, or the file's if less)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (as many as there are)")
    group.add_argument("--gpu-layers", type=_gpu_layers, metavar="N|auto", help="layers on devices (auto: what fits)")
    group.add_argument("--cpu-moe", type=_at_least(0), metavar="N", help="keep the first N layers' experts on the CPU")
    group.add_argument("--tensor-split", type=_numbers, metavar="X,Y", help="each device's share (its free memory)")
    group.add_argument("--main-gpu", type=_at_least(0), metavar="I", help="the device with the head (the last)")
    group.add_argument("--no-offload-kv", action="store_true", help="keep the cache, and attention, on the CPU")
    group.add_argument(
        "--rpc", type=_words, metavar="HOST:PORT,..", help="devices of other machines, which run pydiffgguf rpc-server"
    )
    group.add_argument("--type-kv", metavar="TYPE", help="type of the cache: f16 (default), f32, bf16, q8_0")
    group.add_argument("--verbose", action="store_true", help="say on stderr what was opened and what it takes")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _gpu_layers(text: str) -> int | str:
    return "auto" if text == "auto" else int(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least {least}")
        return int(text)

    return number


def _gap(text: str) -> int | str:
    if text != "auto" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens, at least 1, or auto")
    return "auto" if text == "auto" else int(text)


def _position(text: str) -> Any:
    from pydiffgguf.document import Position

    try:
        return Position.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pydiffgguf")
    except PackageNotFoundError:  # run from a source folder; doctor says what to do
        return "(not installed)"


# -------------------------------------------------------------------------------------------------------- commands


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of DiffusionModel.generate, from the flags that were given."""
    return _given(args, "max_tokens", "seed", "stop") | sampling_options(args)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same for what every denoising takes."""
    limit = {} if args.time_limit is None else {"time_limit_s": args.time_limit}
    return _given(args, *(name for name, _, _ in SAMPLING)) | limit


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def open_model(args: argparse.Namespace) -> Any:
    """The DiffusionModel that the arguments name."""
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
        "rpc": args.rpc,
        "type_kv": args.type_kv,
        "verbose": args.verbose or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return DiffusionModel(resolve_model(args.model), **given)


def _generate(args: argparse.Namespace) -> int:
    from pydiffgguf.talk import generate_once

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
            options=generation_options(args),
        )


def _read_prompt(path: str | None) -> str:
    """The text of a file, or of stdin, without one last newline."""
    from pydiffgguf.document import decode, read_bytes

    return decode(*read_bytes(path or "-")).removesuffix("\n").removesuffix("\r")


def _infill(args: argparse.Namespace) -> int:
    from pydiffgguf.document import Document
    from pydiffgguf.talk import fill_template, infill_once

    _check_infill(args)
    options = _given(args, "min_gap", "max_gap", "mode", "seed") | sampling_options(args)
    if args.no_heal:
        options["heal"] = False
    output = {"as_json": args.json, "live": not args.no_live}
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
                offset = document.offset(args.at)
            except ValueError as error:
                args.command.error(f"--at: {error}")
            parts = (document.text[:offset], document.text[offset:])
        else:
            parts = (Document(args.prefix_file).text, Document(args.suffix_file).text)
    if args.extra:
        options["extra"] = [(path, Document(path).text) for path in args.extra]
    if parts is not None and not parts[1] and options.get("gap", "auto") == "auto":
        args.command.error("nothing stands behind the gap, so its length cannot be found: give --gap N")
    with open_model(args) as model:
        if parts is None:
            return fill_template(model, args.template, **output, options=options)
        insert = None if not args.in_place or document is None else functools.partial(document.insert, offset)
        return infill_once(model, *parts, **output, insert=insert, options=options)


def _check_infill(args: argparse.Namespace) -> None:
    """Leaves through SystemExit(2) unless the arguments name one gap, or one template, and what goes with it."""
    error = args.command.error
    forms = [
        args.file is not None or args.at is not None,
        args.prefix_file is not None or args.suffix_file is not None,
        args.template is not None,
    ]
    ways = "FILE --at LINE[:COL], --prefix-file F --suffix-file F, or --template TEXT"
    if sum(forms) != 1:
        error(f"{'there are too many places' if any(forms) else 'no place'} for a gap: give {ways}")
    if forms[0] and args.at is None:
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
        last = markers[-1]
        if last.gap == "auto" and last.end == len(args.template):
            args.command.error("the template ends with a gap, so its length cannot be found: write <gap len=N/>")
        return None, {}
    (marker,) = markers
    if marker.gap != "auto" and args.gap is not None:
        args.command.error(f"the template says that its gap has {marker.gap} tokens: leave out --gap")
    gap = args.gap if marker.gap == "auto" and args.gap is not None else marker.gap
    bounds = {"gap": gap, "min_gap": marker.min_gap, "max_gap": marker.max_gap}
    return (literal(args.template[: marker.start]), literal(args.template[marker.end :])), bounds | _given(args, "n")


def _chat(args: argparse.Namespace) -> int:
    from pydiffgguf.talk import Chat

    with open_model(args) as model:
        options = generation_options(args)
        return Chat(model, args.system, thinking=args.thinking, live=not args.no_live, options=options).run()


def _convert(args: argparse.Namespace) -> int:
    from pydiffgguf.convert import convert
    from pydiffgguf.convert.output import human
    from pydiffgguf.hub import resolve_source
    from pydiffgguf.terminal import conversion_progress

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


def _imatrix(args: argparse.Namespace) -> int:
    from pydiffgguf.convert import collect
    from pydiffgguf.document import Document
    from pydiffgguf.terminal import chunk_progress

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


def _inspect(args: argparse.Namespace) -> int:
    from pydiffgguf.convert import fit
    from pydiffgguf.convert.inspect import inspect_file
    from pydiffgguf.convert.report import render, to_dict
    from pydiffgguf.hub import resolve_model

    if (args.file is None) == (args.diff is None):
        args.command.error("give one FILE, or two files behind --diff")
    if args.diff is not None:
        return _inspect_diff(args)
    if args.data:
        args.command.error("--data goes with --diff")
    device = None if args.fit is None else fit.parse_size(args.fit)
    report = inspect_file(resolve_model(args.file), n_ctx=args.ctx, type_kv=args.type_kv or "f16")
    plan = None if device is None else fit.plan(report, device)
    if args.json:
        out = to_dict(report, tensors=args.tensors)
        _print_json(out if plan is None else {**out, "fit": plan.to_dict()})
    else:
        _print_rich(render(report, tensors=args.tensors))
        if plan is not None:
            _print_rich(fit.render(plan))
    return 0


def _inspect_diff(args: argparse.Namespace) -> int:
    from pydiffgguf.convert.diff import compare_files
    from pydiffgguf.convert.report import diff_to_dict, render_diff
    from pydiffgguf.hub import resolve_model

    if args.tensors or any(value is not None for value in (args.ctx, args.type_kv, args.fit)):
        args.command.error("--tensors, --ctx, --type-kv and --fit do not go with --diff")
    diff = compare_files(*(resolve_model(name) for name in args.diff), data=args.data)
    if args.json:
        _print_json(diff_to_dict(diff))
    else:
        _print_rich(render_diff(diff))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from pydiffgguf.bench import measure, table

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


def _doctor(args: argparse.Namespace) -> int:
    from pydiffgguf.doctor import examine, render

    report = examine()
    if args.json:
        _print_json(report)
    else:
        print(render(report))
    return 1 if report["problems"] else 0


def _rpc_server(args: argparse.Namespace) -> int:
    import signal

    from pydiffgguf._native import serve_rpc
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


def _demo(args: argparse.Namespace) -> int:
    from pydiffgguf.demo import run_demo

    return run_demo(live=not args.no_live)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False))


def _print_rich(value: Any) -> None:
    from rich.console import Console

    # Without a terminal there is no width to keep to, and a cell that is cut in two cannot be searched for.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(value)
