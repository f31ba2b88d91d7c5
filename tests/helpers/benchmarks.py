"""A few made documents of every benchmark, in its own format, which the embedded model can answer.

The model sees a question up to its question mark (`plain_model`): it knows the language of its
scenes and no other. So what is right is known, and with it the score.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pore
from pore.data.loading import load_model
from pore.data.samples import Sample
from pore.data.sources import from_scenes
from pore.evaluation.harness import TASKS
from pore.evaluation.running import evaluate

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white")
NOT_SAID = "zebra"
Docs = list[dict[str, Any]]


def few_questions(folder: Path, number: int) -> None:
    """Write a task "few" for lmms-eval: the first questions of the embedded one."""
    scenes = folder / "scenes.json"
    scenes.write_text(json.dumps([{"split": "test", "questions": number}]))
    (folder / "few.yaml").write_text(
        f"include: {TASKS / 'embedded' / 'pore_embedded.yaml'}\n"
        "task: few\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {scenes}}}}}\n"
    )


def plain_model(folder: Path) -> Path:
    """The embedded model, with a chat template that shows it a question up to its mark."""
    shutil.copytree(pore.embedded_model(), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages if message['role'] == 'user' %}USER: "
        "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ part['text'].split('?')[0] }}? {% endfor %}{% endfor %}ASSISTANT:"
    )
    return folder


def answered(model: Path, split: str = "test", count: int = 126) -> list[Sample]:
    """Questions that the model answers rightly."""
    samples = from_scenes(split, count)
    outcome = evaluate(*load_model(str(model), device="cpu"), samples)
    return [sample for sample, right in zip(samples, outcome.right, strict=True) if right]


def png(sample: Sample) -> dict[str, bytes]:
    """A picture as data sets store it; wider than high, so that it has to be padded."""
    file = io.BytesIO()
    sample.load_image().save(file, "PNG")
    return {"bytes": file.getvalue()}


def _base(samples: Sequence[Sample]) -> Docs:
    return [
        {"image": png(one), "question": one.question, "answer": one.answer, "question_id": str(i)}
        for i, one in enumerate(samples)
    ]


def made(samples: Sequence[Sample]) -> dict[str, Docs]:
    """Documents of every benchmark, by its data set."""
    color = [s for s in samples if s.kind == "color"][:6]
    yes_no = [s for s in samples if s.kind == "existence"][:12]
    letters = [s for s in samples if s.kind == "reading" and str(s.answer) in "ABCE"][:4]
    return {
        "vqav2": _vqa(color, as_dicts=True),
        "vizwiz": _vqa(color),
        "textvqa": [{**doc, "ocr_tokens": ["A", "7"]} for doc in _vqa(color)],
        "gqa": [
            {**doc, "answer": doc["answer"] if i else NOT_SAID}
            for i, doc in enumerate(_base(color))
        ],
        "sqa": [
            {
                **doc,
                "answer": "ABCDE".index(doc["answer"]) if i else 3,
                "choices": ["one", "two", "three", "four", "five"],
                "hint": "",
            }
            for i, doc in enumerate(_base(letters))
        ],
        "pope": [
            {**doc, "category": split, "answer": _flipped(doc["answer"], i == 0 or i == 5)}
            for i, (doc, split) in enumerate(
                zip(_base(yes_no), ("random", "popular", "adversarial") * 4, strict=True)
            )
        ],
        "mme": [
            {
                **doc,
                "question_id": f"{i // 2}.png",
                "question": doc["question"] + " Please answer yes or no.",
                "answer": _flipped(doc["answer"], i == 0).title(),
                "category": "existence" if i < 4 else "code_reasoning",
            }
            for i, doc in enumerate(_base(yes_no[:6]))
        ],
        "mmbench": _mmbench(color[:3]),
        "mmvet": [
            {**doc, "question_id": f"v1_{i}", "capability": "rec"}
            for i, doc in enumerate(_base(color[:3]))
        ],
    }


def _flipped(answer: str, wrong: bool) -> str:
    return {"yes": "no", "no": "yes"}[answer] if wrong else answer


def _vqa(samples: Sequence[Sample], as_dicts: bool = False) -> Docs:
    """Ten annotators each; of the first question none agrees with the model, of the second two."""
    docs = _base(samples)
    for i, doc in enumerate(docs):
        agree = (0, 2)[i] if i < 2 else 10
        answers: list[Any] = [doc["answer"]] * agree + [NOT_SAID] * (10 - agree)
        if as_dicts:
            answers = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers)
            ]
        doc["answers"] = answers
    return docs


def _mmbench(samples: Sequence[Sample]) -> Docs:
    """Every question in two orders of its options; one copy has the wrong letter."""
    docs = []
    for order in range(2):
        for i, sample in enumerate(samples):
            others = [color for color in COLORS if color != sample.answer][:2]
            options = [str(sample.answer), *others]
            options = options[order:] + options[:order]
            right = "ABC"[options.index(str(sample.answer))]
            docs.append(
                {
                    "index": i + order * 1_000_000,
                    "image": png(sample),
                    "question": sample.question,
                    "hint": "nan",
                    "answer": "B" if (order, i) == (1, 1) else right,
                    **dict(zip("ABCD", [*options, "nan"], strict=True)),
                    "category": "attribute",
                    "L2-category": "recognition",
                    "source": "made",
                    "split": "dev",
                }
            )
    return docs


def write_tasks(
    folder: Path, docs: Mapping[str, Docs], tasks: Mapping[str, tuple[str, Path, str]]
) -> list[str]:
    """Write the documents, and tasks that are those of a benchmark but for where their data is.

    Args:
        folder: Where to.
        docs: Documents by data set.
        tasks: For every task its data set, its YAML file, and the split that it reads.

    Returns:
        The names of the tasks.
    """
    import datasets

    for name, rows in docs.items():
        made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        made.to_parquet(str(folder / f"{name}.parquet"))
    for task, (data, yaml, split) in tasks.items():
        lines = {
            "include": str(yaml),
            "task": f"made_{task}",
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{data}.parquet")}},
        }
        if data == "gqa":  # its pictures come in a data set of their own, from the hub
            lines["process_docs"] = None
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
        (folder / f"made_{task}.yaml").write_text(text)
    return [f"made_{task}" for task in tasks]


def own(task: str) -> Path:
    """The YAML file of a task of the LLaVA protocol."""
    return TASKS / "llava" / f"{task}.yaml"
