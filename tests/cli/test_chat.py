"""`pore chat`, with questions from a pipe, on a tiny checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from cases import CASES
from helpers.command_line import run
from pore.cli.answering import shown_in
from pore.cli.chat import Conversation
from pore.data.loading import load_model
from pore.errors import InputError

LONGEST = ("--max-new-tokens", "3")


def ask(lines: str, *arguments: object, code: int = 0) -> Any:
    return run("chat", *arguments, *LONGEST, code=code, stdin=lines)


def test_the_first_answer_is_that_of_generate(model: Path, data: Path) -> None:
    given = (data / "0.png", "-m", model, "--keep", "4")
    found = ask("w6 w7\n\nw8 w9\n", *given)
    alone = run("generate", given[0], "w6 w7", *given[1:], *LONGEST, "--json").stdout
    lines = found.stdout.splitlines()
    assert lines[:2] == [json.loads(alone)["answer"], "Kept 4 of 16 visual tokens."]
    assert len(lines) == 3  # nothing is kept of a turn without an image
    assert ask("w6 w7\n", *given).stdout.splitlines() == lines[:2]


def test_a_further_image_and_what_is_refused(model: Path, data: Path) -> None:
    lines = f"/picture\n/image missing.png\nw6\n/image {data / '1.png'}\n<image> w7\nw8\n"
    found = ask(lines, data / "0.png", "-m", model, "--keep", "4")
    assert found.stdout.count("Kept 4 of 16 visual tokens.") == 2
    for message in ("'/picture' is no command", "missing.png", "holds <image>"):
        assert message in found.stderr
    assert "holds" in ask("<image>\n", data / "0.png", "-m", model).stderr
    assert (
        "asks for more visual"
        in ask("w6\n", data / "0.png", "-m", model, "--keep", "99", code=1).stderr
    )


@pytest.mark.parametrize("pruner", [None, pore.FastV(keep=4), pore.DivPrune(keep=4)], ids=str)
def test_turns_over_the_cache_are_the_whole_conversation(
    model: Path, data: Path, pruner: Any
) -> None:
    """All turns in one prompt; pruned, the same turns over one cache, fed by hand."""
    loaded, processor = load_model(str(model), device="cpu")
    shown = [shown_in(data / "0.png", 1)]
    how = {"max_new_tokens": 3, "do_sample": False}

    def talked(method: Any) -> tuple[Any, torch.Tensor]:
        talk = Conversation(loaded, processor, method, how)
        talk.answer(talk.turn("w6 w7", shown))
        talk.answer(talk.turn("w8", []))
        assert talk._said is not None
        return talk.turn("w9", []), talk._said

    with torch.no_grad():
        if pruner is None:
            turn, said = talked(None)
            pixels = processor(images=shown[0].load(), text="<image>", return_tensors="pt")
            whole = loaded.generate(
                input_ids=said[:, :-3], pixel_values=pixels["pixel_values"], **how
            )
            assert torch.equal(whole, said)
            assert turn["attention_mask"].shape[1] == said.shape[1] + turn["input_ids"].shape[1] - 1
            return
        with pruner(loaded) as run_:
            turn, said = talked(pruner)
        assert len(run_.report) == 1  # later turns bring no image
        assert [len(image.kept) for image in run_.report.samples[0].images] == [4]
        assert turn["input_ids"][0, 0] == said[0, -1]


def test_positions_on_several_axes_are_given_once(data: Path) -> None:
    """`generate` gives images their places only in the first turn of Qwen-VL."""
    (case,) = (case for case in CASES if case.name == "Qwen2.5-VL")
    talk = Conversation(case.model(), None, None, {})
    talk._said = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match="begin another conversation"):
        talk.turn("w6", [shown_in(data / "0.png", 1)])
