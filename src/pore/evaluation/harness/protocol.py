"""LLaVA-1.5's own way of putting benchmarks, as functions for tasks of lmms-eval.

Published figures of LLaVA-1.5 and of methods on it come from LLaVA's scripts (haotian-liu/LLaVA,
`scripts/v1_5/eval`), which differ from lmms-eval's tasks in details that move scores by points:
vicuna's system prompt, pictures padded to a square, OCR tokens in TextVQA, how an answer to POPE is
read. Questions and scorers that are the same are lmms-eval's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from pore._files import write_atomic

if TYPE_CHECKING:
    from argparse import Namespace

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
"""The system prompt of `vicuna_v1`. The chat template of llava-hf/llava-1.5-7b-hf leaves it out
unless the conversation brings it."""

BACKGROUND = (122, 116, 104)
"""The colour that pictures are padded with: the mean of CLIP's pictures, cut to whole numbers."""

_HARNESS = "lmms_eval.tasks"

_LETTERS = "ABCDE"

Doc = Mapping[str, Any]


# -- pictures and conversations -------------------------------------------------------------------


def padded(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture in the middle of a square of LLaVA's background colour (`expand2square`)."""
    image = image.convert("RGB")
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def picture(doc: Doc) -> list[PIL.Image.Image]:
    """The picture of a document, padded."""
    return [padded(doc["image"])]


def conversation(doc: Doc, question: str) -> list[dict[str, Any]]:
    """The conversation about a document: vicuna's system prompt, the picture, the question."""
    asked = [{"type": "image", "url": padded(doc["image"])}, {"type": "text", "text": question}]
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": asked},
    ]


def _as_in(module: str, function: str) -> Callable[[Doc, Mapping[str, Any]], list[dict[str, Any]]]:
    """Conversations with the questions that a function of lmms-eval gives."""

    def messages(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        question = getattr(import_module(f"{_HARNESS}.{module}"), function)
        return conversation(doc, question(doc, lmms_eval_specific_kwargs))

    return messages


vqav2 = _as_in("vqav2.utils", "vqav2_doc_to_text")
gqa = _as_in("gqa.utils", "gqa_doc_to_text")
vizwiz = _as_in("vizwiz_vqa.utils", "vizwiz_vqa_doc_to_text")
sqa = _as_in("scienceqa.utils", "sqa_doc_to_text")
textvqa = _as_in("textvqa.utils", "textvqa_doc_to_text")
pope = _as_in("pope.utils", "pope_doc_to_text")
mme = _as_in("mme.utils", "mme_doc_to_text")


# -- POPE -----------------------------------------------------------------------------------------


def yes_or_no(answer: str) -> str:
    """What an answer to POPE counts as: "no" if its first sentence holds no, No or not.

    Args:
        answer: What the model wrote.

    Returns:
        "yes" or "no".
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """lmms-eval's results of a document of POPE, with the split that it belongs to."""
    scored = import_module(f"{_HARNESS}.pope.utils").pope_process_results
    found = scored(doc, [yes_or_no(results[0])])
    return {name: {**one, "category": doc["category"]} for name, one in found.items()}


def pope_f1(results: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the F1 of POPE's three splits: random, popular and adversarial."""
    f1 = import_module(f"{_HARNESS}.pope.utils").pope_aggregate_f1_score
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        splits.setdefault(result["category"], []).append(result)
    return sum(float(f1(own)) for own in splits.values()) / len(splits)


# -- MMBench --------------------------------------------------------------------------------------


def _is_given(text: Any) -> bool:
    """Whether a cell of MMBench's table holds something; empty ones came through pandas."""
    return isinstance(text, str) and text.strip().lower() not in ("", "nan", "none")


def mmbench_question(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
    """A question of MMBench: hint, question and options, each on a line."""
    options = [f"{letter}. {doc[letter]}" for letter in _LETTERS if _is_given(doc.get(letter))]
    hint = [doc["hint"]] if _is_given(doc["hint"]) else []
    asked: str = "\n".join([*hint, doc["question"], *options])
    return f"{asked}{lmms_eval_specific_kwargs['post_prompt']}"


def mmbench(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation about a document of MMBench."""
    return conversation(doc, mmbench_question(doc, lmms_eval_specific_kwargs))


def mmbench_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """What the scorer of MMBench needs of a document and its answer."""
    found = import_module(f"{_HARNESS}.mmbench.en_utils").mmbench_process_results(doc, results)
    own = found["gpt_eval_score"]
    # An option that is not there is the text "nan" in lmms-eval's results, which "banana" holds.
    options = {letter: own[letter] if _is_given(own[letter]) else None for letter in _LETTERS}
    return {"accuracy": {**own, **options}}


def mmbench_accuracy(results: Sequence[Mapping[str, Any]]) -> float:
    """The share of questions that were answered rightly in every order of their options, in %.

    The letter is read from the answer by lmms-eval's rules; no model judges.
    """
    scorer = import_module(f"{_HARNESS}.mmbench.en_utils").mmbench_evaluator
    overall, *_ = scorer.eval_result([dict(one) for one in results], eval_method="static")
    return 100 * float(overall)


# -- MM-Vet ---------------------------------------------------------------------------------------


def mmvet_question(doc: Doc) -> str:
    """A question of MM-Vet, as it stands."""
    return str(doc["question"])


def mmvet(doc: Doc) -> list[dict[str, Any]]:
    """The conversation about a document of MM-Vet."""
    return conversation(doc, mmvet_question(doc))


def mmvet_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """An answer to MM-Vet under the name that its judge knows it by."""
    number = re.sub(r"^v1_", "", str(doc["question_id"]))
    return {"submission": {"id": f"v1_{number}", "answer": results[0]}}


def mmvet_submission(results: Sequence[Mapping[str, str]], args: Namespace | None) -> None:
    """Write the answers for MM-Vet's judge, into `submissions` of lmms-eval's output folder."""
    out = getattr(args, "output_path", None) or "."
    answers = {one["id"]: one["answer"] for one in results}
    path = Path(out) / "submissions" / "llava_mmvet.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(answers, indent=2, ensure_ascii=False))
