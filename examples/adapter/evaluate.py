"""How many held-out items an adapter answers right: python examples/adapter/evaluate.py my-lora [--peft]

With --peft the same items, with the same draws, through PEFT on transformers, in float32 on both sides: the texts must
be equal. Without it the model is the demo model as it is, quantized.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from task import Question, held_out, prompt_of

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.convert import convert

N_TASK, N_OTHER = 50, 30


def right(questions: list[Question], answer: Callable[[str], str]) -> int:
    return sum(answer(q.prompt) == q.answer for q in questions)


def table(answer_bare: Callable[[str], str], answer_adapted: Callable[[str], str], what: str) -> None:
    """Prints how many of both kinds of items are answered right, without and with the adapter."""
    task, others = held_out(N_TASK, N_OTHER)
    for name, questions in (("descending order", task), ("other questions", others)):
        bare, adapted = (right(questions, answer) for answer in (answer_bare, answer_adapted))
        print(f"{what}, {name}: {bare} of {len(questions)} bare, {adapted} of {len(questions)} adapted", flush=True)


def by_peft(model: DiffusionModel, path: Path, folder: Path) -> None:
    """Both engines on the same weights in float32, with the same draws, item by item."""
    import numpy as np
    from peft import PeftModel
    from rebuild import model_from_gguf
    from reference import HandedNoise, Sampling, reference_generate

    net = PeftModel.from_pretrained(model_from_gguf(path), folder).eval().base_model.model
    file = model.sampling
    sampling = Sampling(
        file.steps, file.t_min, file.t_max, file.entropy_bound, file.stability_threshold, file.confidence_threshold
    )
    task, others = held_out(N_TASK, N_OTHER)
    equal, ours, theirs = 0, 0, 0
    for i, q in enumerate([*task, *others]):
        noise = HandedNoise(i, model.config.canvas_length, model.config.n_vocab)
        ids = model.tokenize(prompt_of(q.prompt))
        text = model.generate(ids, noise=noise).text
        [canvas] = reference_generate(net, ids, noise, 1, sampling)
        tokens = canvas.tokens.tolist()
        end = next((j for j, token in enumerate(tokens) if token in model.tokenizer.end_ids), len(tokens))
        reference = model.detokenize(np.array(tokens[:end]).tolist())
        equal += reference == text
        ours += i < len(task) and text == q.answer
        theirs += i < len(task) and reference == q.answer
    print(f"descending order: {ours} of {len(task)} here, {theirs} of {len(task)} through PEFT")
    print(f"texts of both engines equal: {equal} of {len(task) + len(others)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--peft", action="store_true")
    args = parser.parse_args()
    if args.peft:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demo.f32.gguf"
            convert(demo_model_path(), path, type="f32")
            with DiffusionModel(path, type_kv="f32", lora=[args.adapter]) as model:
                by_peft(model, path, args.adapter)
        return 0
    with DiffusionModel(demo_model_path(), lora=[args.adapter]) as model:

        def answer(prompt: str, **options: object) -> str:
            return model.generate(prompt, seed=1, max_tokens=64, **options).text  # type: ignore[arg-type]

        table(lambda prompt: answer(prompt, lora={}), answer, "demo model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
