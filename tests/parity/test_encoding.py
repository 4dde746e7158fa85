"""The prefix: chunks, canvases behind it, cutting it and growing it again must not change what a canvas sees.

Nothing is sampled here, so the places are those that differ in where the model lies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from nets import Net, Report, relative_error
from once import once
from places import DEVICES, Place
from reference import Ids, reference_logits

from pydiffgguf import DiffusionModel
from pydiffgguf.errors import UnsupportedError
from pydiffgguf.session import Session

pytestmark = [pytest.mark.parity, pytest.mark.parametrize("place", DEVICES, indirect=True, scope="session")]

# (net, window, prompt): the window lies below every chunk, between them, or above all but the whole prompt.
PROMPTS = [("one_kv_head", 8, 90), ("full_first", 33, 121), ("long_canvas", 5, 75), ("released_heads", 300, 340)]

# A cache in half precision rounds K and V before anything reads them, in chunks and in one pass alike; where a chunk's
# matrix products sum in another order, an element falls to the other side of a rounding boundary and moves by 2^-11.
# Measured 1e-6 to 4e-6 on the CPU and 8e-6 to 1.3e-5 on a server, whose products also round the other factor to half
# precision; the step from an F32 cache to an F16 one costs 3e-4 to 4e-4, and 1e-2 where it makes one row of a canvas
# choose another expert.
CHUNKED_F16 = 2e-4


def opened(place: Place, net: Net, n_batch: int = 512, type_kv: str = "f32") -> DiffusionModel:
    return place.open(net.gguf(), type_kv=type_kv, n_batch=n_batch, n_ctx=1024, n_threads=1)


def logits_behind(session: Session, net: Net) -> npt.NDArray[np.float32]:
    """The logits of one canvas, always the same ids, behind the session's prefix."""
    return session.denoise(net.ids(5, net.canvas_length))


@once
def _reference(net: Net, prompt: tuple[int, ...], finished: tuple[int, ...] | None) -> npt.NDArray[np.float32]:
    return reference_logits(net.model, prompt, net.ids(5, net.canvas_length), prompt2=finished)


def reference_behind(net: Net, prompt: Ids, finished: Ids | None = None) -> npt.NDArray[np.float32]:
    """The same canvas's logits by transformers, behind a prompt and a finished canvas; once for all places."""
    return _reference(net, tuple(prompt.tolist()), None if finished is None else tuple(finished.tolist()))


def check_same(place: Place, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> None:
    assert relative_error(a, b) <= place.tolerance
    assert np.array_equal(a.argmax(-1), b.argmax(-1))


@pytest.mark.parametrize("n_batch", [7, 32, 512])
@pytest.mark.parametrize(("name", "window", "length"), PROMPTS)
def test_chunked_encoding_gives_what_one_pass_gives(
    net: Callable[[str], Net], place: Place, name: str, window: int, length: int, n_batch: int
) -> None:
    """Against transformers, which encodes in one pass: chunks smaller and larger than the window, and one chunk."""
    assert net(name).window == window
    prompt = net(name).ids(1, length)
    with opened(place, net(name), n_batch) as model:
        session = model.session()
        session.encode(prompt)
        assert session.n_past == length
        got = logits_behind(session, net(name))
    check_same(place, got, reference_behind(net(name), prompt))


@pytest.mark.parametrize(("name", "window", "length"), PROMPTS[:3])
def test_chunked_encoding_into_a_half_precision_cache(
    net: Callable[[str], Net], place: Place, name: str, window: int, length: int, report: Report
) -> None:
    """Chunks of 7 against one chunk, both with an F16 cache; and what that cache costs against F32."""
    prompt = net(name).ids(1, length)
    logits = {}
    for n_batch, type_kv in [(7, "f16"), (512, "f16"), (512, "f32")]:
        with opened(place, net(name), n_batch, type_kv) as model:
            session = model.session()
            session.encode(prompt)
            logits[n_batch, type_kv] = logits_behind(session, net(name))
    chunked = relative_error(logits[7, "f16"], logits[512, "f16"])
    cost = relative_error(logits[512, "f16"], logits[512, "f32"])
    report(f"F16 cache, {name}: chunks of 7 against one chunk {chunked:.1e}; against an F32 cache {cost:.1e}")
    assert chunked <= CHUNKED_F16


# The cache's rounding of K and V (2^-12 of an element for F16, 2^-9 for BF16, 1/254 of a block's greatest for Q8_0)
# grows on its way through a random net, where some tokens choose another expert. Measured over eight prompts:
# F16 3e-4 to 5e-3, BF16 3e-3 to 1.1e-2, Q8_0 1e-2 to 3e-2. On a server, where products round the queries as well, the
# prompt of this test gives 4.6e-4, 1.7e-2 and 1.3e-2.
CACHES = {"f16": 5e-3, "bf16": 3e-2, "q8_0": 6e-2}


@pytest.mark.parametrize("type_kv", CACHES)
def test_smaller_caches_cost_their_rounding(
    net: Callable[[str], Net], place: Place, type_kv: str, report: Report
) -> None:
    """Against transformers in float32, chunked, beyond the window."""
    n = net("many_experts")
    prompt = n.ids(1, 60)
    with opened(place, n, 16, type_kv) as model:
        session = model.session()
        session.encode(prompt)
        got = logits_behind(session, n)
    expected = reference_behind(n, prompt)
    rows = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    report(f"{type_kv.upper()} cache: relative error of a row {np.median(rows):.1e} (median)")
    assert np.median(rows) <= CACHES[type_kv]


def test_a_cache_type_that_does_not_divide_the_heads_is_unsupported(net: Callable[[str], Net], place: Place) -> None:
    """Q8_0 has blocks of 32; heads of 24 do not fit, and nothing falls back in silence."""
    with pytest.raises(UnsupportedError, match="q8_0"):
        opened(place, net("one_kv_head"), type_kv="q8_0").session()


@pytest.mark.parametrize("name", ["one_kv_head", "full_first", "long_canvas"])
def test_prefix_grown_in_calls_of_any_size_equals_the_reference(
    net: Callable[[str], Net], place: Place, name: str
) -> None:
    """Single tokens, a few, many: n_past is right after every call, and the logits are those of one prompt."""
    n = net(name)
    prompt = n.ids(2, 111)
    with opened(place, n, n_batch=16) as model:
        session = model.session()
        assert session.n_past == 0
        for start, end in [(0, 1), (1, 2), (2, 5), (5, 21), (21, 38), (38, 39), (39, 108), (108, 111)]:
            session.encode(prompt[start:end])
            assert session.n_past == end
            assert np.array_equal(session.tokens(), prompt[:end])
            if end in (1, 5, 38, 111):
                got = logits_behind(session, n)
                assert session.n_past == end
                check_same(place, got, reference_behind(n, prompt[:end]))


@pytest.mark.parametrize("n_batch", [7, 512])
@pytest.mark.parametrize("name", ["one_kv_head", "full_first", "long_canvas", "many_experts"])
def test_second_canvas_sees_the_first_as_the_reference_does(
    net: Callable[[str], Net], place: Place, name: str, n_batch: int
) -> None:
    """A finished canvas, encoded behind the prompt, then one more canvas: the two-canvas path of `generate()`."""
    n = net(name)
    prompt, finished = n.ids(3, 44), n.ids(4, n.canvas_length)
    with opened(place, n, n_batch) as model:
        session = model.session()
        session.encode(prompt)
        logits_behind(session, n)  # a denoise pass in between leaves nothing behind
        session.encode(finished)
        assert session.n_past == 44 + n.canvas_length
        got = logits_behind(session, n)
    check_same(place, got, reference_behind(n, prompt, finished))


@pytest.mark.parametrize("n_batch", [7, 64])
@pytest.mark.parametrize("name", ["one_kv_head", "full_first", "long_canvas"])
def test_truncating_and_encoding_again_gives_the_same_logits(
    net: Callable[[str], Net], place: Place, name: str, n_batch: int
) -> None:
    """Cut by one token, within the window, far behind it, and to none, after the sliding layers' rings have wrapped.
    Beside the CPU three of the five cuts are made."""
    n = net(name)
    length = n.window + max(n_batch, n.canvas_length) + 40  # a ring holds the window and the longest pass
    prompt = n.ids(6, length)
    with opened(place, n, n_batch) as model:
        session = model.session()
        session.encode(prompt)
        whole = logits_behind(session, n)
        for keep in place.some((length - 1, length - n.window, 31, 3, 0), 3):
            session.truncate(keep)
            assert session.n_past == keep
            assert np.array_equal(session.tokens(), prompt[:keep])
            if keep:
                check_same(place, logits_behind(session, n), reference_behind(n, prompt[:keep]))
            session.encode(prompt[keep:])
            assert session.n_past == length
            check_same(place, logits_behind(session, n), whole)


def test_another_tail_after_truncating_leaves_no_trace_of_the_first(net: Callable[[str], Net], place: Place) -> None:
    """The next turn of a chat: a common head, then other tokens, in a cache that has held more."""
    n = net("full_first")
    head, first, second = n.ids(7, 50), n.ids(8, 90), n.ids(9, 31)
    with opened(place, n, n_batch=32) as model:
        session = model.session()
        for tail in (first, second, first[:2], second):
            session.encode(head)
            session.encode(tail)
            check_same(place, logits_behind(session, n), reference_behind(n, np.concatenate([head, tail])))
            session.truncate(50)
            session.reset()
            assert session.n_past == 0
