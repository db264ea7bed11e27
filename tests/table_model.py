"""A page table in plain Python lists, with a shadow of what the pages hold, to compare the real one against.

Every token is a number that no other token has. `Driver` sends each transition to the real table and to the lists,
applies the copies and writes to the shadow of the pages, and reads every row and handle back from the shadow: it must
find exactly the tokens that the sequence appended.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.fault import Fault
from paged_jax.cache.handles import PageHandle
from paged_jax.cache.page_table import PageTable

CONFIG = CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=8, num_pages=24, max_sequences=6, max_pages_per_sequence=5, page_size=4
)
P, B, M, S = CONFIG.num_pages, CONFIG.max_sequences, CONFIG.max_pages_per_sequence, CONFIG.page_size
WINDOWS = (1, 3, 4, 9)
POISON = -1  # what the shadow of a free page holds

NAMES = "reserve release truncate slide fork permute publish attach drop drop_pages clear_fault reset".split()


class Transitions:
    """Every transition of PageTable, jitted; `num_traces` counts how often each was traced."""

    def __init__(self):
        self.num_traces = Counter()
        for name in NAMES:
            setattr(self, name, self.jit(name, self.counted(name)))

    def counted(self, name: str) -> Callable:
        def transition(*args):
            self.num_traces[name] += 1
            return getattr(PageTable, name)(*args)

        return transition

    @staticmethod
    def jit(name: str, transition: Callable) -> Callable:
        return jax.jit(transition, static_argnums=1 if name == "slide" else ())


TRANSITIONS: Any = Transitions()  # compiled once for all tests of a process


def num_columns(length: int) -> int:
    return -(-length // S)


@dataclass
class Row:
    tokens: list[int]
    first: int = 0  # first mapped column

    def copy(self) -> "Row":
        return Row(list(self.tokens), self.first)


@dataclass(eq=False)
class Held:
    """A handle that is out, and what it must hold."""

    handle: PageHandle
    pages: list[int]
    row: Row


class Driver:
    """Runs the real table and the lists side by side and compares them after every transition."""

    def __init__(self, transitions: Any = TRANSITIONS):
        self.run = transitions
        self.table = PageTable.create(CONFIG)
        self.rows = [Row([]) for _ in range(B)]
        self.held: list[Held] = []
        self.dropped: list[PageHandle] = []  # their pages may live on in rows, so only some are seen to be stale
        self.shadow = [[POISON] * S for _ in range(P)]
        self.fault, self.epoch = Fault(0), 0
        self.num_transitions = 0
        self.next_token = 0
        self.refresh()

    def refresh(self) -> None:
        table = self.table
        self.refcounts: list[int] = np.asarray(table.refcounts).tolist()
        self.pages: list[list[int]] = np.asarray(table.pages).tolist()

    @property
    def num_free(self) -> int:
        return self.refcounts.count(0)

    # transitions

    def reserve(self, new_tokens: Sequence[int], priority: Sequence[int] | None = None) -> list[bool]:
        granted = self.predict_reserve(new_tokens, priority)
        before = self.pages
        args = [np.array(x, np.int32) for x in (new_tokens, priority) if x is not None]
        self.table, reservation = self.run.reserve(self.table, *args)
        assert np.asarray(reservation.granted).tolist() == granted, "granted other rows"
        self.refresh()
        source, target = (np.asarray(x).tolist() for x in reservation[1:])
        pairs = [(s, t) for s, t in zip(source, target, strict=True) if t != 0]
        assert all(s == 0 for s, t in zip(source, target, strict=True) if t == 0), "a source without a target"
        assert len({t for _, t in pairs}) == len(pairs), "two copies to one page"
        for (_, t), content in zip(pairs, [list(self.shadow[s]) for s, _ in pairs], strict=True):
            self.shadow[t] = content
        for b, row in enumerate(self.rows):
            if not granted[b]:
                assert self.pages[b] == before[b], "a refused row changed"
                continue
            for _ in range(new_tokens[b]):
                column, slot = divmod(len(row.tokens), S)
                page = self.pages[b][column]
                assert self.refcounts[page] == 1, "an append to a page with other owners"
                self.shadow[page][slot] = self.next_token
                row.tokens.append(self.next_token)
                self.next_token += 1
        self.compare()
        return granted

    def predict_reserve(self, new_tokens: Sequence[int], priority: Sequence[int] | None) -> list[bool]:
        order = sorted(range(B), key=lambda b: 0 if priority is None else priority[b])
        refcounts, free, blocked = list(self.refcounts), self.num_free, False
        granted = [True] * B
        for b in order:
            length, n = len(self.rows[b].tokens), new_tokens[b]
            if n < 0:
                self.fault |= Fault.BAD_ARGUMENT
                granted[b] = False
            elif n > M * S - length:
                self.fault |= Fault.ROW_FULL
                granted[b] = False
            elif n > 0:
                fresh = num_columns(length + n) - num_columns(length)
                last = self.pages[b][length // S] if length % S else 0
                copies = last != 0 and refcounts[last] > 1
                may_need = fresh > 0 or (last != 0 and self.refcounts[last] > 1)
                if may_need and (blocked or fresh + copies > free):
                    self.fault |= Fault.OUT_OF_PAGES
                    granted[b], blocked = False, True
                    continue
                free -= fresh + copies
                if copies:
                    refcounts[last] -= 1
        return granted

    def release(self, mask: Sequence[bool]) -> None:
        self.table = self.run.release(self.table, np.array(mask, bool))
        for b in range(B):
            if mask[b]:
                self.rows[b] = Row([])
        self.compare()

    def truncate(self, lengths: Sequence[int]) -> None:
        self.table = self.run.truncate(self.table, np.array(lengths, np.int32))
        for row, n in zip(self.rows, lengths, strict=True):
            if 0 <= n <= len(row.tokens) and (n == 0 or n >= row.first * S):
                del row.tokens[n:]
                row.first = row.first if n else 0
            else:
                self.fault |= Fault.BAD_ARGUMENT
        self.compare()

    def slide(self, window: int) -> None:
        self.table = self.run.slide(self.table, window)
        for row in self.rows:
            # the next token, at position len(tokens), sees positions from len(tokens) - window + 1
            while row.first < num_columns(len(row.tokens)) and (row.first + 1) * S <= len(row.tokens) - window + 1:
                row.first += 1
        self.compare()

    def fork(self, pairs: Sequence[tuple[int, int]]) -> list[bool]:
        parents, children = (np.array(x, np.int32) for x in zip(*pairs, strict=True))
        self.table, ok = self.run.fork(self.table, parents, children)
        asked = [child for parent, child in pairs if parent != -1 and child != -1]
        expected, rows = [], [row.copy() for row in self.rows]
        for parent, child in pairs:
            skipped = parent == -1 or child == -1
            good = 0 <= parent < B and 0 <= child < B and not self.rows[child].tokens and asked.count(child) == 1
            expected.append(good and not skipped)
            if expected[-1]:
                rows[child] = self.rows[parent].copy()
            elif not skipped:
                self.fault |= Fault.BAD_ARGUMENT
        assert np.asarray(ok).tolist() == expected, "forked other pairs"
        self.rows = rows
        self.compare()
        return expected

    def permute(self, parents: Sequence[int]) -> None:
        self.table = self.run.permute(self.table, np.array(parents, np.int32))
        if not all(0 <= parent < B for parent in parents):
            self.fault |= Fault.BAD_ARGUMENT
        self.rows = [self.rows[p if 0 <= p < B else b].copy() for b, p in enumerate(parents)]
        self.compare()

    def publish(self, slot: int, num_tokens: int, first_column: int = 0) -> bool:
        args = (np.int32(x) for x in (slot, num_tokens, first_column))
        self.table, handle = self.run.publish(self.table, *args)
        row = self.rows[slot] if 0 <= slot < B else Row([])
        first = max(first_column, row.first)
        ok = 0 <= slot < B and first * S <= num_tokens <= len(row.tokens)
        if not ok:
            self.fault |= Fault.BAD_ARGUMENT
        kept = Row(row.tokens[:num_tokens], first) if ok else Row([])
        assert (int(handle.num_tokens), int(handle.first_column)) == (len(kept.tokens), kept.first), "wrong handle"
        self.held.append(Held(handle, np.asarray(handle.pages).tolist(), kept))
        self.compare()
        return ok

    def attach(self, slot: int, handle: PageHandle) -> bool:
        held = next((held for held in self.held if held.handle is handle), None)
        is_free_slot = 0 <= slot < B and not self.rows[slot].tokens
        if held is None:
            assert self.is_seen_to_be_stale(handle), "a dropped handle whose pages live on must not be used"
            self.fault |= Fault.STALE_HANDLE
        if not is_free_slot:
            self.fault |= Fault.BAD_ARGUMENT
        self.table, ok = self.run.attach(self.table, np.int32(slot), handle)
        assert bool(ok) == (held is not None and is_free_slot), "attached, or not"
        if held is not None and is_free_slot and held.row.tokens:
            self.rows[slot] = held.row.copy()
        self.compare()
        return bool(ok)

    def drop(self, handle: PageHandle) -> None:
        i = next((i for i, held in enumerate(self.held) if held.handle is handle), None)
        if i is None:
            assert self.is_seen_to_be_stale(handle), "a dropped handle whose pages live on must not be dropped again"
            self.fault |= Fault.STALE_HANDLE
        else:
            self.dropped.append(self.held.pop(i).handle)
        self.table = self.run.drop(self.table, handle)
        self.compare()

    def drop_pages(self, held: Sequence[Held]) -> None:
        """Give up at most two handles, page by page and at once."""
        pages = [page for each in held for page in each.pages if page]
        for each in held:
            self.held.remove(each)
            self.dropped.append(each.handle)
        self.table = self.run.drop_pages(self.table, np.array(pages + [0] * (2 * M - len(pages)), np.int32))
        self.compare()

    def is_seen_to_be_stale(self, handle: PageHandle) -> bool:
        """Whether the table itself can tell: another epoch, or one of its pages is free."""
        ids = [page for page in np.asarray(handle.pages).tolist() if page]
        return int(handle.epoch) != self.epoch or any(self.refcounts[page] == 0 for page in ids)

    def clear_fault(self) -> None:
        self.table = self.run.clear_fault(self.table)
        self.fault = Fault(0)
        self.compare()

    def reset(self) -> None:
        self.table = self.run.reset(self.table)
        self.rows = [Row([]) for _ in range(B)]
        self.dropped += [held.handle for held in self.held]
        self.held, self.fault = [], Fault(0)
        self.epoch += 1
        self.compare()

    # what must hold after each of them

    def compare(self) -> None:
        table = self.table
        self.num_transitions += 1
        self.refresh()
        lengths, first = np.asarray(table.lengths).tolist(), np.asarray(table.first_column).tolist()
        assert lengths == [len(row.tokens) for row in self.rows], "lengths"
        assert first == [row.first for row in self.rows], "first columns"
        assert int(table.fault) == self.fault, "faults"
        assert (int(table.version), int(table.epoch)) == (self.num_transitions, self.epoch), "version, epoch"

        owners = Counter(page for row in self.pages for page in row)
        owners.update(page for held in self.held for page in held.pages)
        assert all(self.refcounts[page] == owners[page] for page in range(1, P)), "a refcount is not its owners"
        assert self.refcounts[0] == 1, "the null page"
        num_free = int(table.num_free)
        free = [page for page in range(P) if self.refcounts[page] == 0]
        assert num_free == len(free), "num_free"
        assert sorted(np.asarray(table.free_stack)[:num_free].tolist()) == free, "the free stack"

        for page in free:
            self.shadow[page] = [POISON] * S
        for pages, row in zip(self.pages, self.rows, strict=True):
            self.read_back(pages, row)
        for held in self.held:
            self.read_back(held.pages, held.row)

    def read_back(self, pages: list[int], row: Row) -> None:
        stop = num_columns(len(row.tokens))
        mapped = pages[row.first : stop]
        assert all(0 < page < P for page in mapped), "a mapped column without a page"
        assert len(set(mapped)) == len(mapped), "a page twice in a row"
        assert not any(pages[: row.first]) and not any(pages[stop:]), "a page outside the mapped columns"
        for column in range(row.first, stop):
            tokens = row.tokens[column * S : (column + 1) * S]
            assert self.shadow[pages[column]][: len(tokens)] == tokens, "a sequence reads another's token"

    def release_everything(self) -> None:
        self.release([True] * B)
        for held in list(self.held):
            self.drop(held.handle)
        assert self.num_free == P - 1, "pages leaked"
