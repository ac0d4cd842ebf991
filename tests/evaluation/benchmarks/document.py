"""The table of benchmarks in docs/evaluation.md, made of the registry; run as a module it writes it anew."""

from pathlib import Path

from shellv_core.evaluation.benchmarks import registry

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"
BEGIN = "<!-- benchmarks: written by python -m tests.evaluation.benchmarks.document -->\n"
END = "<!-- end -->"


def table() -> str:
    """The table, in Markdown."""
    rows = ["| benchmark | question file | published at | scored | rules |", "|---|---|---|---|---|"]
    for name, entry in registry().items():
        cells = (f"`{name}`", entry.questions, entry.published, entry.metrics, entry.rules)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n" + "\n".join(rows) + "\n\n"


def with_table(text: str) -> str:
    """The document with today's table."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
