"""Unit 22, serving a thousand adapters: mistakes that people make, and other right ways. Pages and eviction."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import bisect
import itertools

import numpy as np

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.serving.adapter_store import to_evict
from lora_from_scratch.serving.page_pool import OutOfPages, PageTable

# --- PageTable ---------------------------------------------------------------------------------------


class Start:
    """The part that learners are given."""

    def __init__(self, pages):
        self.free = list(range(pages))
        self.tables = {}


@right("PageTable")
class PagesFromTheFront(Start):
    def allocate(self, owner, pages):
        if len(self.free) < pages:
            raise OutOfPages("too few pages are free")
        new, self.free = self.free[:pages], self.free[pages:]
        self.tables[owner] = self.tables.get(owner, []) + new
        return self.tables[owner]

    def release(self, owner):
        if owner in self.tables:
            self.free = self.free + self.tables[owner]
            del self.tables[owner]


@right("PageTable")
class OnePageAtATime(Start):
    def allocate(self, owner, pages):
        if not pages <= len(self.free):
            raise OutOfPages(pages)
        if owner not in self.tables:
            self.tables[owner] = []
        for _ in range(pages):
            page = min(self.free)
            self.free.remove(page)
            self.tables[owner].append(page)
        return list(self.tables[owner])

    def release(self, owner):
        for page in self.tables.get(owner, []):
            self.free.append(page)
        self.tables = {name: own for name, own in self.tables.items() if name != owner}


@right("PageTable")
class TakenBackIfThereAreTooFew(Start):
    def allocate(self, owner, pages):
        new = []
        try:
            for _ in range(pages):
                new.append(self.free.pop(0))
        except IndexError:
            self.free[:0] = new
            raise OutOfPages("too few") from None
        own = self.tables.setdefault(owner, [])
        own += new
        return own

    def release(self, owner):
        try:
            own = self.tables.pop(owner)
        except KeyError:
            return
        for page in own:
            bisect.insort(self.free, page)


@right("PageTable")
class SetsOfPages(Start):
    def allocate(self, owner, pages):
        if pages > len(self.free):
            raise OutOfPages(f"{pages} of {len(self.free)}")
        new = list(itertools.islice(reversed(self.free), pages))
        self.free = [page for page in self.free if page not in set(new)]
        self.tables[owner] = [*self.tables.get(owner, ()), *new]
        return tuple(self.tables[owner])

    def release(self, owner):
        own = self.tables.pop(owner, None) or []
        self.free = sorted({*self.free, *own})


@wrong("PageTable", "You do not look whether enough pages are free before you take them.")
@changed(PageTable, ("if pages > len(self.free):", "if False:"))
class WithoutLooking: ...


@wrong(
    "PageTable",
    "If too few pages are free you have already given some of them away when `OutOfPages` is raised. Look at their "
    "number first.",
)
class SomeAreGivenAway(Start):
    def allocate(self, owner, pages):
        own = self.tables.setdefault(owner, [])
        for _ in range(pages):
            if not self.free:
                raise OutOfPages("no page is left")
            own.append(self.free.pop())
        return own

    def release(self, owner):
        self.free.extend(self.tables.pop(owner, []))


@wrong("PageTable", "You refuse an owner that needs exactly the pages that are free. The last page may be used too.")
@changed(PageTable, ("if pages > len(self.free):", "if pages >= len(self.free):"))
class TheLastPageStaysFree: ...


@wrong("PageTable", "An owner that has pages already loses them when it gets new ones. They are appended.")
@changed(PageTable, ("self.tables.setdefault(owner, []).extend(new)", "self.tables[owner] = new"))
class TheOldPagesAreLost: ...


@wrong("PageTable", "The new pages are in front of the earlier ones. A text's pages have to stay in order: append.")
@changed(
    PageTable,
    ("self.tables.setdefault(owner, []).extend(new)", "self.tables[owner] = new + self.tables.get(owner, [])"),
)
class NewPagesInFront: ...


@wrong("PageTable", "The pages that you give away stay in `free`, so that two owners get the same page.")
@changed(PageTable, ("[self.free.pop() for _ in range(pages)]", "self.free[len(self.free) - pages :]"))
class GivenAwayTwice: ...


@wrong("PageTable", "You return only the new pages. All pages of the owner are wanted.")
@changed(PageTable, ("return self.tables[owner]", "return new"))
class OnlyTheNewOnes: ...


@wrong("PageTable", "A release takes the pages from the owner but does not put them back into `free`.")
@changed(PageTable, ("self.free.extend(self.tables.pop(owner, []))", "self.tables.pop(owner, [])"))
class LostAtTheRelease: ...


@wrong("PageTable", "A release puts the pages into `free`, but the owner keeps them too.")
@changed(PageTable, ("self.tables.pop(owner, [])", "self.tables.get(owner, [])"))
class KeptAtTheRelease: ...


@wrong("PageTable", "After a release the owner is still in `tables`, with an empty list. It should not be.")
class AnEmptyListStays(Start):
    def allocate(self, owner, pages):
        return PageTable.allocate(self, owner, pages)

    def release(self, owner):
        if owner in self.tables:
            self.free += self.tables[owner]
            self.tables[owner] = []


@wrong("PageTable", "A release frees one page of the owner. It frees all of them.")
class OnePageIsFreed(Start):
    def allocate(self, owner, pages):
        return PageTable.allocate(self, owner, pages)

    def release(self, owner):
        if owner in self.tables:
            self.free.append(self.tables[owner].pop())
            if not self.tables[owner]:
                del self.tables[owner]


@wrong("PageTable", "A release of an owner without pages raises an error. Nothing should happen.")
@changed(PageTable, ("self.tables.pop(owner, [])", "self.tables.pop(owner)"))
class AnErrorForUnknownOwners: ...


@wrong("PageTable", "A release frees the pages of all owners.")
class EverythingIsReleased(Start):
    def allocate(self, owner, pages):
        return PageTable.allocate(self, owner, pages)

    def release(self, owner):
        if owner in self.tables:
            self.free = list(range(len(self.free) + sum(map(len, self.tables.values()))))
            self.tables = {}


@wrong(
    "PageTable",
    "You give an owner only pages that are neighbours, and refuse it when there are enough free pages in other places. "
    "That is the fragmentation which pages avoid.",
)
class NeighboursOnly(Start):
    def allocate(self, owner, pages):
        self.free.sort()
        for at in range(len(self.free) - pages + 1):
            new = self.free[at : at + pages]
            if not new or new[-1] - new[0] == pages - 1:
                del self.free[at : at + pages]
                self.tables.setdefault(owner, []).extend(new)
                return self.tables[owner]
        raise OutOfPages("no gap is large enough")

    def release(self, owner):
        self.free.extend(self.tables.pop(owner, []))


# --- to_evict ----------------------------------------------------------------------------------------


@right("to_evict")
def by_index(adapters, missing):
    names, place = [], 0
    while missing > 0 and place < len(adapters):
        name, pages, users = adapters[place]
        if users == 0:
            names.append(name)
            missing = missing - pages
        place += 1
    return names


@right("to_evict")
def by_running_sums(adapters, missing):
    unused = [(name, pages) for name, pages, users in adapters if not users]
    before = itertools.accumulate((pages for _, pages in unused), initial=0)
    return [name for (name, _), freed in zip(unused, before) if freed < missing]


@right("to_evict")
def recursively(adapters, missing):
    if missing <= 0 or not adapters:
        return []
    (name, pages, users), *rest = adapters
    return recursively(rest, missing) if users else [name, *recursively(rest, missing - pages)]


@right("to_evict")
def in_numpy_by_a_search(adapters, missing):
    unused = [one for one in adapters if one[2] == 0]
    if missing <= 0 or not unused:
        return []
    sums = np.cumsum([pages for _, pages, _ in unused])
    return [name for name, _, _ in unused[: int(np.searchsorted(sums, missing)) + 1]]


@wrong("to_evict", "You evict adapters that running requests use. Their next pass would read the pages of others.")
@changed(to_evict, ("if not users:", "if True:"))
def also_used_ones(): ...


@wrong("to_evict", "You evict the adapters that running requests use, and keep the unused ones.")
@changed(to_evict, ("if not users:", "if users:"))
def only_used_ones(): ...


@wrong("to_evict", "You evict the most recently used adapter first. The least recently used one comes first.")
def the_most_recently_used(adapters, missing):
    return to_evict(adapters[::-1], missing)


@wrong("to_evict", "You evict the largest adapter first. What counts is how long ago it was used.")
def the_largest_first(adapters, missing):
    return to_evict(sorted(adapters, key=lambda one: -one[1]), missing)


@wrong("to_evict", "You evict the smallest adapter first. What counts is how long ago it was used.")
def the_smallest_first(adapters, missing):
    return to_evict(sorted(adapters, key=lambda one: one[1]), missing)


@wrong("to_evict", "You evict one adapter more than is needed. If as many pages are free as are missing, stop.")
@changed(to_evict, ("if missing <= 0:", "if missing < 0:"))
def one_too_many(): ...


@wrong("to_evict", "You stop before enough pages are free: an adapter with more pages than are missing has to go too.")
@changed(to_evict, ("if not users:", "if not users and pages <= missing:"))
def only_what_fits(): ...


@wrong("to_evict", "You evict as many adapters as pages are missing. An adapter has several pages.")
@changed(to_evict, ("missing -= pages", "missing -= 1"))
def adapters_are_counted(): ...


@wrong("to_evict", "You stop at the first adapter in use. Unused ones behind it can be evicted.")
@changed(to_evict, ("if missing <= 0:", "if missing <= 0 or users:"))
def stops_at_a_used_one(): ...


@wrong("to_evict", "You evict all unused adapters, however many pages are missing. Others may need them again.")
@changed(to_evict, ("if missing <= 0:", "if False:"))
def all_unused_ones(): ...


@wrong("to_evict", "You evict nothing if the unused adapters have too few pages. In this case all of them go.")
def all_or_nothing(adapters, missing):
    enough = sum(pages for _, pages, users in adapters if not users) >= missing
    return to_evict(adapters, missing) if enough else []


@wrong("to_evict", "You evict an adapter even if no page is missing. Look at the number before the first one.")
def at_least_one(adapters, missing):
    return to_evict(adapters, max(1, missing))


@wrong("to_evict", "You return the number of pages that become free. The names of the adapters are wanted.")
def the_pages_that_become_free(adapters, missing):
    names = to_evict(adapters, missing)
    return sum(pages for name, pages, _ in adapters if name in names)


@wrong("to_evict", "The names are in the wrong order: the adapter that is evicted first comes first.")
def the_last_one_first(adapters, missing):
    return to_evict(adapters, missing)[::-1]


@wrong("to_evict", "You return what stays in the pool. The names of the evicted adapters are wanted.")
def what_stays(adapters, missing):
    names = to_evict(adapters, missing)
    return [name for name, _, _ in adapters if name not in names]
