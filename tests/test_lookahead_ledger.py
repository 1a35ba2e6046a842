"""Who wrote what in a row's store, and what its hits owe: the account by itself, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dllm.decoding.canvas import Plan
from dllm.lookahead.branches import Branch, Evaluated, Query, queries
from dllm.lookahead.ledger import History, Ledger

# -- what equal queries are -------------------------------------------------------------------------------------------


HISTORY = History({0: np.array([1, 2, 3, 4, 5])})  # of the five slots of a lane


def query(history: History = HISTORY, **changes: Any) -> Query:
    """One row that feeds columns 2 and 3, sees slots 0 to 3 and keeps column 2."""
    table = {
        "ids": [[7, 8]], "pos": [[2, 3]], "fresh": [[True, True]], "keep": [[True, False]],
        "visible": [[[True, True, True, True, False]] * 2], "lane": [0], **changes,
    }  # fmt: skip
    tensors = {k: None if v is None else torch.tensor(v) for k, v in table.items()}
    plan = Plan(**tensors, known=None, refresh=False, stored=True)
    return history.name(queries(plan, 1)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": [[7, 9]]},
        {"pos": [[2, 4]]},
        {"keep": [[False, False]]},
        {"keep": [[True, True]]},
        {"fresh": [[True, False]], "visible": [[[True] * 4 + [False] * 3] * 2]},
        {"visible": [[[True, False, True, True, False]] * 2]},
        {"visible": [[[True, False, True, True, False], [True, True, True, True, False]]]},  # to one of its queries
        {"history": History({0: np.array([1, 9, 3, 4, 5])})},
    ],
    ids="+".join,
)
def test_queries_that_may_be_answered_differently_have_different_keys(changes: dict[str, Any]) -> None:
    assert query(**changes).key != query().key


def test_private_queries_that_see_each_other_differently_have_different_keys() -> None:
    private = {"fresh": [[True, False]]}
    one, other = [[True] * 4 + [False, False, False], [True] * 4 + [False, False, True]], [[True] * 4 + [False] * 3] * 2
    assert query(**private, visible=[one]).key != query(**private, visible=[other]).key


def test_what_a_query_does_not_see_is_not_in_its_key() -> None:
    """Slots 2 and 3 it writes itself, slot 4 it does not see."""
    assert query(History({0: np.array([1, 2, 8, 8, 8])})).key == query().key


def test_padding_and_what_is_said_by_default_are_not_in_the_key() -> None:
    padded = query(ids=[[7, 8, 0]], pos=[[2, 3, -1]], fresh=[[True, True, False]], keep=[[True, False, False]],
                   visible=[[[True, True, True, True, False]] * 3])  # fmt: skip
    assert padded.key == query(fresh=None).key == query().key
    assert (
        query(visible=[[[True, True, True, True, False]]]).outside[0].tolist() == query().outside[0].tolist() == [0, 1]
    )


def test_only_kept_slots_change_their_author() -> None:
    assert HISTORY.after(query(), 7).authors[0].tolist() == [1, 2, 7, 4, 5]
    assert HISTORY.authors[0].tolist() == [1, 2, 3, 4, 5]


def test_a_query_is_behind_where_it_sees_a_slot_of_another_history() -> None:
    for slot, behind in enumerate([True, True, False, False, False]):
        other = History({0: np.where(np.arange(5) == slot, 9, HISTORY.authors[0])})
        assert HISTORY.differs(other, query()) is behind


# -- what hits owe ----------------------------------------------------------------------------------------------------


def ledger(steady: bool = True) -> Ledger:
    return Ledger([0], 5, steady=steady)


def asks(book: Ledger, column: int, keeps: bool = True) -> Query:
    """A query of one column that sees slots 0 to 3, named by what the plain call wrote so far."""
    table = {
        "ids": [[7]], "pos": [[column]], "fresh": [[True]], "keep": [[keeps]],
        "visible": [[[True, True, True, True, False]]], "lane": [0],
    }  # fmt: skip
    plan = Plan(**{k: torch.tensor(v) for k, v in table.items()}, known=None, refresh=False, stored=True)
    return book.plain.name(queries(plan, 1)[0])


def hit(book: Ledger, column: int, keeps: bool = True) -> Evaluated:
    """A step at this column that finds its answer in the memo."""
    answer = Evaluated(Branch(asks(book, column, keeps), 0, 1, torch.zeros(5)), torch.zeros(1, 1, 2))
    book.owes(answer)
    return answer


def test_a_forward_of_the_plain_call_leaves_nothing_owed() -> None:
    book = ledger()
    first, again = asks(book, 2), asks(book, 2)
    assert (first.key, book.number(first)) == (again.key, book.number(again))
    book.wrote(first)
    assert not book.behind(asks(book, 3)) and book.due(asks(book, 2)) == []
    assert asks(book, 3).key != asks(ledger(), 3).key  # it sees what was written


def test_a_hit_is_paid_before_a_forward_sees_what_it_would_have_written() -> None:
    book = ledger()
    owed = [hit(book, 2), hit(book, 3)]
    seeing = asks(book, 1)
    assert book.behind(seeing)
    assert book.due(seeing) == owed  # in their order
    assert not book.behind(seeing) and book.due(seeing) == []


def test_a_hit_that_keeps_nothing_owes_nothing() -> None:
    book = ledger()
    hit(book, 2, keeps=False)
    assert not book.behind(asks(book, 1)) and book.due(None) == []


def test_a_steady_row_pays_only_what_is_seen() -> None:
    """The forward keeps the slot that is owed, so nobody ever sees what a hit would have left there."""
    book = ledger()
    hit(book, 2)
    same = asks(book, 2)
    assert book.due(same) == []
    book.wrote(same)
    assert not book.behind(asks(book, 1)) and book.due(None) == []


def test_a_row_that_is_not_steady_pays_at_once() -> None:
    book = ledger(steady=False)
    owed = hit(book, 2)
    assert book.due(asks(book, 2)) == [owed]


def test_a_row_is_steady_until_a_step_keeps_other_slots() -> None:
    book = ledger()
    for column, steady in ((2, True), (2, True), (3, False), (3, False)):
        book.due(asks(book, column))
        assert book.steady is steady


def test_a_refresh_begins_other_slots() -> None:
    book = ledger()
    book.due(asks(book, 2))
    refresh = asks(book, 1)
    refresh.opening = True
    book.due(refresh)
    book.due(asks(book, 3))
    assert book.steady


def test_a_forward_without_a_name_may_have_written_everything() -> None:
    book = ledger()
    owed = hit(book, 2)
    before = asks(book, 1).key
    assert book.due(None) == [owed]
    book.wrote(None)
    keys = {before, asks(book, 1).key}
    book.wrote(None)
    assert len({*keys, asks(book, 1).key}) == 3
    assert not book.behind(asks(book, 1))


def test_a_step_that_is_taken_again_writes_what_itself_owes() -> None:
    book = ledger()
    first = hit(book, 2)
    second = hit(book, 3)  # sees what the first would have written
    assert book.due_again(second.branch.query) == [first]
    book.wrote(second.branch.query)
    assert not book.behind(asks(book, 1)) and book.due(None) == []


def test_a_step_that_sees_nothing_owed_is_taken_again_as_it_is() -> None:
    book = ledger()
    only = hit(book, 2)
    assert book.due_again(only.branch.query) == []
    book.wrote(only.branch.query)
    assert not book.behind(asks(book, 1)) and book.due(None) == []
