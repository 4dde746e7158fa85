"""What an adapter is: regions, modules, ranks, scales, bytes, and the pairs that do not fit a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pydiffgguf._text import human, printable

from ..inspection.gguf_file import GGUFHead, read_head
from ..inspection.inspect import Finding
from .opening import base_shape, read_adapter
from .pairs import Adapter, Pair, is_experts, kind_of


@dataclass(frozen=True)
class PairGroup:
    """The pairs of one class in one region: how many there are, their ranks, scales and bytes."""

    region: str
    kind: str
    pairs: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    n_bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """What inspect_adapter() found. `n_bytes`: of the factors as they are stored; `base`: the model that they were held
    against, None without one."""

    adapter: Adapter
    groups: tuple[PairGroup, ...]
    n_bytes: int
    base: Path | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        adapter = self.adapter
        return {
            "path": str(adapter.path),
            "kind": "adapter",
            "name": adapter.name,
            "trained_on": adapter.base,
            "regions": list(adapter.regions),
            "pairs": len(adapter.pairs),
            "zero_pairs": adapter.n_zero,
            "values": sum(pair.n_values for pair in adapter.pairs),
            "bytes": self.n_bytes,
            "groups": [
                {
                    "region": group.region,
                    "class": group.kind,
                    "pairs": group.pairs,
                    "ranks": list(group.ranks),
                    "scales": list(group.scales),
                    "bytes": group.n_bytes,
                }
                for group in self.groups
            ],
            "base": None if self.base is None else str(self.base),
            "findings": [{"level": finding.level, "text": finding.text} for finding in self.findings],
        }


def inspect_adapter(path: str | Path, *, base: str | Path | None = None) -> AdapterReport:
    """Reads the adapter at `path`, a PEFT folder or a GGUF file, and reports on it. `base`: a model's GGUF; pairs
    that do not fit it are errors among the findings. Raises what `read_adapter` raises."""
    path = Path(path)
    head = None if base is None else read_head(Path(base))
    adapter = read_adapter(path, base=None if head is None else base_shape(head))
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in adapter.pairs:
        groups.setdefault((pair.region, kind_of(pair.target) or ""), []).append(pair)
    findings = [Finding("error", text) for text in misfits(adapter, head)] if head is not None else []
    findings += [Finding("note", note) for note in adapter.notes]
    if adapter.n_zero:
        findings.append(Finding("note", f"{adapter.n_zero} pairs do nothing: their product is zero"))
    return AdapterReport(
        adapter=adapter,
        groups=tuple(
            PairGroup(
                region,
                kind,
                len(pairs),
                tuple(sorted({pair.rank for pair in pairs})),
                tuple(sorted({float(f"{pair.scale:.6g}") for pair in pairs})),
                sum(map(stored_bytes, pairs)),
            )
            for (region, kind), pairs in groups.items()
        ),
        n_bytes=sum(map(stored_bytes, adapter.pairs)),
        base=None if base is None else Path(base),
        findings=tuple(findings),
    )


def stored_bytes(pair: Pair) -> int:
    block, size = GGML_QUANT_SIZES[pair.kind]
    return pair.n_values // block * size


def misfits(adapter: Adapter, base: GGUFHead) -> list[str]:
    """A line for each pair that does not fit a model's file, in the words of the engine, which refuses the
    first of them."""
    found = []
    for pair in adapter.pairs:
        made = (pair.a.shape[-1], pair.b.shape[-2])
        for target, outputs in base_matrices(pair, base):
            tensor = base.tensors.get(f"{target}.weight")
            if tensor is None:
                where, _, what = pair.target.rpartition(".")
                found.append(f"{where or 'the decoder'}: this base has no {what} there: another base model?")
                break
            there = (tensor.shape[0], tensor.shape[1] * outputs)
            if made != there:
                found.append(
                    f"{pair.target}: made for {made[0]} inputs and {made[1]} outputs, this base has {there[0]} and "
                    f"{there[1]}: another base model?"
                )
                break
            if is_experts(pair.target) and pair.a.shape[0] != tensor.shape[2]:
                found.append(
                    f"{pair.target}: made for {pair.a.shape[0]} experts, this base has {tensor.shape[2]}: another base "
                    "model?"
                )
                break
    counts = Counter(found)
    return [text if n == 1 else f"{text} (in {n} sets)" for text, n in counts.items()]


def base_matrices(pair: Pair, base: GGUFHead) -> list[tuple[str, float]]:
    """(tensor, what its outputs are to be multiplied by) for the matrix that a pair adapts, in the base's spelling."""
    if pair.target == "output":
        return [("token_embd", 1)]
    stem, _, kind = pair.target.rpartition(".")
    if kind == "ffn_gate_up_exps" and f"{stem}.ffn_gate_exps.weight" in base.tensors:
        return [(f"{stem}.ffn_gate_exps", 2)]
    if kind in ("ffn_gate_exps", "ffn_up_exps") and f"{stem}.ffn_gate_up_exps.weight" in base.tensors:
        return [(f"{stem}.ffn_gate_up_exps", 0.5)]
    return [(pair.target, 1)]


def render(report: AdapterReport) -> RenderableType:
    """The report for rich."""
    adapter = report.adapter
    trained = f", trained on {printable(adapter.base)}" if adapter.base else ""
    parts: list[RenderableType] = [
        Text.assemble(
            (printable(adapter.name), "bold"),
            f": an adapter of {len(adapter.pairs)} pairs, {human(report.n_bytes)}{trained}",
        )
    ]
    table = Table(box=box.SIMPLE)
    for column in ("acts in", "modules", "pairs", "rank", "scale", "bytes"):
        table.add_column(column, justify="left" if column in ("acts in", "modules") else "right")
    for group in report.groups:
        table.add_row(
            "both modes" if group.region == "both" else group.region,
            group.kind,
            str(group.pairs),
            ", ".join(map(str, group.ranks)),
            few(group.scales),
            human(group.n_bytes),
        )
    parts.append(table)
    if report.base is not None and not any(f.level == "error" for f in report.findings):
        parts.append(Text(f"fits {report.base.name}", "green"))
    styles = {"error": "red", "warning": "yellow", "note": "cyan"}
    parts += [Text.assemble((f"{f.level}: ", styles[f.level]), printable(f.text, 300)) for f in report.findings]
    return Group(*parts)


def few(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return shown + (f", ... ({len(values)})" if len(values) > 4 else "")
