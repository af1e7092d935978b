"""Prints a result row of one of the paper's networks as text."""

from neuron_merging.commandline import Row, exports_for_people
from neuron_merging.config import CHOSEN_WIDTHS
from neuron_merging.memory import held


def for_people(row: Row) -> str:
    """The row as a small table: accuracy and size beside the original's, and seconds."""
    if "summary" in row:
        return row["summary"]
    network = " ".join([row["arch"], "-".join(map(str, row["depth_wide"]))]).strip()
    shrunk = row["type"] != "original"
    title = f"{network} on {row['dataset']}: {row['type'] if shrunk else row['checkpoint']}"
    kind = row["type"] if shrunk else row.get("checkpoint_type", "measured")
    if shrunk:
        chosen = f"ratio {row['ratio']}" if row["ratio"] is not None else row.get("budget")
        chosen = chosen or f"widths {','.join(map(str, row['widths']))}"
        title += "".join(f", {part}" for part in (row["criterion"], chosen) if part)
        if row["calibrate"]:
            title += f", looking at {row['calibrate']}"
    lines = [title, f"{'':<12}{'original':>16}{kind:>16}"]
    if row["widths_rule"] in CHOSEN_WIDTHS:
        widths = ",".join(map(str, row["widths"]))
        lines.insert(1, f"{'widths':<12}{widths}   (chosen in {row['seconds_widths']:.1f} s)")
    known = row["accuracy_checkpoint"]
    before = "" if known is None else f"{known:.2f} %"
    lines.append(f"{'accuracy':<12}{before:>16}{row['accuracy']:>14.2f} %   {row['correct']:,} of {row['total']:,}")
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        original, now = row[f"{key}_original"], row[key]
        lines.append(f"{label:<12}{original:>16,}{now:>16,}   {100 * (now / original - 1):+.1f} %")
    peak = "" if row["peak_mb"] is None else f"   {held(row['peak_mb'], row['device'])}"
    lines.append(f"{'decompose':<12}{'':>16}{row['seconds_decompose']:>14.3f} s{peak}")
    lines.append(f"{'evaluate':<12}{'':>16}{row['seconds_evaluate']:>14.3f} s   on {row['device']}")
    return "\n".join([*lines, *exports_for_people(row)])
