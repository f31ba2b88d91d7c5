"""Settings as lmms-eval hands them over: of any type, and refused where they are unknown."""

from __future__ import annotations

from typing import Any

import pytest

from pore.errors import InputError
from pore.evaluation.harness.arguments import Arguments


def test_the_unpruned_model() -> None:
    read = Arguments.read({"pretrained": "embedded", "batch_size": "4", "device": "cpu"})
    assert read == Arguments("embedded", batch_size=4, device="cpu")
    assert read.method is None


@pytest.mark.parametrize(("keep", "read"), [(128, 128), (0.25, 0.25), ("25%", 0.25), ("64", 64)])
def test_a_method_with_its_settings(keep: Any, read: int | float) -> None:
    given = {
        "pretrained": "llava-hf/llava-1.5-7b-hf",
        "method": "fastv",
        "keep": keep,
        "layer": 2,
        "reweight": "llava.json",
        "allow": "template+layer",
        "faithful": True,
    }
    found = Arguments.read(given)
    assert (found.keep, found.layer, found.reweight) == (read, 2, "llava.json")
    assert found.allow == ("template", "layer")
    assert found.settings == ("faithful=true",)


def test_settings_of_a_method_keep_their_types() -> None:
    given = {"pretrained": "x", "method": "HiPrune", "alpha": 0.2, "object_layer": -2.0}
    assert Arguments.read(given).settings == ("alpha=0.2", "object_layer=-2")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "fastv", "keeep": 128}, r"no setting 'keeep'; the settings are .*keep,"),
        ({"method": "fastv", "alpha": 0.2}, r"no setting 'alpha'.*FastV also has .*faithful"),
        ({"faithful": True}, "no setting 'faithful'"),
        ({"method": "fastw"}, "Did you mean 'FastV'"),
        ({"keep": 128, "layer": 2}, "no use for keep, layer; name one"),
        ({"method": "fastv", "keep": "many"}, "'many' is neither a number of tokens"),
        ({"method": "fastv", "keep": True}, "keep is a number of tokens"),
        ({"method": "fastv", "layer": 2.5}, r"layer is a whole number, not 2\.5"),
        ({"method": "fastv", "average": 1}, "average is true or false, not 1"),
        ({"method": "fastv", "guide": "x"}, "FastV is not guided"),
        ({"batch_size": "auto"}, "batch_size is a whole number from 1, not 'auto'"),
        ({"batch_size": 0}, "batch_size is a whole number from 1, not 0"),
        ({"revision": 1e5}, r"revision=100000\.0 is not a name"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Arguments.read({"pretrained": "embedded", **given})


def test_a_model_is_needed() -> None:
    with pytest.raises(InputError, match=r"Give pretrained=\.\.\."):
        Arguments.read({"method": "fastv"})
