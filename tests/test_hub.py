"""Which files of a repository a name means, and how they come here: tests/hub_server.py plays the hub."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_rewrite import rewrite
from hub_server import COMMIT, Hub, Repo, environment, resolve, serve

from pydiffgguf.hub import choose_files, demo_model_path, resolve_model

FILES = [
    "README.md",
    "model-BF16-00002-of-00002.gguf",
    "model-BF16-00001-of-00002.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "UD/model-Q8_0.gguf",
    "model-F16.gguf",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
    "model-lora-F16.gguf",
    "writer-adapter.gguf",
]


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("Q4_K_M", "model-Q4_K_M.gguf"),
        ("q4_k_m", "model-Q4_K_M.gguf"),
        ("*Q4_K_M.gguf", "model-Q4_K_M.gguf"),
        ("*Q8*", "UD/model-Q8_0.gguf"),
        ("UD/model-Q8_0.gguf", "UD/model-Q8_0.gguf"),
        ("model-Q8_0.gguf", "UD/model-Q8_0.gguf"),
        ("F16", "model-F16.gguf"),
        ("mmproj-F16.gguf", "mmproj-F16.gguf"),
        ("model-lora-F16.gguf", "model-lora-F16.gguf"),
    ],
)
def test_a_pattern_names_one_file(pattern: str, file: str) -> None:
    """By whole name, glob or word; F16 is no part of BF16. Projectors, statistics and adapters are no models, but their
    whole name finds them."""
    assert choose_files(FILES, pattern, "hf:a/b") == [file]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "Q4_K",
            r"'Q4_K' matches none of its models: UD/model-Q8_0.gguf, model-BF16.gguf \(2 files\), model-F16.gguf, ",
        ),
        ("*Q4*", r"matches 2 of its models: model-Q4_K_M.gguf, model-Q4_K_S.gguf$"),
        ("*", r"hf:a/b holds 5 models; name one behind a colon, by a word of it: "),
    ],
)
def test_other_patterns_say_what_there_is(pattern: str, message: str) -> None:
    """None: all the models; several: those that match; the parts of a split file count as one."""
    with pytest.raises(ValueError, match=message):
        choose_files(FILES, pattern, "hf:a/b")


@pytest.mark.parametrize("pattern", ["BF16", "model-BF16.gguf", "model-BF16-00002-of-00002.gguf", "*BF16*"])
def test_the_parts_of_a_split_model_come_together(pattern: str) -> None:
    """By its name without the parts' numbers, by a word of it, or by any of the parts; in their order."""
    parts = ["model-BF16-00001-of-00002.gguf", "model-BF16-00002-of-00002.gguf"]
    assert choose_files(FILES, pattern, "hf:a/b") == parts
    # The same model in one file is another choice, and so is one in three files.
    others = [*FILES, "model-BF16.gguf", *(f"model-BF16-{n:05d}-of-00003.gguf" for n in (1, 2, 3))]
    with pytest.raises(ValueError, match=r"matches 3 .*model-BF16.gguf \(2 files\), model-BF16.gguf \(3 files\), mod"):
        choose_files(others, "BF16", "hf:a/b")


def test_a_split_model_without_all_parts_is_refused_before_it_is_fetched() -> None:
    with pytest.raises(ValueError, match=r"of model-BF16.gguf \(2 files\), part 1 is not there"):
        choose_files([file for file in FILES if "00001" not in file], "BF16", "hf:a/b")


def test_a_single_model_needs_no_pattern() -> None:
    """Files that are no models do not count."""
    assert choose_files(["x.gguf", "mmproj-x.gguf", "config.json"], "*", "hf:a/b") == ["x.gguf"]
    with pytest.raises(ValueError, match="hf:a/b holds no GGUF model"):
        choose_files(["config.json"], "*", "hf:a/b")


def test_the_bundled_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every command; a file of that name comes first."""
    assert resolve_model("demo") == demo_model_path()
    assert demo_model_path().is_file()
    monkeypatch.chdir(tmp_path)
    Path("demo").touch()
    assert resolve_model("demo") == Path("demo")


def test_paths_are_paths() -> None:
    """Also those that do not exist: opening says so."""
    assert resolve_model("some/model.gguf") == Path("some/model.gguf")


@pytest.mark.parametrize(
    "spec", ["hf:", "hf:model", "hf:a/b/c", "hf:/b", "hf:a/:Q4", "hf:a b/c", "hf:a/b@", "hf:a/b@:Q4"]
)
def test_malformed_names_are_refused(spec: str) -> None:
    """Without asking a server."""
    with pytest.raises(ValueError, match="is not of the form hf:OWNER/REPO"):
        resolve_model(spec)


def test_without_network_and_cache_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, as huggingface_hub's offline mode gives it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    with pytest.raises(ConnectionError, match=r"^hf:a/b is not in the cache, and the hub cannot be reached: ") as info:
        resolve_model("hf:a/b:Q4_K_M")
    assert "\n" not in str(info.value)


def test_without_network_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was fetched before is found by the same pattern, though the rest of the repository is not there."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123456789" * 4)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    assert resolve_model("hf:a/b:Q4_K_M") == snapshot / "model-Q4_K_M.gguf"
    with pytest.raises(ValueError, match=r"'Q8_0' matches none of its models: model-Q4_K_M.gguf"):
        resolve_model("hf:a/b:Q8_0")


# ---------------------------------------------------------------------------------------------------- the hub itself


@pytest.fixture(scope="module")
def repos(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repo]:
    tiny = tiny_gguf.read_bytes()
    folder = tmp_path_factory.mktemp("split")
    rewrite(tiny_gguf, folder / "tiny.gguf", part_tensors=50)
    weights = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    texts = {name: name.encode() for name in ("config.json", "tokenizer.json", "onnx/config.json")}
    return {
        "a/quants": Repo({"README.md": b"", "x-Q8_0.gguf": tiny, "x-Q4_K_M.gguf": b"GGUF", "mmproj-x.gguf": b""}),
        "a/parts": Repo({f"big-BF16-{n:05d}-of-00003.gguf": f"GGUF{n}".encode() for n in (1, 2, 3)}),
        "a/split": Repo({f"F32/{path.name}": path.read_bytes() for path in folder.iterdir()}),
        "a/gated": Repo({"x.gguf": tiny}, access="gated"),
        "a/private": Repo({"x.gguf": tiny}, access="private"),
        "a/broken": Repo({}, access="broken"),
        "a/checkpoint": Repo(
            {**texts, **weights, "model.safetensors.index.json": index.encode(), "consolidated.safetensors": b"big"}
        ),
    }


@pytest.fixture
def hub(repos: dict[str, Repo]) -> Iterator[Hub]:
    with serve(repos) as running:
        yield running


def test_a_file_is_fetched_once_and_then_served_from_the_cache(hub: Hub, tmp_path: Path, tiny_gguf: Path) -> None:
    """Online it is only asked whether it is still the same; with HF_HUB_OFFLINE nothing is asked, and nothing is
    warned of."""
    n = 0
    for changes in ({}, {}, {"HF_HUB_OFFLINE": "1"}):
        (result,) = resolve(hub.url, tmp_path, "hf:a/quants:Q8_0", **changes)
        assert Path(result["path"]).read_bytes() == tiny_gguf.read_bytes()
        assert result["warnings"] == []
        if changes:
            assert hub.requests[n:] == []
        n = len(hub.requests)
    assert hub.downloaded() == ["x-Q8_0.gguf"]


def test_the_cache_serves_when_the_hub_is_away_and_says_so(hub: Hub, repos: dict[str, Repo], tmp_path: Path) -> None:
    """An address where nobody listens, and a server that answers 503."""
    resolve(hub.url, tmp_path, "hf:a/quants:Q8_0")
    with serve({"a/quants": Repo({}, access="broken")}) as away:
        pass
    with serve({"a/quants": Repo({}, access="broken"), "a/broken": repos["a/broken"]}) as broken:
        for url in (away.url, broken.url):
            found, other, none = resolve(url, tmp_path, "hf:a/quants:Q8_0", "hf:a/quants:Q4_K_M", "hf:a/broken")
            assert found["path"].endswith("x-Q8_0.gguf")
            (warning,) = found["warnings"]
            assert warning.startswith("hf:a/quants: the hub cannot be reached, the cache serves: ")
            assert other["message"] == "hf:a/quants in the cache: 'Q4_K_M' matches none of its models: x-Q8_0.gguf"
            assert none["error"] == "ConnectionError"
            assert none["message"].startswith("hf:a/broken is not in the cache, and the hub cannot be reached: ")


def test_the_parts_of_a_model_are_fetched_together(hub: Hub, tmp_path: Path) -> None:
    """The first is what is returned; the others lie beside it. Offline, a part that was lost is missed by number."""
    (result,) = resolve(hub.url, tmp_path, "hf:a/parts:BF16")
    first = Path(result["path"])
    assert first.name == "big-BF16-00001-of-00003.gguf"
    assert [file.read_bytes() for file in sorted(first.parent.iterdir())] == [b"GGUF1", b"GGUF2", b"GGUF3"]
    (first.parent / "big-BF16-00002-of-00003.gguf").unlink()
    (result,) = resolve(hub.url, tmp_path, "hf:a/parts", HF_HUB_OFFLINE="1")
    assert result["message"] == "hf:a/parts in the cache: of big-BF16.gguf (3 files), part 2 is not there"


def test_refusals_say_what_helps(hub: Hub, tmp_path: Path) -> None:
    """One line each: no such repository, a private one, a gated one, and a pattern that matches several."""
    specs = ["hf:a/nothing", "hf:a/private", "hf:a/gated", "hf:a/quants", "hf:a/quants:Q6_K"]
    nothing, private, gated, several, none = resolve(hub.url, tmp_path, *specs)
    assert nothing["error"] == private["error"] == "FileNotFoundError"
    for result in (nothing, private):
        assert "no such repository, or a private one: `hf auth login`" in result["message"]
    assert gated["error"] == "PermissionError"
    assert gated["message"].startswith("hf:a/gated: access must be asked for on its page")
    assert several["error"] == none["error"] == "ValueError"
    assert several["message"] == (
        "hf:a/quants holds 2 models; name one behind a colon, by a word of it: x-Q4_K_M.gguf, x-Q8_0.gguf"
    )
    assert none["message"] == "hf:a/quants: 'Q6_K' matches none of its models: x-Q4_K_M.gguf, x-Q8_0.gguf"
    assert hub.downloaded() == []


def test_a_token_opens_private_and_gated_repositories(hub: Hub, tmp_path: Path) -> None:
    """As huggingface_hub takes it: from HF_TOKEN here."""
    for result in resolve(hub.url, tmp_path, "hf:a/private", "hf:a/gated", HF_TOKEN="hf_right"):
        assert result["path"].endswith("x.gguf")


def test_of_a_checkpoint_only_what_is_converted_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """Configuration, tokenizer, and the weights that the index names: not the second copy, not other folders."""
    (result,) = resolve(hub.url, tmp_path, "hf:a/checkpoint", source=True)
    wanted = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
    wanted += ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(hub.downloaded()) == sorted(wanted)
    assert sorted(path.name for path in Path(result["path"]).iterdir()) == sorted(wanted)


def test_a_gguf_of_the_hub_is_a_source_too(hub: Hub, tmp_path: Path) -> None:
    """With a pattern; without one the repository is a checkpoint."""
    (result,) = resolve(hub.url, tmp_path, "hf:a/quants:Q8_0", source=True)
    assert result["path"].endswith("x-Q8_0.gguf")
    assert hub.downloaded() == ["x-Q8_0.gguf"]


def test_commands_and_from_pretrained_take_names(hub: Hub, tmp_path: Path) -> None:
    """A split model opens from the cache's links; a revision that does not exist is said to be missing."""
    command = [sys.executable, "-m", "pydiffgguf"]
    env = environment(hub.url, tmp_path)
    run = subprocess.run([*command, "inspect", "hf:a/quants:Q8_0", "--json"], env=env, capture_output=True, timeout=120)
    assert json.loads(run.stdout)["n_tensors"] == 144
    run = subprocess.run(
        [*command, "generate", "hf:a/quants:Q8_0", "-p", "x", "-n", "4", "--steps", "1", "--seed", "1"],
        env=env,
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 0
    code = """
from pydiffgguf import DiffusionModel
with DiffusionModel.from_pretrained("a/quants", "*Q8_0.gguf", revision="main") as model:
    print(model.path.name, model.n_ctx)
with DiffusionModel.from_pretrained("a/split", "F32") as model:
    print(model.path.name, len(model.tensors()))
try:
    DiffusionModel.from_pretrained("a/quants", revision="v2")
except FileNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == [
        "x-Q8_0.gguf 4096",
        "tiny-00001-of-00004.gguf 144",
        "hf:a/quants: no such revision",
    ], run.stderr


def test_a_name_opens_in_python_and_its_download_is_told(hub: Hub, tmp_path: Path, tiny_gguf: Path) -> None:
    """In place of the bar on stderr; a file of the cache has nothing to download."""
    code = """
from pydiffgguf import DiffusionModel
for _ in range(2):
    seen = []
    with DiffusionModel("hf:a/quants:Q8_0", progress=seen.append) as model:
        stages = sorted({event.stage for event in seen})
        ends = {event.stage: (event.name, event.done == event.total) for event in seen}
        print(stages, ends, max(event.total for event in seen))
"""
    env = environment(hub.url, tmp_path)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    size, name = tiny_gguf.stat().st_size, ("x-Q8_0.gguf", True)
    assert run.stdout.splitlines() == [
        f"['downloading', 'opening'] { ({'downloading': name, 'opening': name}) } {size}",
        f"['opening'] { ({'opening': name}) } {size}",
    ], run.stderr
    assert run.stderr == ""


def run(hub: Hub, home: Path, code: str) -> list[str]:
    """What Python code prints in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub.url, home), capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_revision_is_named_behind_an_at(hub: Hub, tmp_path: Path) -> None:
    found, missing = resolve(hub.url, tmp_path, f"hf:a/quants@{COMMIT}:Q8_0", "hf:a/quants@v2:Q8_0")
    assert found["path"].endswith("x-Q8_0.gguf")
    assert missing["message"] == "hf:a/quants: no such revision"


def test_inspect_reads_the_header_alone(hub: Hub, tmp_path: Path, tiny_gguf: Path) -> None:
    """Also of a split model, by ranges; nothing is downloaded, and what is in the cache is read there."""
    command = [sys.executable, "-m", "pydiffgguf", "inspect", "--json"]
    reports = []
    for spec in ("hf:a/quants:Q8_0", "hf:a/split:F32", "hf:a/quants:Q8_0"):
        ran = subprocess.run([*command, spec], env=environment(hub.url, tmp_path), capture_output=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        reports.append(json.loads(ran.stdout))
        if len(reports) == 2:
            assert hub.downloaded() == []
            assert len([r for r in hub.requests if r.startswith("GET ") and r.count(" ") == 2]) == 5
            resolve(hub.url, tmp_path, "hf:a/quants:Q8_0")
            n = len(hub.requests)
    assert not any("-" in r.rpartition(" ")[2][:12] and r.count(" ") == 2 for r in hub.requests[n:])
    assert [r["n_tensors"] for r in reports] == [144] * 3
    assert reports[0]["bytes"] == reports[2]["bytes"] == tiny_gguf.stat().st_size
    assert reports[0]["memory"]["total_bytes"] == reports[2]["memory"]["total_bytes"] > 10**6
    broken = subprocess.run([*command, "hf:a/quants:Q4"], env=environment(hub.url, tmp_path), capture_output=True)
    assert b"Q4_K_M" in broken.stderr and broken.returncode != 0


def test_from_pretrained_takes_a_cache_a_token_and_a_progress_hook(hub: Hub, tmp_path: Path) -> None:
    code = f"""
from pydiffgguf import DiffusionModel
seen = []
options = {{"cache_dir": {str(tmp_path / "elsewhere")!r}, "token": "hf_right"}}
DiffusionModel.from_pretrained("a/private", progress=seen.append, **options).close()
print(seen[-1].name, seen[-1].done == seen[-1].total > 100000)
DiffusionModel.from_pretrained("a/private", local_files_only=True, **options).close()
def stop(*_):
    raise RuntimeError("enough")
for options, repo in (({{"progress": stop}}, "a/quants"), ({{"local_files_only": True}}, "a/quants")):
    try:
        DiffusionModel.from_pretrained(repo, "Q8_0", **options)
    except Exception as error:
        print(type(error).__name__, error)
"""
    lines = run(hub, tmp_path, code)
    assert lines[:2] == ["x.gguf True", "RuntimeError enough"]
    assert lines[2].startswith("ConnectionError hf:a/quants is not in the cache")
    assert (tmp_path / "elsewhere" / "models--a--private").is_dir()


def test_a_hub_that_never_answers_costs_seconds(hub: Hub, tmp_path: Path) -> None:
    """As behind a captive portal: with a file in the cache nobody waits for half a minute."""
    resolve(hub.url, tmp_path, "hf:a/quants:Q8_0")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        started = time.monotonic()
        (result,) = resolve(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, "hf:a/quants:Q8_0")
    assert result["path"].endswith("x-Q8_0.gguf")
    assert "the hub cannot be reached, the cache serves" in result["warnings"][0]
    assert time.monotonic() - started < 15
