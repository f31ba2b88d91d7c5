"""The published tables that can be run: Table 1 of PoRe, and the one that the field compares on."""

from __future__ import annotations

from collections.abc import Mapping

from pore.evaluation.published import AVERAGE, PublishedTable
from pore.plotting.labels import UNPRUNED

_SHARES = (0.5, 0.25, 128 / 576, 0.1)

TABLE1 = PublishedTable(
    name="table1",
    title="Table 1 of the PoRe paper",
    about="LLaVA-1.5-7B, FastV at K = 2, and PoRe on it (arXiv 2508.17807).",
    model="llava-hf/llava-1.5-7b-hf",
    visual_tokens=576,
    keeps=_SHARES,
    columns={
        "VQAv2": "llava_vqav2_val",
        "GQA": "llava_gqa",
        "VizWiz": "llava_vizwiz_val",
        "SQA-IMG": "llava_sqa_img",
        "TextVQA": "llava_textvqa",
        "POPE": "llava_pope",
        "MME": "llava_mme",
        "MMB": "llava_mmbench",
        "MM-Vet": None,
    },
    methods={"FastV": "fastv", "FastV + PoRe": "pore"},
    values={
        (1.0, UNPRUNED): (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 31.1),
        (_SHARES[0], "FastV"): (77.7, 60.0, 50.5, 69.0, 58.3, 82.4, 1514.2, 64.4, 28.5),
        (_SHARES[0], "FastV + PoRe"): (78.0, 61.0, 50.7, 69.0, 58.5, 83.8, 1513.9, 64.3, 29.7),
        (_SHARES[1], "FastV"): (74.0, 56.5, 51.2, 68.8, 57.3, 73.7, 1458.1, 64.0, 28.3),
        (_SHARES[1], "FastV + PoRe"): (76.2, 58.5, 51.8, 69.1, 57.8, 79.1, 1461.9, 63.9, 29.2),
        (_SHARES[2], "FastV"): (73.2, 55.8, 51.4, 69.1, 56.9, 72.0, 1442.3, 63.6, 25.2),
        (_SHARES[2], "FastV + PoRe"): (75.7, 57.9, 51.4, 69.4, 57.6, 77.6, 1498.4, 63.7, 26.3),
        (_SHARES[3], "FastV"): (65.2, 51.1, 51.9, 69.8, 54.6, 56.8, 1227.3, 59.9, 23.8),
        (_SHARES[3], "FastV + PoRe"): (70.1, 53.9, 51.7, 70.3, 55.1, 67.5, 1393.7, 60.5, 23.7),
    },
    notes=(
        "VQAv2 and VizWiz: the paper has the test split, which only a server scores (EvalAI); ours "
        "are of the validation split.",
        "MM-Vet: GPT-4 gives every answer its score, a paid judge; its task writes the answers and "
        "is not part of the sweep.",
        "POPE: F1, the mean over its three splits. MME: perception. MMB: the English part of "
        "MMBench, the letter read from the answer.",
    ),
    profile="llava.json",
    judged={"MM-Vet": "llava_mmvet"},
)

QWEN25VL = PublishedTable(
    name="qwen2.5-vl",
    title="Nine methods on Qwen2.5-VL-7B",
    about="Qwen2.5-VL-7B at 25 % and 10 % of the visual tokens. The published numbers are those of "
    "IDPruner's authors (Tencent/AngelSlim, docs/source/features/token_compressor/idpruner.md, "
    "commit 4d6c1c8).",
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    visual_tokens=None,
    keeps=(0.25, 0.1),
    columns={
        "AI2D": "ai2d",
        "ChartQA": "chartqa",
        "DocVQA": "docvqa_val",
        "MMB-CN": None,
        "MMB": "mmbench_en_dev_static",
        "MME": "mme",
        "MMStar": "mmstar",
        "OCRBench": "ocrbench",
        "POPE": "pope",
        "SQA": "scienceqa_img",
        "TextVQA": "textvqa_val",
        AVERAGE: None,
    },
    methods={
        "FastV": "fastv",
        "VisionZip": "visionzip",
        "HiPrune": "hiprune",
        "VisionSelector": None,
        "DivPrune": "divprune",
        "DART": "dart",
        "VisPruner": "vispruner",
        "SCOPE": "scope",
        "IDPruner": None,
    },
    values={
        (1.0, UNPRUNED): (
            *(82.48, 83.68, 94.90, 80.41, 83.08, 1702, 61.88, 85.30, 87.80, 88.45, 82.74, 100.0),
        ),
        (0.25, "FastV"): (
            *(75.68, 68.20, 81.20, 73.20, 76.12, 1636, 51.08, 43.00, 85.20, 83.49, 80.06, 87.16),
        ),
        (0.25, "VisionZip"): (
            *(77.40, 67.20, 71.48, 76.12, 78.78, 1637, 54.86, 46.50, 85.76, 83.99, 76.21, 87.55),
        ),
        (0.25, "HiPrune"): (
            *(77.49, 68.60, 73.52, 76.03, 78.09, 1619, 54.43, 47.10, 86.02, 84.18, 76.43, 87.80),
        ),
        (0.25, "VisionSelector"): (
            *(79.60, 72.00, 93.24, 75.86, 78.78, 1688, 55.78, 72.50, 86.74, 85.08, 80.39, 94.22),
        ),
        (0.25, "DivPrune"): (
            *(77.98, 62.00, 85.32, 75.77, 77.84, 1650, 52.97, 58.40, 85.88, 83.94, 75.88, 89.26),
        ),
        (0.25, "DART"): (
            *(74.35, 60.80, 78.90, 73.88, 76.72, 1625, 52.90, 46.00, 84.34, 84.33, 71.68, 85.74),
        ),
        (0.25, "VisPruner"): (
            *(77.62, 68.04, 77.39, 75.69, 78.87, 1657, 54.01, 48.70, 85.68, 84.18, 75.17, 88.31),
        ),
        (0.25, "SCOPE"): (
            *(78.92, 71.20, 85.40, 77.75, 79.38, 1684, 56.86, 61.70, 86.78, 85.23, 79.66, 92.51),
        ),
        (0.25, "IDPruner"): (
            *(80.51, 74.32, 93.16, 76.63, 79.73, 1695, 56.49, 74.00, 87.06, 85.52, 80.83, 95.18),
        ),
        (0.1, "FastV"): (
            *(67.23, 39.48, 51.90, 53.26, 55.58, 1332, 38.02, 24.10, 76.31, 79.28, 72.59, 68.07),
        ),
        (0.1, "VisionZip"): (
            *(70.60, 41.56, 37.94, 66.67, 71.05, 1462, 45.19, 23.40, 81.06, 83.24, 61.06, 71.84),
        ),
        (0.1, "HiPrune"): (
            *(69.82, 43.96, 39.89, 67.44, 70.88, 1438, 45.04, 23.70, 80.70, 82.65, 62.51, 72.22),
        ),
        (0.1, "VisionSelector"): (
            *(74.81, 62.68, 87.00, 68.99, 71.65, 1569, 46.93, 55.50, 82.69, 81.95, 74.52, 85.39),
        ),
        (0.1, "DivPrune"): (
            *(70.11, 41.36, 66.20, 69.42, 72.16, 1529, 44.46, 31.80, 81.91, 80.96, 62.72, 76.09),
        ),
        (0.1, "DART"): (
            *(67.88, 34.84, 49.86, 63.92, 67.35, 1451, 42.93, 24.30, 79.70, 80.96, 54.06, 69.80),
        ),
        (0.1, "VisPruner"): (
            *(69.88, 42.68, 50.85, 66.84, 70.96, 1442, 44.14, 24.40, 81.03, 81.11, 59.66, 72.60),
        ),
        (0.1, "SCOPE"): (
            *(71.63, 50.04, 56.45, 71.22, 75.43, 1608, 48.74, 34.10, 84.10, 82.25, 70.61, 79.35),
        ),
        (0.1, "IDPruner"): (
            *(75.16, 62.48, 85.98, 71.65, 74.66, 1618, 47.48, 53.90, 85.43, 82.80, 74.43, 86.47),
        ),
    },
    notes=(
        "VisionSelector and IDPruner are trained; pore has neither, and they stand here as "
        "published rows only.",
        "MMB-CN: lmms-eval's task asks OpenAI where the letter is not clear, so it is not part of "
        "the sweep.",
        "Avg: the mean of the scores in percent of the unpruned model's; published over eleven "
        "columns, ours over the ten that are scored here.",
        "The source names lmms-eval, but not the variants of its tasks, their metrics, the sizes "
        "of images or the methods' settings. Ours: ai2d with masks, chartqa overall, docvqa_val by "
        "ANLS, MMBench's letter read without a judge, perception of MME, F1 of pope over all "
        "questions, images as the checkpoint's processor makes them, and every method as its "
        "authors set it up.",
    ),
)

TABLES: Mapping[str, PublishedTable] = {one.name: one for one in (TABLE1, QWEN25VL)}
"""The tables by name."""
