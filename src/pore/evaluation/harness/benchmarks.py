"""The benchmarks of published tables: which task each is, and whether it is scored here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Protocol = Literal["lmms-eval", "llava"]
"""Who says how questions are put: lmms-eval's own tasks, or LLaVA-1.5's scripts."""

Scored = Literal["here", "server", "judge"]
"""Who scores: lmms-eval on this machine, a submission server, or a paid model."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark under one protocol.

    Attributes:
        name: Its name in Table 1.
        protocol: Who says how questions are put.
        task: The task of lmms-eval.
        metric: The metric that Table 1 shows, by its name in lmms-eval's results; None where
            nothing is scored here.
        scale: What the metric is multiplied by to be in the unit of Table 1.
        scored: Who scores.
        note: What to know before it is run.
        main: Whether it is the task to run for Table 1, if only one can be.
        adds_up: Whether lmms-eval's scorer adds to what it found before in the same process, so
            that only the mean of the documents' scores is right.
    """

    name: str
    protocol: Protocol
    task: str
    metric: str | None
    scale: float = 100.0
    scored: Scored = "here"
    note: str = ""
    main: bool = True
    adds_up: bool = False


_VALIDATION = "the validation split; published figures are of the test split"
_EVALAI = "writes a file for EvalAI (https://eval.ai), which scores it"
_LETTER = "the letter is read from the answer; published figures had ChatGPT read unclear ones"

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("VQAv2", "lmms-eval", "vqav2_val", "exact_match", note=_VALIDATION),
    Benchmark("VQAv2", "lmms-eval", "vqav2_test", None, 1, "server", _EVALAI, main=False),
    Benchmark("GQA", "lmms-eval", "gqa", "exact_match"),
    Benchmark("VizWiz", "lmms-eval", "vizwiz_vqa_val", "exact_match", note=_VALIDATION),
    Benchmark("VizWiz", "lmms-eval", "vizwiz_vqa_test", None, 1, "server", _EVALAI, main=False),
    Benchmark("SQA-IMG", "lmms-eval", "scienceqa_img", "exact_match"),
    Benchmark(
        "TextVQA",
        "lmms-eval",
        "textvqa_val",
        "exact_match",
        note="without OCR tokens, which published figures of LLaVA-1.5 had in the question",
    ),
    Benchmark(
        "POPE",
        "lmms-eval",
        "pope",
        "pope_f1_score",
        note="F1 over all questions; Table 1 has the mean over three splits",
    ),
    Benchmark("MME", "lmms-eval", "mme", "mme_perception_score", 1, note="perception"),
    Benchmark("MMBench", "lmms-eval", "mmbench_en_dev_static", "gpt_eval_score", 1, note=_LETTER),
    Benchmark(
        "MMBench-CN",
        "lmms-eval",
        "mmbench_cn_dev",
        "gpt_eval_score",
        1,
        "judge",
        "asks OpenAI where the letter is not clear, and without a key draws one by chance, after a "
        "long wait; llava_mmbench_cn does without",
    ),
    Benchmark(
        "MM-Vet",
        "lmms-eval",
        "mmvet",
        "gpt_eval_score",
        1,
        "judge",
        "GPT-4 gives every answer its score; without OPENAI_API_KEY not even the task is loaded",
    ),
    Benchmark("VQAv2", "llava", "llava_vqav2_val", "exact_match", note=_VALIDATION),
    Benchmark("VQAv2", "llava", "llava_vqav2_testdev", None, 1, "server", _EVALAI, main=False),
    Benchmark("GQA", "llava", "llava_gqa", "exact_match"),
    Benchmark("VizWiz", "llava", "llava_vizwiz_val", "exact_match", note=_VALIDATION),
    Benchmark("VizWiz", "llava", "llava_vizwiz_test", None, 1, "server", _EVALAI, main=False),
    Benchmark("SQA-IMG", "llava", "llava_sqa_img", "exact_match"),
    Benchmark("TextVQA", "llava", "llava_textvqa", "exact_match"),
    Benchmark("POPE", "llava", "llava_pope", "pope_f1_score"),
    Benchmark("MME", "llava", "llava_mme", "mme_perception_score", 1, note="perception"),
    Benchmark("MMBench", "llava", "llava_mmbench", "accuracy", 1, note=_LETTER),
    Benchmark("MMBench-CN", "llava", "llava_mmbench_cn", "accuracy", 1, note=_LETTER),
    Benchmark(
        "MM-Vet",
        "llava",
        "llava_mmvet",
        None,
        1,
        "judge",
        "writes a file for MM-Vet's own judge, GPT-4 (https://github.com/yuweihao/MM-Vet)",
    ),
)
"""Every benchmark of Table 1, under both protocols."""

OTHERS: tuple[Benchmark, ...] = (
    Benchmark("AI2D", "lmms-eval", "ai2d", "exact_match"),
    Benchmark("ChartQA", "lmms-eval", "chartqa", "relaxed_overall"),
    Benchmark("DocVQA", "lmms-eval", "docvqa_val", "anls", note="the validation split"),
    Benchmark("MMStar", "lmms-eval", "mmstar", "average"),
    Benchmark("OCRBench", "lmms-eval", "ocrbench", "ocrbench_accuracy", adds_up=True),
)
"""Further benchmarks, of the table on Qwen2.5-VL."""


def not_scored_here(tasks: Iterable[str]) -> list[str]:
    """What of some tasks is not scored on this machine.

    Args:
        tasks: Names of tasks.

    Returns:
        For each such task a sentence that says who scores it.
    """
    known = {benchmark.task: benchmark for benchmark in BENCHMARKS}
    found = [known[task] for task in dict.fromkeys(tasks) if task in known]
    who = {"server": "a submission server", "judge": "a paid judge"}
    return [
        f"{one.task} ({one.name}) is scored by {who[one.scored]}: {one.note}."
        for one in found
        if one.scored != "here"
    ]
