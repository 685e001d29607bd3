"""Formats reports as text: a table, and samples of what the models generated."""

from __future__ import annotations

from collections.abc import Sequence

from lora_from_scratch.finetune.run import Report

HEADINGS = (
    "method",
    "trained",
    "share",
    "seconds",
    "peak memory",
    "saved",
    "BLEU",
    "slot errors",
    "perplexity",
    "tales: before",
    "after",
)


def rows(reports: Sequence[Report], headings: Sequence[str] = HEADINGS) -> list[tuple[str, ...]]:
    """The cells of the table, one row per report."""
    return [tuple(_cells(report)[heading] for heading in headings) for report in reports]


def table(reports: Sequence[Report], headings: Sequence[str] = HEADINGS) -> str:
    """The table in Markdown, padded to be readable in a terminal. `headings` may also include "divergence"."""
    return markdown([tuple(headings), *rows(reports, headings)])


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown, padded to be readable in a terminal; the first line is the heading."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def join(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|" + "|".join("-" * (w + 2) if column == 0 else "-" * (w + 1) + ":" for column, w in enumerate(widths)) + "|"
    )
    return "\n".join([join(lines[0]), rule, *(join(line) for line in lines[1:])])


def describe(reports: Sequence[Report]) -> str:
    """What the models generated for a few cards, before and after fine-tuning, and learned texts."""
    paragraphs = []
    for place, sample in enumerate(reports[0].samples):
        lines = [f"Card    {sample['mr']}", f"before  {_short(sample['before'])}"]
        lines += [f"{report.method:<7} {report.samples[place]['after']}" for report in reports]
        paragraphs.append("\n".join(lines))
    paragraphs += [f"Learned by {report.method}: {report.learned_text}" for report in reports if report.learned_text]
    return "\n\n".join(paragraphs)


def _cells(report: Report) -> dict[str, str]:
    """The cell under each heading."""
    s = report.scores
    return {
        "method": report.method,
        "trained": _trained(report),
        "share": f"{100 * report.share:.2f} %",
        "seconds": f"{report.seconds:.0f}",
        "peak memory": size(report.peak_memory_bytes),
        "saved": size(report.saved_bytes),
        "BLEU": f"{s.bleu:.1f}" if s else "",
        "slot errors": f"{100 * s.slot_errors:.1f} %" if s else "",
        "perplexity": f"{s.perplexity:.2f}" if s else "",
        "tales: before": f"{report.tale_perplexity_before:.1f}" if s else "",
        "after": f"{s.tale_perplexity:.1f}" if s else "",
        "divergence": f"{s.divergence:.3f}" if s else "",
    }


def _trained(report: Report) -> str:
    """The number of trained parameters, and how many are kept if fewer (a prefix's MLP is discarded)."""
    kept = report.saved_parameters
    aside = f" ({kept:,} kept)" if 0 < kept < report.trained_parameters else ""
    return f"{report.trained_parameters:,}{aside}"


def size(count: int) -> str:
    """Format a number of bytes, as in 1.4 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{0 if count >= 100 * scale else 1}f} {unit}"
    return f"{count} B"


def _short(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 4].rsplit(" ", 1)[0] + " ..."
