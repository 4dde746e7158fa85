"""`inspect --diff`: what sets two files apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from gguf_rewrite import DROP, Typed, read_tensor, rewrite
from rich.console import Console

from pydiffgguf import cli
from pydiffgguf.convert import FileDiff, compare_files
from pydiffgguf.convert.inspection.gguf_file import KEPT
from pydiffgguf.convert.inspection.report import diff_to_dict, render_diff

EMPTY = {"only_a": {}, "only_b": {}, "changed": {}}


def shown(diff: FileDiff, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render_diff(diff))
    return capture.get()


def test_a_file_is_the_same_as_itself_and_as_its_parts(tiny_gguf: Path, tmp_path: Path) -> None:
    """But for the keys that say how it is split; the weights too."""
    diff = compare_files(tiny_gguf, tiny_gguf, data=True)
    assert diff.same and diff.changed_data == ()
    assert "Nothing differs." in shown(diff)
    rewrite(tiny_gguf, tmp_path / "x.gguf", part_tensors=50)
    (first,) = tmp_path.glob("x-00001-*")
    diff = compare_files(tiny_gguf, first, data=True)
    assert set(diff.keys_only_b) == {"split.no", "split.count", "split.tensors.count"}
    assert not (diff.keys_only_a or diff.changed_keys or diff.changed_tensors or diff.changed_data)


def test_every_kind_of_difference_is_told(tiny_gguf: Path, tmp_path: Path) -> None:
    """Keys and tensors that only one has, other values, types and shapes; and, when asked for, other weights."""
    up = read_tensor(tiny_gguf, "blk.2.ffn_up.weight")
    norm = read_tensor(tiny_gguf, "output_norm.weight").copy()
    norm[7] += 1
    rewrite(
        tiny_gguf,
        tmp_path / "b.gguf",
        keys={
            "general.name": DROP,
            "diffusion.eb_max_steps": Typed(25, GGUFValueType.UINT32),
            "diffusion.eb_t_min": Typed(0.3, GGUFValueType.FLOAT64),
            "note": Typed("x", GGUFValueType.STRING),
        },
        tensors={
            "blk.0.enc_layer_output_scale.weight": DROP,
            "blk.1.enc_layer_output_scale.weight": DROP,
            "extra.weight": np.ones((2, 3)),
            "blk.2.ffn_up.weight": up[:-1],
            "output_norm.weight": norm,
        },
    )
    diff = compare_files(tiny_gguf, tmp_path / "b.gguf")
    assert (diff.keys_only_a, diff.keys_only_b) == (("general.name",), ("note",))
    assert diff.changed_keys == ("diffusion.eb_max_steps", "diffusion.eb_t_min")
    assert diff.tensors_only_a == tuple(f"blk.{i}.enc_layer_output_scale.weight" for i in (0, 1))
    assert diff.tensors_only_b == ("extra.weight",)
    assert diff.changed_tensors == ("blk.2.ffn_up.weight",)
    assert diff.changed_data is None and not diff.same
    assert "The weights were not compared." in shown(diff)
    diff = compare_files(tiny_gguf, tmp_path / "b.gguf", data=True)
    assert diff.changed_data == ("output_norm.weight",)
    rows = [" ".join(line.split()) for line in shown(diff).splitlines()]
    for row in (
        "diffusion.eb_max_steps 24 25",
        "diffusion.eb_t_min 0.3, f32 0.3, f64",
        "enc_layer_output_scale.weight 0-1 F32 1",
        "ffn_up.weight 2 F32 128 x 96 F32 128 x 95",
        "output_norm.weight other weights other weights",
    ):
        assert row in rows
    assert all(len(line) <= 60 for line in shown(diff, 60).splitlines())


def test_a_vocabulary_is_compared_to_its_end(tmp_path: Path) -> None:
    """Past the entries that a report keeps: in a late entry, and in one that reaches into the next."""
    import gguf

    def write(name: str, tokens: list[str]) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "diffusion-gemma")
        writer.add_token_list(tokens)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    tokens = [f"t{i}" for i in range(KEPT + 100)]
    a = write("a.gguf", tokens)
    assert compare_files(a, write("same.gguf", tokens)).same
    for late in (write("late.gguf", [*tokens[:-1], "u4195"]), write("more.gguf", [*tokens, "x"])):
        diff = compare_files(a, late)
        assert diff.changed_keys == ("tokenizer.ggml.tokens",)
        assert diff_to_dict(diff)["keys"]["changed"]["tokenizer.ggml.tokens"]["first_difference"] is None
        assert "4196 entries" in shown(diff)
    diff = compare_files(a, write("early.gguf", ["t0", "x", *tokens[2:]]))
    assert diff_to_dict(diff)["keys"]["changed"]["tokenizer.ggml.tokens"]["first_difference"] == 1
    assert "[1]: t1" in shown(diff) and "[1]: x" in shown(diff)


def test_the_command_gives_a_table_or_json(tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tiny_gguf, tmp_path / "b.gguf", tensors={"output_norm.weight": np.ones(128)})
    names = [str(tiny_gguf), str(tmp_path / "b.gguf")]
    assert cli.main(["inspect", "--diff", *names, "--data", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value == {
        "a": names[0],
        "b": names[1],
        "same": False,
        "keys": EMPTY,
        "tensors": EMPTY,
        "data": ["output_norm.weight"],
    }
    assert cli.main(["inspect", "--diff", *names]) == 0
    assert "Nothing differs." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["x", "--diff", "a", "b"], ["x", "--data"], ["--diff", "a", "b", "--ctx", "8"]]
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", *arguments])
    assert caught.value.code == 2
    assert "--diff" in capsys.readouterr().err
