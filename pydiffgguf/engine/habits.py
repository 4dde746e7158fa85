"""What people who come from other libraries write, and what it is called here: looked up only for an error message."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = ["hint"]

#: Names of other libraries, and the options that mean the same: the first that the call has.
_SAME: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "max_tokens max_new_tokens n_predict num_predict max_length max_output_tokens max_completion_tokens",
        ("max_tokens", "max_gap"),
    ),
    ("num_steps n_steps num_inference_steps diffusion_steps steps_per_block denoising_steps", ("steps",)),
    ("timeout time_limit max_time", ("time_limit_s",)),
    ("stop_sequences stop_strings stop_words stops", ("stop",)),
    ("random_seed random_state", ("seed",)),
    ("type_k type_v cache_type_k cache_type_v kv_type", ("type_kv",)),
    ("n_threads_batch threads num_threads", ("n_threads",)),
    ("ctx_size max_seq_len context_length", ("n_ctx",)),
    ("device device_map gpu_layers n_gpu", ("n_gpu_layers",)),
    ("mmap", ("use_mmap",)),
    ("middle_tokens gap_tokens length", ("gap",)),
    ("num_return_sequences best_of n_candidates", ("n",)),
    ("enable_thinking reasoning reasoning_effort", ("thinking",)),
)

_TEMPERATURE = "the temperature falls from t_max to t_min over the steps: set these two"
_CUT = "this sampler draws from the whole distribution, and entropy_bound says how uncertain a token may be"
_EVENTS = "call stream(), stream_chat(), stream_infill() or stream_fill() and iterate over it"

#: Another library's name -> what to do instead, where no option means the same.
_INSTEAD = {
    **dict.fromkeys(("temperature", "temp"), _TEMPERATURE),
    **dict.fromkeys(("top_p", "top_k", "min_p", "typical_p", "do_sample", "greedy", "num_beams"), _CUT),
    **dict.fromkeys(
        ("repeat_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        "all tokens of a canvas are written at once, so there is no penalty for what came before",
    ),
    **dict.fromkeys(("stream", "callback", "on_step", "streamer", "step_callback"), _EVENTS),
    **dict.fromkeys(("system", "system_prompt"), 'call chat() with a first message {"role": "system", "content": ...}'),
    "messages": "call chat(messages)",
    "thinking": "call chat(messages, thinking=True)",
    "suffix": "call infill(prefix, suffix)",
    "prompt": "the prompt is the first argument",
    **dict.fromkeys(("model_path", "model", "filename"), "the path is the first argument, and has no name"),
    **dict.fromkeys(("chat_format", "chat_template"), "the file's own chat template is used"),
    **dict.fromkeys(("use_mlock", "flash_attn", "offload_kqv", "n_ubatch"), "there is nothing to set: leave it out"),
    **dict.fromkeys(("lora_path", "lora_scale"), "call load_lora(path, scale=...)"),
}
#: What some libraries' constructors take.
_OF_CALLS = ("seed", "max_tokens", "stop", "steps")


def hint(name: str, known: Sequence[str]) -> str:
    """What to write in place of an unknown option, for the end of a message; "" where nobody can know.

    Args:
        known: the options of the call.
    """
    for names, options in _SAME:
        for option in options:
            if name in names.split() and option in known:
                return f"it is called {option} here"
    if name in _OF_CALLS and "n_ctx" in known:
        return "give it to each call, such as generate()"
    if name in _INSTEAD:
        return _INSTEAD[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else ""
