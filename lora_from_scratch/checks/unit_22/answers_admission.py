"""Unit 22, serving a thousand adapters: mistakes that people make, and other right ways. Which requests join."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import bisect
import itertools

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.serving.scheduler import peak_pages
from lora_from_scratch.serving.simulation import joining


def played_out(batch, sizes, layout):
    """The most pages in use after any pass, by playing the passes out."""
    most = 0
    for passes in range(1, max((left for _, _, left in batch), default=0) + 1):
        active = [request for request in batch if request[2] >= passes]
        held = sum(sizes[name] for name in {name for name, _, _ in active if name is not None})
        most = max(most, held + sum(layout.pages_for_tokens(stored + passes) for _, stored, _ in active))
    return most


@right("joining")
def passes_played_out(waiting, running, sizes, pages, max_rows, layout):
    count = 0
    while count < len(waiting):
        batch = [*running, *waiting[: count + 1]]
        if len(batch) > max_rows or played_out(batch, sizes, layout) > pages:
            break
        count += 1
    return count


@right("joining")
def recursively(waiting, running, sizes, pages, max_rows, layout):
    if not waiting or len(running) >= max_rows:
        return 0
    batch = [*running, waiting[0]]
    names = {name for name, _, _ in batch} - {None}
    adapters = [(sizes[n], max(left for name, _, left in batch if name == n)) for n in names]
    if peak_pages([stored for _, stored, _ in batch], [left for _, _, left in batch], adapters, layout) > pages:
        return 0
    return 1 + recursively(waiting[1:], batch, sizes, pages, max_rows, layout)


@right("joining")
def by_bisection(waiting, running, sizes, pages, max_rows, layout):
    """If some requests do not fit, more of them do not fit either."""
    most = min(len(waiting), max(0, max_rows - len(running)))

    def needs(count):
        return played_out([*running, *waiting[:count]], sizes, layout)

    return bisect.bisect_right(range(1, most + 1), pages, key=needs)


@right("joining")
def with_takewhile(waiting, running, sizes, pages, max_rows, layout):
    def fits(count):
        batch = list(itertools.chain(running, waiting[:count]))
        ends = {}
        for name, _, left in sorted(batch, key=lambda request: request[2]):
            ends[name] = left
        ends.pop(None, None)
        _, stored, left = zip(*batch)
        pairs = [(sizes[name], end) for name, end in ends.items()]
        return len(batch) <= max_rows and peak_pages(stored, left, pairs, layout) <= pages

    return len(list(itertools.takewhile(fits, range(1, len(waiting) + 1))))


@wrong("joining", "Requests overtake one that does not fit. It could wait forever: the step ends there.")
def overtaking(waiting, running, sizes, pages, max_rows, layout):
    batch = list(running)
    for request in waiting:
        if joining([request], batch, sizes, pages, max_rows, layout):
            batch.append(request)
    return len(batch) - len(running)


@wrong("joining", "You let the smallest requests join first. They join in the order in which they wait.")
def the_smallest_first(waiting, running, sizes, pages, max_rows, layout):
    ordered = sorted(waiting, key=lambda request: request[1] + request[2])
    return joining(ordered, running, sizes, pages, max_rows, layout)


@wrong("joining", "You let the last request join first. They join in the order in which they wait.")
def the_last_first(waiting, running, sizes, pages, max_rows, layout):
    return joining(waiting[::-1], running, sizes, pages, max_rows, layout)


@wrong(
    "joining",
    "You look only at the pages that are needed in the next pass. Texts grow, and then no page may be left for them.",
)
def only_the_next_pass(waiting, running, sizes, pages, max_rows, layout):
    batches = [[*running, *waiting[:count]] for count in range(1, len(waiting) + 1)]
    for count, batch in enumerate(batches):
        held = sum(sizes[name] for name in {name for name, _, _ in batch} - {None})
        held += sum(layout.pages_for_tokens(stored + 1) for _, stored, _ in batch)
        if len(batch) > max_rows or held > pages:
            return count
    return len(waiting)


@wrong(
    "joining",
    "You add up the most pages that each request ever needs. They are not needed at the same time: one may have "
    "finished before another has grown.",
)
def sum_of_the_largest(waiting, running, sizes, pages, max_rows, layout):
    for count in range(len(waiting)):
        batch = [*running, *waiting[: count + 1]]
        held = sum(sizes[name] for name in {name for name, _, _ in batch} - {None})
        held += sum(layout.pages_for_tokens(stored + left) for _, stored, left in batch)
        if len(batch) > max_rows or held > pages:
            return count
    return len(waiting)


@wrong("joining", "You leave the pages of the adapters out.")
@changed(joining, ("adapters, layout)", "[], layout)"))
def without_adapters(): ...


@wrong("joining", "You count an adapter once for each request that uses it. They share it.")
def an_adapter_for_each(waiting, running, sizes, pages, max_rows, layout):
    batch = list(running)
    for count, request in enumerate(waiting):
        batch.append(request)
        adapters = [(sizes[name], left) for name, _, left in batch if name is not None]
        peak = peak_pages([stored for _, stored, _ in batch], [left for _, _, left in batch], adapters, layout)
        if len(batch) > max_rows or peak > pages:
            return count
    return len(waiting)


@wrong("joining", "You leave out the adapters of the running requests, or of the waiting ones. All of them count.")
def adapters_of_the_waiting_ones(waiting, running, sizes, pages, max_rows, layout):
    return joining(waiting, [(None, *rest) for _, *rest in running], sizes, pages, max_rows, layout)


@wrong(
    "joining", "You count every adapter there is, also those that no request of the batch uses. They can be evicted."
)
def every_adapter_there_is(waiting, running, sizes, pages, max_rows, layout):
    return joining(waiting, running, sizes, pages - sum(sizes.values()), max_rows, layout)


@wrong("joining", "Your adapters go with the first of their requests that finishes. The last one needs them too.")
@changed(joining, ("max(left, ends.get(adapter, 0))", "min(left, ends.get(adapter, left))"))
def until_the_first_has_finished(): ...


@wrong(
    "joining",
    "Your adapters go with the last of their requests in the list. Another one may run longer.",
)
@changed(joining, ("max(left, ends.get(adapter, 0))", "left"))
def until_the_last_in_the_list(): ...


@wrong("joining", "Your adapters stay after their last request has finished. From then on they can be evicted.")
@changed(joining, ("(sizes[adapter], end) for", "(sizes[adapter], 10**6) for"))
def adapters_stay(): ...


@wrong("joining", "You keep a page free. The requests may use all of them.")
@changed(joining, ("peak > pages", "peak >= pages"))
def one_page_stays_free(): ...


@wrong("joining", "You do not look at the number of rows.")
@changed(joining, ("len(batch) > max_rows or ", ""))
def without_the_rows(): ...


@wrong("joining", "You count only the requests that join against `max_rows`. The running ones have rows too.")
@changed(joining, ("len(batch) > max_rows", "len(batch) - len(running) > max_rows"))
def rows_of_the_new_ones(): ...


@wrong("joining", "One row always stays free: there may be `max_rows` requests.")
@changed(joining, ("len(batch) > max_rows", "len(batch) >= max_rows"))
def one_row_stays_free(): ...


@wrong("joining", "You leave the running requests out. Their pages are in the same pool.")
def without_the_running_ones(waiting, running, sizes, pages, max_rows, layout):
    return joining(waiting, [], sizes, pages, max_rows - len(running), layout)


@wrong("joining", "You try each waiting request beside the running ones alone. Those that have just joined count too.")
def each_alone(waiting, running, sizes, pages, max_rows, layout):
    for count, request in enumerate(waiting):
        if count + len(running) >= max_rows or not joining([request], running, sizes, pages, max_rows, layout):
            return count
    return len(waiting)


@wrong("joining", "You return the size of the whole batch. The number of those that join is wanted.")
def the_whole_batch(waiting, running, sizes, pages, max_rows, layout):
    return len(running) + joining(waiting, running, sizes, pages, max_rows, layout)


@wrong("joining", "You also count the first request that does not fit.")
@changed(joining, ("return count\n", "return count + 1\n"))
def the_first_that_does_not_fit_too(): ...


@wrong("joining", "You return the requests. Their number is wanted.")
def the_requests(waiting, running, sizes, pages, max_rows, layout):
    return waiting[: joining(waiting, running, sizes, pages, max_rows, layout)]


@wrong("joining", caught_by="changes its input")
@changed(joining, ("batch = list(running)", "batch = running"))
def appended_to_the_running_ones(): ...
