"""Tables of an exported model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from raygkd.metrics.ranking import score_title
from raygkd.report.tables import new_table

# a smaller difference of latencies is that of one measurement from the next
SLOWER = 1.05


def export_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the result of ``raygkd.workflows.export``: a fact per line, and int8 beside float."""
    int8 = result["int8"]
    facts = new_table("Exported", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    for name, text in _facts(result):
        facts.add_row(name, text)
    if int8 is None:
        return [facts]
    versus = new_table("In 8 bits")
    for name in ("", "float32", "int8", ""):
        versus.add_column(name, justify="right" if name else "left")
    for row in _comparison(result["bytes"], int8):
        versus.add_row(*row)
    return [facts, versus]


def int8_table(scores: Mapping[str, float]) -> Table:
    """Return the test scores of a student in float and in 8 bits, as a training in 8 bits does."""
    table = new_table("In 8 bits on the test split")
    table.add_column("")
    table.add_column("test score", justify="right")
    titles = {
        "float": "float",
        "calibrated": "int8 by calibration",
        "distilled": "int8 after distillation",
    }
    for name, title in titles.items():
        table.add_row(title, f"{scores[name]:.4f}")
    return table


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    check, int8 = result["check"], result["int8"]
    yield "file", result["out"]
    if result["card"]:
        yield "model card", result["card"]
    opset = f", opset {result['opset']}" if result["opset"] else ""
    kind = f", {_KINDS[int8['kind']]}" if int8 else ""
    yield "format", f"{result['format']}{opset}{kind}"
    yield "model", f"{result['model']}, {result['parameters']:,} parameters"
    if not int8:
        yield "size", f"{result['bytes']:,} bytes"
    yield "float32 against the model" if int8 else "against the model", _check(check)
    if result["no_images"]:
        yield "images", f"random inputs only: {result['no_images']}"
    if int8 and int8["trained_ranges"]:
        yield "ranges", "those of its training in 8 bits"
    elif int8 and int8["calibrated_on"]:
        yield "calibrated on", f"{int8['calibrated_on']} training images"
    if int8 and int8["kind"] == "int8":
        left = int8["float_layers"]
        names = f": {', '.join(left)}" if left else ""
        yield "layers in float", f"{len(left)} of {int8['layers']}{names}"


_KINDS = {"int8": "int8", "dynamic": "int8, activations quantised at run time"}


def _comparison(size: int, int8: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield a measure, its value in float and in 8 bits, and how it changes."""
    before = int8["bytes_before"]
    yield "size, bytes", f"{before:,}", f"{size:,}", f"{size / before:.2f}x"
    full, small = (int8["latency_ms"][name]["median"] for name in ("float32", "int8"))
    threads = f"{int8['threads']} thread{'s' if int8['threads'] > 1 else ''}"
    ratio = f"{small / full:.2f}x"
    yield f"ms, batch of 1, {threads}", f"{full:.3g}", f"{small:.3g}", ratio
    on = f"{int8['images']} validation images" if int8["images"] else "random inputs"
    if int8["score"] is not None and int8["score_before"] is not None:
        before, after = int8["score_before"], int8["score"]
        title = f"{score_title(int8['measure'])}, {on}"
        yield title, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
    if int8["agreement"] is not None:
        yield f"same predictions, {on}", "", f"{int8['agreement']:.1%}", ""


def slower_note(result: Mapping[str, Any]) -> str | None:
    """Return a line if the model in 8 bits is slower than in float on this machine; else None."""
    int8 = result["int8"]
    if int8 is None:
        return None
    full, small = (int8["latency_ms"][name]["median"] for name in ("float32", "int8"))
    if small <= SLOWER * full:
        return None
    return f"int8 is slower than float32 on this machine ({int8['hardware']}): {small / full:.2f}x"


def _check(check: Mapping[str, Any]) -> str:
    found = ""
    if check["detections"]:
        found = f", {check['detections']:,} detections, {check['alone']} of them unmatched"
    return (
        f"largest difference {check['largest']:.1e} (allowed {check['tolerance']:g}) on "
        f"{check['images']} inputs, {check['sample_images']} of them images{found}"
    )
