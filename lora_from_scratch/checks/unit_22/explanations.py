"""Unit 22, serving a thousand adapters: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.shown_rows import first_wrong
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe


def explain_gathered(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """NaN from cells that nobody uses, or the first row that is wrong."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    if not seen.value.isfinite().all():  # type: ignore[union-attr]
        return "NaN", (
            "Your result contains NaN. Some cells, which no row's table contains, are NaN here, and 0 times NaN is "
            "NaN. Read only the cells in the tables."
        )
    tables: Any = case.inputs["tables"]
    return wrong_rows(seen.value, wanted, [len(table) for table in tables])


def wrong_rows(result: Any, wanted: Tensor, ranks: list[int]) -> Explanation:
    """The rows that are wrong, with the ranks of their adapters."""
    wrong = [row for row in range(len(wanted)) if not same(result[row], wanted[row])]
    numbers = first_wrong(result, wanted, "row")
    if len(wrong) == len(wanted) or not wrong:
        return "all rows", f"No row of your result is right.{numbers} Work one row with a rank of 1 out on paper."
    named = ", ".join(f"{row} (rank {ranks[row]})" for row in wrong)
    return "some rows", (
        f"Counted from 0, these rows are wrong: {named}.{numbers} The others are right. What is different there?"
    )


def explain_segments(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The result first, then the sizes and the number of products."""
    one: Any = seen.value
    other: Any = expected.value
    if not isinstance(one, dict):
        return None
    if seen.changed:
        names = dict.fromkeys({"x": "x", "index": "adapter_index"}.get(name, "adapters") for name in seen.changed)
        return "changes its input", (
            f"Your code modifies {' and '.join(names)} in place. The caller may still need the original, so work on a "
            "copy (`.clone()`)."
        )
    wanted = other["result"]
    if (found := not_a_tensor(one["result"], wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    if same(one["result"], wanted):
        if one["as large as the weight"]:
            return "as large as the weight", (
                "The result is right, but you create a tensor with as many numbers as the layer's weight, such as the "
                "product of B and A. In which order do you multiply to avoid that?"
            )
        return "too many products", (
            "The result is right, but there are more than two matrix products for each adapter that occurs."
        )
    index: Any = case.inputs["index"]
    As: Any = case.inputs["As"]
    return wrong_rows(one["result"], wanted, [len(As[k]) if k >= 0 else 0 for k in index.tolist()])


TABLE = {  # what the messages say of each entry of the record of a step
    "raised": "`OutOfPages` is raised where it should not be, or not raised where it should be",
    "each page is in one place": "a page is in two places, or in none",
    "nothing is changed": "`OutOfPages` is raised, but something has changed: who has which pages, or the free ones",
    "free": "the number of free pages is wrong",
    "pages": "an owner has another number of pages than it should have, or is in `tables` and should not be",
    "earlier pages first": "an owner's earlier pages are no longer the first of its list",
    "returned": "`allocate` should return all pages of the owner",
    "all pages in order": "`allocate` should return all pages of the owner, in the order of `tables`",
}


def explain_table(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first step after which something is wrong."""
    one: Any = seen.value
    other: Any = expected.value
    steps: Any = case.inputs["steps"]
    if seen.changed or not isinstance(one, list):
        return None
    for number, (now, wanted) in enumerate(zip(one, other, strict=False)):
        step = steps[number]
        done = f"`allocate({step[0]!r}, {step[1]})`" if len(step) > 1 else f"`release({step[0]!r})`"
        for key, message in TABLE.items():
            if not same(now.get(key), wanted.get(key)):
                return key, f"In a table of {case.inputs['pages']} pages, after step {number + 1}, {done}: {message}."
    return None


def explain_evicted(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Names that are no names, used adapters, too many or too few, another order."""
    one, wanted = seen.value, expected.value
    adapters: Any = case.inputs["adapters"]
    known = {name: (pages, users) for name, pages, users in adapters}
    if not isinstance(one, list) or not all(isinstance(name, str) and name in known for name in one):
        return "no list of names", f"Return a list of the names of adapters. Yours is {describe(one)}."
    assert isinstance(wanted, list)
    if used := [name for name in one if known[str(name)][1]]:
        return "in use", f"You evict {used[0]!r}, which a running request uses."
    missing = case.inputs["missing"]
    freed = sum(known[str(name)][0] for name in one)
    numbers = f"{missing} pages are missing, and your adapters have {freed}"
    if len(one) != len(wanted):
        kind = "too many" if len(one) > len(wanted) else "too few"
        return kind, f"You evict {len(one)} adapters, {kind}: {numbers}. It should be {len(wanted)}."
    return "others", f"You evict {', '.join(map(str, one))}. Others have not been used for a longer time, or go first."


def explain_joining(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Too many or too few."""
    one: Any = seen.value
    wanted: Any = expected.value
    waiting: Any = case.inputs["waiting"]
    if isinstance(one, bool) or not isinstance(one, int):
        return "no number", f"Return a whole number. Yours is {describe(one)}."
    if one > wanted:
        at = waiting[wanted] if wanted < len(waiting) else None
        which = f": {tuple(at)} does not fit any more" if at else ": there are not so many"
        return "too many", f"With your answer {one} of {len(waiting)} requests join{which}."
    return "too few", (
        f"With your answer {one} of {len(waiting)} requests join, but {tuple(waiting[one])} fits too. List who "
        "needs how many pages after each pass."
    )


explain_test = explain_trial("function", "With which prompts and adapters would that show?")
