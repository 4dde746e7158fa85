"""Train the demo model's tokenizer: byte-fallback BPE of the Gemma kind, plus its chat template.

    python make_tokenizer.py OUT_DIR [--vocab 896] [--seed 1]

Spaces are written as U+2581; there is no pre-split and no space prefix when text is encoded; unknown characters fall
back to <0xXX> tokens. The merges are learnt inside pieces that hold no newline, no digit and no punctuation beside
letters, so a digit, a Sudoku cell and a newline are one token each, and a text may be cut at any such joint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tasks import corpus
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Texts and, where a fixed id is given, ids as in Gemma 4.
FIXED = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool_response>": 50,
    "<|turn>": 105,
    "<turn|>": 106,
}
OTHER = [
    "<tool_response|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool>",
    "<tool|>",
    "<|think|>",
    "<|channel>",
    "<channel|>",
    '<|"|>',
    "<|image|>",
]
SPACE = "\u2581"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system=none, rest=messages) -%}
{%- if messages and messages[0]['role'] in ['system', 'developer'] -%}
    {%- set ns.system = messages[0]['content'] | trim -%}
    {%- set ns.rest = messages[1:] -%}
{%- endif -%}
{%- if ns.system is not none or (enable_thinking is defined and enable_thinking) -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if ns.system is not none -%}{{- ns.system -}}{%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in ns.rest -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if role == 'model' and '<channel|>' in message['content'] -%}
        {{- message['content'].split('<channel|>')[-1] | trim -}}
    {%- else -%}
        {{- message['content'] | trim -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def main() -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    ap = argparse.ArgumentParser()
    ap.add_argument("out", type=Path)
    ap.add_argument("--vocab", type=int, default=896)
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()

    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    alphabet = [SPACE, "\n", *(chr(c) for c in range(0x21, 0x7F))]
    reserved = len(FIXED) + len(OTHER) + len(byte_tokens)

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    # A piece: indentation, three quotes, a word or operator with at most one space before it, or one other character.
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex(f'{SPACE}{{4,}}|"""|{SPACE}?(?:[A-Za-z]+|[-+*/=<>]+)|[^A-Za-z]'), behavior="isolated"
    )
    learner.train_from_iterator(
        corpus(args.seed, 4000),
        trainers.BpeTrainer(
            vocab_size=args.vocab - reserved,
            initial_alphabet=alphabet,
            special_tokens=[],
            show_progress=False,
            min_frequency=2,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(m) for m in learnt["merges"]]
    pieces = sorted(learnt["vocab"], key=lambda p: learnt["vocab"][p])
    if len(pieces) + reserved > args.vocab:
        raise SystemExit("vocabulary too small for the alphabet")

    order = OTHER + byte_tokens + pieces
    unused = args.vocab - len(order) - len(FIXED)
    order += [f"<unused{i}>" for i in range(unused)]
    taken = {i: t for t, i in FIXED.items()}
    rest = iter(order)
    table = [taken[i] if i in taken else next(rest) for i in range(args.vocab)]
    vocab = {t: i for i, t in enumerate(table)}

    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", SPACE)
    tok.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B:1", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tok.add_special_tokens([*FIXED, *OTHER])
    assert tok.get_vocab_size() == args.vocab

    args.out.mkdir(parents=True, exist_ok=True)
    tok.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    print(json.dumps({"vocab": args.vocab, "merges": len(merges), "pieces": len(pieces), "unused": unused}))


if __name__ == "__main__":
    main()
