"""What a request may say of its images: nothing wrong gets past the check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pore.engine.embeddings import KeptEmbeddings
from pore.errors import InputError, UnsupportedModelError
from pore.serving.vllm.indices import KEY, check_keys, checked, entries, kept_of


def entry(*kept: Any, grid: Any = (2, 3)) -> dict[str, Any]:
    return {"grid": list(grid), "kept": list(kept)}


def test_what_a_client_sends_is_what_a_server_reads() -> None:
    image = KeptEmbeddings(0, 0, 6, (1, 4, 5), torch.zeros(3, 2), (2, 3))
    (sent,) = entries([image])
    (read,) = checked([sent], 1)
    assert kept_of(read, (2, 3), 0) == [1, 4, 5]
    assert checked(None, 2) == [None, None]
    assert kept_of(None, (2, 3), 0) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"grid": [2, 3]}, "a list with one entry for each of the 1 images"),
        ([], "a list with one entry"),
        ([entry(0), entry(1)], "a list with one entry"),
        (["all"], "not of the form"),
        ([[0, 1]], "not of the form"),
        ([{**entry(0), "more": 1}], "not of the form"),
        ([{"kept": [0]}], "not of the form"),
        ([entry(0, grid=(6,))], "its grid is not two numbers"),
        ([entry(0, grid=(0, 6))], "its grid is not two numbers"),
        ([entry(0, grid=(2, 3.0))], "its grid is not two numbers"),
        ([{"grid": [2, 3], "kept": 0}], "not a list of whole numbers"),
        ([entry()], "at least one"),
        ([entry(0, "1")], "not a list of whole numbers"),
        ([entry(0, 1.0)], "not a list of whole numbers"),
        ([entry(False, True)], "not a list of whole numbers"),
        ([entry(0, None)], "not a list of whole numbers"),
        ([entry(2, 1)], "does not ascend"),
        ([entry(1, 1)], "repeats a number"),
        ([entry(-1, 1)], "outside of 0 to 5"),
        ([entry(1, 6)], "outside of 0 to 5"),
        ([entry(1, 2**70)], "outside of 0 to 5"),
    ],
)
def test_what_is_wrong_is_refused(said: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        checked(said, 1)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["grid", "kept", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(said=_JSON | st.lists(st.fixed_dictionaries({"grid": _JSON, "kept": _JSON}), max_size=2))
def test_nothing_else_than_a_choice_comes_through(said: Any) -> None:
    try:
        found = checked(said, 2)
    except InputError:
        return
    for one in found:
        if one is not None:
            rows, columns = one["grid"]
            kept = kept_of(one, (rows, columns), 0)
            assert kept == sorted(set(kept))
            assert set(kept) <= set(range(rows * columns))


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"chosen on \(2, 3\) tokens, and the server"):
        kept_of(entry(0), (3, 2), 0)


def test_other_settings_of_a_request_are_refused() -> None:
    check_keys({KEY: []}, taken=True)
    check_keys({}, taken=False)
    with pytest.raises(InputError, match=r"may hold nothing here, not \['max_pixels', 'size'\]"):
        check_keys({"size": {}, "max_pixels": 5}, taken=False)
    with pytest.raises(InputError, match=r"alone here, not \['max_pixels'\]"):
        check_keys({KEY: [], "max_pixels": 5}, taken=True)
    with pytest.raises(InputError, match="chooses what is kept of images, and takes no"):
        check_keys({KEY: []}, taken=False)


@pytest.mark.parametrize(("kept", "grid"), [((0, -1), (2, 3)), ((0, 1), None)])
def test_tokens_without_a_place_are_not_sent(kept: Any, grid: Any) -> None:
    image = KeptEmbeddings(0, 0, 6, kept, torch.zeros(2, 2), grid)
    with pytest.raises(UnsupportedModelError, match="stand for no place"):
        entries([image])
