"""Which layers go onto devices: the policy, as a function of sizes, and the engine, which follows it to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from rpc_servers import Relay, rpc_server

from pydiffgguf import DiffusionModel
from pydiffgguf._binding.functions import plan_layers
from pydiffgguf._binding.records import LayerPlan, Needs
from pydiffgguf.convert.inspection.fit import plan, sum_tensors
from pydiffgguf.convert.inspection.inspect import inspect_file

RESERVE = 500_000_000
HERE, AWAY = "", "127.0.0.1:50052"

# Six layers, no two of a size.
LAYERS = [(11 + i, 101 + 3 * i) for i in range(6)]
NEEDS = Needs(n_ctx=100, n_rows=10, logits=30, sampling=7, passes=40, cache=(2, 3, 2, 3, 2, 4))
HEAD = 50
#: What the main device holds before the first layer; any other one holds less.
MAIN = RESERVE + 50 + 30 + 7 + 40
OTHER = RESERVE + 40


def taken(layers: Sequence[int], n_cpu_moe: int) -> int:
    """Bytes of these layers on a device."""
    return sum(LAYERS[i][0] + NEEDS.cache[i] + (LAYERS[i][1] if i >= n_cpu_moe else 0) for i in layers)


def on(p: LayerPlan, device: int | None) -> list[int]:
    return [i for i, where in enumerate(p.devices) if where == device]


def test_one_device_has_all_layers_before_an_expert() -> None:
    """With each byte more there is what fits, and not a layer's part more: first whole layers without their experts,
    then experts, both from the last one backwards."""
    dense = [MAIN + taken(range(i, 6), 6) for i in range(5, -1, -1)]
    experts = [MAIN + taken(range(6), m) for m in range(5, -1, -1)]
    steps = [(0, 6), *((n, 6) for n in range(1, 7)), *((6, m) for m in range(5, -1, -1))]
    for i, size in enumerate([*dense, *experts]):
        for free, expected in ((size - 1, steps[i]), (size, steps[i + 1])):
            p = plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)])
            assert (p.n_gpu_layers, p.n_cpu_moe) == expected
            assert p.devices == (None,) * (6 - p.n_gpu_layers) + (0,) * p.n_gpu_layers
            assert p.reserve == RESERVE


def test_a_number_of_experts_on_the_cpu_is_the_least() -> None:
    free = MAIN + taken(range(6), 2)
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)], n_cpu_moe=1).n_cpu_moe == 2
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)], n_cpu_moe=4).n_cpu_moe == 4
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)], n_cpu_moe=99).n_cpu_moe == 6


def test_a_cache_on_the_cpu_leaves_room() -> None:
    free = MAIN + taken(range(6), 0) - sum(NEEDS.cache)
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)], offload_kv=False).n_cpu_moe == 0
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)]).n_cpu_moe == 1


def test_adapters_take_room_with_their_layers() -> None:
    """The same for each layer: with a byte less than all of them need, something stays on the CPU."""
    free = MAIN + taken(range(6), 0)
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free + 600, HERE)], adapters=600).n_cpu_moe == 0
    assert plan_layers(LAYERS, HEAD, NEEDS, [(free + 599, HERE)], adapters=600).n_cpu_moe == 1
    without_experts = MAIN + taken(range(3, 6), 6)
    assert plan_layers(LAYERS, HEAD, NEEDS, [(without_experts + 300, HERE)], adapters=600).n_gpu_layers == 3
    assert plan_layers(LAYERS, HEAD, NEEDS, [(without_experts + 299, HERE)], adapters=600).n_gpu_layers == 2
    with pytest.raises(ValueError, match="adapters is -1"):
        plan_layers(LAYERS, HEAD, NEEDS, [(free, HERE)], adapters=-1)


def test_a_number_of_layers_is_done_as_asked_for() -> None:
    """Whatever fits; also with no device at all."""
    p = plan_layers(LAYERS, HEAD, NEEDS, [(1, HERE)], n_gpu_layers=4, n_cpu_moe=3)
    assert (p.n_gpu_layers, p.n_cpu_moe, p.devices) == (4, 3, (None, None, 0, 0, 0, 0))
    assert plan_layers(LAYERS, HEAD, NEEDS, [(1, HERE)], n_gpu_layers=99).n_gpu_layers == 6
    for devices in ([], [(1 << 40, HERE)]):
        assert plan_layers(LAYERS, HEAD, NEEDS, devices, n_gpu_layers=0).n_gpu_layers == 0
    assert plan_layers(LAYERS, HEAD, NEEDS, []).n_gpu_layers == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("split", [(), (1.0, 1.0), (1.0, 3.0)])
def test_several_devices_are_not_overfilled(share: float, split: tuple[float, ...]) -> None:
    """Each has room for its stretch of layers, the later ones on the later device; with the experts of one layer more,
    one of them would not."""
    for room in range(0, 1000, 7):
        rooms = round(share * room), room - round(share * room)
        devices = [(OTHER + rooms[0], HERE), (MAIN + rooms[1], HERE)]
        p = plan_layers(LAYERS, HEAD, NEEDS, devices, tensor_split=split)
        for device in (0, 1):
            assert taken(on(p, device), p.n_cpu_moe) <= rooms[device]
        assert [d for d in p.devices if d is not None] == sorted(d for d in p.devices if d is not None)
        assert p.n_gpu_layers == 6 or p.n_cpu_moe == 6
        if p.n_gpu_layers == 6 and p.n_cpu_moe > 0:
            more = plan_layers(
                LAYERS, HEAD, NEEDS, devices, tensor_split=split, n_gpu_layers=6, n_cpu_moe=p.n_cpu_moe - 1
            )
            assert any(taken(on(more, device), more.n_cpu_moe) > rooms[device] for device in (0, 1))


def test_with_a_server_no_expert_goes_to_the_cpu_unasked() -> None:
    """Fewer whole layers instead, also of a GPU beside it; experts that the caller names stay on the CPU."""
    for servers in ([AWAY], [AWAY, HERE], [HERE, AWAY], [AWAY, AWAY]):
        counts = []
        for room in range(0, 1000, 7):
            rooms = [room // len(servers)] * len(servers)
            frees = [*(OTHER + size for size in rooms[:-1]), MAIN + rooms[-1]]
            devices = list(zip(frees, servers, strict=True))
            p = plan_layers(LAYERS, HEAD, NEEDS, devices)
            assert p.n_cpu_moe == 0
            assert all(taken(on(p, i), 0) <= rooms[i] for i in range(len(servers)))
            counts.append(p.n_gpu_layers)
            asked = plan_layers(LAYERS, HEAD, NEEDS, devices, n_cpu_moe=3)
            assert asked.n_cpu_moe == 3 and asked.n_gpu_layers >= p.n_gpu_layers
        assert counts == sorted(counts) and set(counts) >= {0, 6}


def test_nothing_is_put_beside_a_head_that_has_no_room() -> None:
    """The main device has the head and the logits; where they do not fit, other devices' room is of no use."""
    for endpoint in (HERE, AWAY):
        assert plan_layers(LAYERS, HEAD, NEEDS, [(1 << 40, endpoint), (MAIN - 1, HERE)]).n_gpu_layers == 0
        assert plan_layers(LAYERS, HEAD, NEEDS, [(1 << 40, endpoint), (MAIN, HERE)]).n_gpu_layers == 6
        assert plan_layers(LAYERS, HEAD, NEEDS, [(0, endpoint), (1 << 40, HERE)]).devices == (1,) * 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_gpu_layers": -2}, "n_gpu_layers"),
        ({"n_cpu_moe": -1}, "n_cpu_moe"),
        ({"main_gpu": 1}, "main_gpu is 1: there are 1 devices"),
        ({"tensor_split": [1.0, 1.0]}, "tensor_split has 2 parts"),
        ({"tensor_split": [-1.0]}, "tensor_split must"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_layers(LAYERS, HEAD, NEEDS, [(1 << 40, HERE)], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_layers must be"):
        plan_layers([], HEAD, Needs(1, 1, 1, 1, 1, ()), [])


def test_the_engine_follows_the_plan_to_the_byte(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a device that reports just enough for so many layers, and a byte less: what is summed from the file's header
    is what the engine sums. And it says what came of "auto"."""
    report = inspect_file(tiny_gguf, n_ctx=256)
    needs, n_layers = report.memory.needs, len(LAYERS)
    assert needs is not None
    head, dense, experts = sum_tensors(report, n_layers)
    layers = list(zip(dense, experts, strict=True))
    least = RESERVE + head + needs.logits + needs.sampling + needs.passes
    with rpc_server() as (server, _):
        for n in (1, 4, 6):
            enough = least + sum(dense[-n:]) + sum(experts[-n:]) + sum(needs.cache[-n:])
            for free, expected in ((enough, n), (enough - 1, n - 1)):
                relay = Relay(server, memory_free=free)
                planned = plan_layers(layers, head, needs, [(free, AWAY)])
                with DiffusionModel(tiny_gguf, n_ctx=256, rpc=[relay.endpoint], verbose=True) as model:
                    (device,) = model.devices()
                relay.close()
                assert device.memory_free == free
                assert (device.n_layers, device.n_cpu_moe) == (expected, 0)
                assert (planned.n_gpu_layers, planned.n_cpu_moe) == (expected, 0)
                assert f"auto: n_gpu_layers={expected}, n_cpu_moe=0 is what fits" in capsys.readouterr().err
        asked = DiffusionModel(tiny_gguf, n_ctx=256, rpc=[server], n_cpu_moe=2, verbose=True)
        with asked as model:
            assert [(d.n_layers, d.n_cpu_moe) for d in model.devices()] == [(6, 2)]
            assert "6 layers (2 with their experts on the CPU), head" in capsys.readouterr().err


def test_fit_shows_the_plan_of_a_device_here(tiny_gguf: Path) -> None:
    """`inspect --fit` is plan_layers for one device of this machine, with the shares that it is made of."""
    report = inspect_file(tiny_gguf, n_ctx=256)
    needs = report.memory.needs
    assert needs is not None
    head, dense, experts = sum_tensors(report, 6)
    layers = list(zip(dense, experts, strict=True))
    seen = set()
    for free in range(RESERVE, RESERVE + 60_000_000, 250_000):
        planned, shown = plan_layers(layers, head, needs, [(free, HERE)]), plan(report, free)
        assert (shown.n_gpu_layers, shown.n_cpu_moe) == (planned.n_gpu_layers, planned.n_cpu_moe)
        assert shown.free >= 0
        seen.add((shown.n_gpu_layers, shown.n_cpu_moe))
    assert {(0, 6), (6, 6), (6, 0)} <= seen
