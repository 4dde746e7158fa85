"""The command ``pydiffgguf``: what its arguments are, and how it fails. What it then does is in commands.py.

Exit codes: 0; 1 the operation failed, and one line on stderr says why; 2 bad usage; 130 interrupted. What is slow to
import is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from pydiffgguf.cli import commands, serve
from pydiffgguf.cli.commands import SAMPLING
from pydiffgguf.cli.parser import (
    Parser,
    adapter,
    at_least,
    flag,
    flag_of_option,
    gap,
    gpu_layers,
    numbers,
    position,
    words,
)
from pydiffgguf.cli.version import version

__all__ = ["MODEL_HELP", "add_model_options", "main"]

DESCRIPTION = (
    "DiffusionGemma from GGUF files, in your own process: convert, generate, chat, and watch the canvas denoise."
)
MODEL_HELP = (
    "a GGUF file, demo, or hf:OWNER/REPO[@REVISION][:PATTERN] such as hf:unsloth/diffusiongemma-26B-A4B-it-GGUF:Q4_K_M"
)


Run: TypeAlias = Callable[[argparse.Namespace], int]
Fill: TypeAlias = Callable[[Parser], None]

#: In the order of --help: name, summary, what runs it, examples, and what adds its arguments.
_COMMANDS: list[tuple[str, str, Run, tuple[str, ...], Fill]] = []


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
    except Exception as error:
        if _is_broken_pipe(error):
            # The reader has gone; Python would complain once more when it flushes at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        text = _one_line(error)
        # A value that the library refuses is bad usage, and is told by the flag that was typed.
        usage = flag_of_option(text, args.command.flags()) if type(error) in (ValueError, TypeError) else None
        if args.debug:
            traceback.print_exc()
        else:
            print(f"pydiffgguf: error: {usage or text}", file=sys.stderr)
        return 1 if usage is None else 2


def _is_broken_pipe(error: Exception) -> bool:
    """Windows has no error of its own for it: writing is then an invalid argument, of no file by name."""
    if os.name == "nt" and isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None:
        return True
    return isinstance(error, BrokenPipeError)


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


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that takes a third of a start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())
        parser.exit()


def _parser() -> Parser:
    parser = Parser(prog="pydiffgguf", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the package's version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary, run, examples, fill in _COMMANDS:
        sub: Parser = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            fill=fill,
        )
        sub.set_defaults(run=run, command=sub)
    return parser


def _command(name: str, summary: str, run: Run, *examples: str) -> Callable[[Fill], Fill]:
    """Makes a function that adds a command's arguments into that command."""

    def add(fill: Fill) -> Fill:
        _COMMANDS.append((name, summary, run, examples, fill))
        return fill

    return add


@_command(
    "demo",
    "run the bundled demo model; needs no network and no arguments",
    commands.demo,
    "pydiffgguf demo",
)
def _demo(sub: Parser) -> None:
    sub.add_argument("--no-live", action="store_true", help="print the results only")


@_command(
    "generate",
    "text from a prompt",
    commands.generate,
    'pydiffgguf generate model.gguf -p "Why is the sky blue?"',
    "pydiffgguf generate model.gguf -f question.txt -n 1024 --seed 7 > answer.txt",
    "echo 'Once upon a time' | pydiffgguf generate model.gguf --raw --json",
)
def _generate(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    where = sub.add_mutually_exclusive_group()
    where.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; without -p and -f it is read from stdin")
    where.add_argument(
        "-f", "--file", metavar="FILE", help="read the prompt from a UTF-8 file, without its last newline"
    )
    sub.add_argument("--raw", action="store_true", help="plain text: do not put the prompt through the chat template")
    sub.add_argument("--thinking", action="store_true", help="let the model write down its thoughts first")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE|TEXT", help="the answer is JSON of this schema")
    form.add_argument("--regex", metavar="EXPRESSION", help="the answer is a whole match, in Rust's syntax")
    form.add_argument("--grammar", metavar="FILE", help="the answer obeys this grammar, in Lark's notation")
    form.add_argument("--choice", action="append", metavar="TEXT", help="the answer is this, or another --choice")
    sub.add_argument("--json", action="store_true", help="print one object: text, tokens, steps, seconds, ...")
    sub.add_argument("--json-lines", action="store_true", help="print an object a line for each event, then the result")
    sub.add_argument("--no-live", action="store_true", help="do not draw the canvas, print finished text only")
    _add_generation(sub)
    add_model_options(sub)


@_command(
    "infill",
    "fill a gap in a text: write what is missing between the text before it and the text behind it",
    commands.infill,
    "pydiffgguf infill model.gguf main.py --at 12:5",
    "pydiffgguf infill model.gguf main.py --at 12 --gap 20 --in-place",
    "pydiffgguf infill model.gguf --prefix-file before.txt --suffix-file behind.txt -n 3 --json",
    'pydiffgguf infill model.gguf --template "The quick <gap/> fox jumps over the <gap len=2/> dog."',
    "pydiffgguf infill --stdio model.gguf",
)
def _infill(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = sub.add_argument_group("where the gap is", "One of the three. Files must be UTF-8; - reads standard input.")
    group.add_argument("file", metavar="FILE", nargs="?", help="a text file; with --at")
    group.add_argument(
        "--at", type=position, metavar="LINE[:COL]", help="counted from 1, in characters; no COL: the line's end"
    )
    group.add_argument(
        "--at-offset",
        type=at_least(0),
        metavar="N",
        help="in the place of --at: what is before the gap, counted from 0",
    )
    group.add_argument("--unit", choices=("characters", "utf-8", "utf-16"), help="what --at-offset counts (characters)")
    group.add_argument("--prefix-file", metavar="F", help="the text before the gap, all of it")
    group.add_argument("--suffix-file", metavar="F", help="the text behind the gap")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="text with gaps: <gap/>, <gap max=8/>, <gap min=2 max=8/>, <gap len=3/> (<\\gap/> is the text <gap/>); "
        "several gaps are printed one on a line, as JSON strings",
    )
    group = sub.add_argument_group("the gap")
    group.add_argument("--gap", type=gap, metavar="N|auto", help="length of the gap in tokens (auto: find it)")
    group.add_argument("--min-gap", type=at_least(0), metavar="N", help="shortest gap that auto tries (0)")
    group.add_argument("--max-gap", type=at_least(1), metavar="N", help="longest gap that auto tries (128)")
    group.add_argument(
        "--until",
        choices=("line", "block", "end"),
        help="at the end of a text: stop with the line, with the block of lines, or where the model ends it (end)",
    )
    group.add_argument("--mode", choices=("auto", "raw", "chat"), help="a document, or a request in the chat template")
    group.add_argument("--no-heal", action="store_true", help="do not complete a half-typed word before the gap")
    group.add_argument(
        "--extra", action="append", metavar="FILE", help="another file that the model should know; repeatable"
    )
    group.add_argument("-n", type=at_least(1), metavar="N", help="number of alternatives to return with --json (1)")
    group.add_argument("--seed", type=int, metavar="N", help="random seed (0)")
    sub.add_argument(
        "--in-place",
        action="store_true",
        help="write the text into FILE, which must be a writable file without other hard links; stdout gets it only if "
        "writing fails",
    )
    sub.add_argument("--json", action="store_true", help="print one object: text, gap_tokens, score, candidates, ...")
    sub.add_argument("--json-lines", action="store_true", help="print an object a line for each event, then the result")
    sub.add_argument(
        "--stdio",
        action="store_true",
        help="stay, and fill the gaps that come as JSON lines on stdin; for editors (docs/INFILL.md)",
    )
    sub.add_argument("--no-live", action="store_true", help="do not draw the canvas, print finished text only")
    _add_sampling(sub)
    add_model_options(sub)


@_command(
    "chat",
    "talk to a model",
    commands.chat,
    "pydiffgguf chat model.gguf",
    'pydiffgguf chat model.gguf --system "Answer in French." --thinking',
)
def _chat(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--system", metavar="TEXT", help="the system turn")
    sub.add_argument("--thinking", action="store_true", help="let the model write down its thoughts first")
    sub.add_argument("--no-live", action="store_true", help="do not draw the canvas, print finished text only")
    _add_generation(sub)
    add_model_options(sub)


@_command(
    "serve",
    "answer programs over HTTP, as the servers of OpenAI and llama.cpp do, and show a page in the browser",
    serve.run,
    "pydiffgguf serve model.gguf",
    "pydiffgguf serve demo --port 8012",
    "PYDIFFGGUF_API_KEY=secret pydiffgguf serve model.gguf --host 0.0.0.0 --allowed-host desk.lan",
)
def _serve(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    serve.add_arguments(sub)
    add_model_options(sub)


@_command(
    "convert",
    "make a GGUF file from a checkpoint or an adapter, or give a GGUF file other types",
    commands.convert,
    "pydiffgguf convert diffusiongemma-26B-A4B-it -o model.gguf",
    "pydiffgguf convert hf:google/diffusiongemma-26B-A4B-it -o model.gguf --type dg4",
    "pydiffgguf convert model-bf16.gguf -o small.gguf --type q4_k_m --imatrix imatrix.gguf",
    "pydiffgguf convert my-lora/ -o my-lora.gguf",
    "pydiffgguf convert model-bf16.gguf -o mine.gguf --type q4_k_m --tensor-type 'ffn_.*_exps=iq4_nl'",
)
def _convert(sub: Parser) -> None:
    sub.add_argument(
        "source",
        metavar="SRC",
        help="a folder with config.json and safetensors, or hf:OWNER/REPO; a GGUF file, or hf:OWNER/REPO:PATTERN; the "
        "folder of a PEFT adapter",
    )
    sub.add_argument(
        "-o",
        "--out",
        metavar="OUT.gguf",
        required=True,
        help="the file to write; it gets this name when it is complete",
    )
    sub.add_argument(
        "--type",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0 (default), q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, iq4_nl, iq4_xs, q3_k_m, q2_k "
        "or mxfp4, tensor by tensor what llama.cpp gives; dg4, 4.6 bits a weight, is made for this model; of an "
        "adapter f32, f16, bf16 or q8_0 (as it is stored)",
    )
    sub.add_argument(
        "--region",
        choices=("decoder", "encoder", "both"),
        help="for an adapter: use one set alone, or say where its only set acts",
    )
    sub.add_argument("--base", metavar="MODEL", help="for an adapter: a GGUF model of the kind that it was trained on")
    sub.add_argument(
        "--tensor-type",
        action="append",
        metavar="PATTERN=TYPE",
        help="the type of all tensors whose name matches a regular expression; repeatable, the first match counts",
    )
    sub.add_argument(
        "--imatrix", metavar="F", help="an importance matrix, made by pydiffgguf imatrix or by llama.cpp (as GGUF)"
    )
    sub.add_argument("--threads", type=at_least(1), metavar="N", help="number of cores to quantize on (all)")
    sub.add_argument(
        "--name", metavar="NAME", help="general.name in the file; the folder's name, or the GGUF's, if not given"
    )
    sub.add_argument(
        "--allow-missing-tokenizer", action="store_true", help="convert a folder that has no tokenizer.json"
    )


@_command(
    "imatrix",
    "learn from a text which weights matter, so that convert can spend bits where they help",
    commands.imatrix,
    "pydiffgguf imatrix model-bf16.gguf -f text.txt -o imatrix.gguf",
    "pydiffgguf convert model-bf16.gguf -o small.gguf --type dg4 --imatrix imatrix.gguf",
)
def _imatrix(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument(
        "-f", "--file", metavar="FILE", required=True, help="UTF-8 text like what the model will write; - is stdin"
    )
    sub.add_argument("-o", "--out", metavar="OUT.gguf", required=True, help="in llama.cpp's imatrix GGUF format")
    sub.add_argument("--chunks", type=at_least(1), metavar="N", help="use at most this many chunks of the text (all)")
    sub.add_argument("--seed", type=int, metavar="N", default=0, help="random seed of the canvases (0)")
    add_model_options(sub)


@_command(
    "inspect",
    "show what a GGUF file holds, how much memory it needs and what it lacks; or how two files differ",
    commands.inspect,
    "pydiffgguf inspect model.gguf",
    "pydiffgguf inspect model.gguf --tensors --json",
    "pydiffgguf inspect model.gguf --fit 16GB --ctx 32768",
    "pydiffgguf inspect --diff a.gguf b.gguf --data",
    "pydiffgguf inspect my-lora/ --base model.gguf",
)
def _inspect(sub: Parser) -> None:
    sub.add_argument("file", metavar="FILE", nargs="?", help=f"{MODEL_HELP}; an adapter's folder or file")
    sub.add_argument("--base", metavar="MODEL", help="for an adapter: say what in it does not fit this model")
    sub.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare the keys and tensors of two files")
    sub.add_argument("--data", action="store_true", help="with --diff: compare the weights too, byte for byte")
    sub.add_argument("--tensors", action="store_true", help="list every tensor")
    sub.add_argument("--json", action="store_true", help="print one object")
    sub.add_argument("--ctx", type=int, metavar="N", help="calculate memory for a context of N tokens")
    sub.add_argument("--type-kv", metavar="TYPE", help="calculate memory for a cache of this type (f16)")
    sub.add_argument(
        "--fit",
        metavar="SIZE",
        help="show what goes onto a device with this much free memory, and what does not (GB: 10^9 bytes, GiB: 2^30); "
        "RAM: whether it fits into this machine's memory",
    )
    sub.add_argument("--signal-copy", action="store_true", help="with --fit: make room for what the option takes")
    sub.add_argument(
        "--lora",
        action="append",
        type=adapter,
        metavar="PATH",
        help="with --fit: make room for this adapter, too; repeatable",
    )


@_command(
    "rpc-server",
    "offer this machine's GPUs, or its CPU, to models on other machines",
    commands.rpc_server,
    "pydiffgguf rpc-server --port 50052",
    "pydiffgguf generate model.gguf --rpc 127.0.0.1:50052 -p Hello",
)
def _rpc_server(sub: Parser) -> None:
    sub.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="where to listen (127.0.0.1); there is no password, so never listen where strangers can reach it",
    )
    sub.add_argument("--port", type=at_least(1), metavar="P", default=50052, help="(50052)")
    sub.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (as many as there are)")


@_command(
    "bench",
    "measure prefill and denoise step times, steps per canvas, tokens per second, peak memory",
    commands.bench,
    "pydiffgguf bench model.gguf",
    "pydiffgguf bench model.gguf --prefill 2048 --repeat 9 --threads 4 --json",
    "pydiffgguf bench model.gguf --compare transformers diffusiongemma-26B-A4B-it",
)
def _bench(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--prefill", type=int, metavar="N", default=512, help="tokens of the prompt to encode (512)")
    sub.add_argument("--repeat", type=int, metavar="N", default=5, help="number of runs; times are their medians (5)")
    sub.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt of the generation that is timed")
    sub.add_argument(
        "--compare",
        nargs=2,
        metavar=("transformers", "CKPT"),
        help="time a checkpoint folder in transformers, float32, in turns with the model; needs torch and transformers",
    )
    sub.add_argument("--json", action="store_true", help="print one object")
    _add_generation(sub)
    add_model_options(sub)


@_command(
    "doctor",
    "check the installation; exit code 1, and the cure, when something is off",
    commands.doctor,
    "pydiffgguf doctor",
    "pydiffgguf doctor --json",
)
def _doctor(sub: Parser) -> None:
    sub.add_argument("--json", action="store_true", help="print one object")


def _add_generation(sub: Any) -> None:
    sub.add_argument("-n", "--max-tokens", "--n-predict", type=int, metavar="N", help="longest result in tokens (256)")
    sub.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (else a fresh one)")
    group = _add_sampling(sub)
    group.add_argument(
        "--canvas-length",
        type=int,
        metavar="N",
        help="tokens that are denoised at once: fewer are faster for short answers, but the model was not trained so",
    )
    group.add_argument(
        "--narrow",
        action="store_true",
        default=None,
        help="leave out rows behind the answer's end, except 8, once that has stayed for two steps: faster, but the "
        "model was not trained so",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")


def _add_sampling(sub: Any) -> Any:
    group = sub.add_argument_group("sampling", "What is not given comes from the file, then from the released model.")
    for name, kind, text in SAMPLING:
        group.add_argument(flag(name), type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument(
        "--time-limit", type=float, metavar="S", help="stop after this many seconds and return the best so far"
    )
    return group


def add_model_options(sub: Any) -> None:
    """The options of every command that opens a model; commands.open_model takes them."""
    group = sub.add_argument_group("model")
    group.add_argument(
        "-c",
        "--ctx",
        "--ctx-size",
        type=int,
        metavar="N",
        help="positions for prompt, text and canvas (8192, or the file's if less)",
    )
    group.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (as many as there are)")
    group.add_argument(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        type=gpu_layers,
        metavar="N|auto|all",
        help="layers on devices (auto: as many as fit)",
    )
    group.add_argument(
        "--cpu-moe", type=at_least(0), metavar="N", help="keep the experts of the first N layers on the CPU"
    )
    group.add_argument(
        "--tensor-split",
        type=numbers,
        metavar="X,Y",
        help="each device's share of the layers (in proportion to free memory)",
    )
    group.add_argument("--main-gpu", type=at_least(0), metavar="I", help="the device with the head (the last)")
    group.add_argument("--no-offload-kv", action="store_true", help="keep the cache, and attention, on the CPU")
    group.add_argument(
        "--signal-copy",
        action="store_true",
        default=None,
        help="hold the embedding twice on the main device, for steps that move less (docs/DEVICES.md)",
    )
    group.add_argument(
        "--rpc",
        type=words,
        metavar="HOST:PORT,..",
        help="use the devices of other machines that run pydiffgguf rpc-server",
    )
    group.add_argument("--sampler", metavar="KIND", help="host, operators or kernels (auto: by the main device)")
    group.add_argument("--type-kv", metavar="TYPE", help="type of the cache: f16 (default), f32, bf16, q8_0")
    group.add_argument(
        "--cpu", metavar="LEVEL", help="level of CPU instructions, by a name that doctor lists (the best)"
    )
    group.add_argument(
        "--lora",
        action="append",
        type=adapter,
        metavar="PATH[:SCALE]",
        help="run this adapter beside the weights: a PEFT folder, a GGUF file, or hf:OWNER/REPO; repeatable",
    )
    group.add_argument(
        "--verbose", action="store_true", help="say on stderr what was opened and how much memory it takes"
    )
