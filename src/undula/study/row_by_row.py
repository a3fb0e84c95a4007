"""What a comparison of single runs puts into the report beside a study's sections."""

from __future__ import annotations

from collections.abc import Sequence

from ..observe.page.content import Section, Table, Text
from .compare import RowByRow
from .report.document import interval, signed
from .report.words import chance

LIMIT = (
    "One run per arm: nothing can be said about the methods, because another seed may turn the result round. What can "
    "be said is about these two trained adapters on rows like these: the difference of their accuracies, McNemar's "
    "test (sign flips over the rows), corrected by Holm, and the interval of the same test, before the correction."
)


def sections(found: Sequence[RowByRow], baseline: str, percent: str) -> tuple[Section, ...]:
    """One section, or none where there is nothing row by row."""
    if not found:
        return ()
    head = (
        "arm",
        "seed",
        "rows",
        "only the arm right",
        "only the baseline right",
        "difference",
        f"{percent} % interval",
    )
    rows = tuple(
        (
            *(each.arm, str(each.seed), f"{each.rows:,}", str(each.only_arm), str(each.only_baseline)),
            *(signed(each.difference), interval(each.low, each.high), chance(each.p), chance(each.p_holm)),
        )
        for each in found
    )
    table = Table((*head, "p", "p (Holm)"), rows, f"Against {baseline}", frozenset({"arm"}))
    return (Section("Row by row", (Text(LIMIT), table)),)
