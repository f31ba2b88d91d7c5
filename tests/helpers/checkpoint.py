"""What the command line reads: folders with tiny random models and processors, and samples."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers

from helpers.calibrations import make_processor
from helpers.models import IMAGE, tiny_llava


def save_checkpoint(folder: Path) -> Path:
    """Write the checkpoint.

    Args:
        folder: Where; made if missing.

    Returns:
        The folder.
    """
    tiny_llava(dtype=torch.float32).save_pretrained(folder)
    make_processor(do_center_crop=False).save_pretrained(folder)
    return folder


def save_samples(folder: Path, count: int) -> Path:
    """Write images with one question each, and a JSONL file that lists them.

    Args:
        folder: Where.
        count: How many, at most 14, because the tokenizer has few words.

    Returns:
        The JSONL file.
    """
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "question": f"w{6 + i} w20", "answer": "w6", "kind": "k"}
        )
    path = folder / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def save_shards(folder: Path, kind: str, count: int) -> str:
    """Write images with one question each as a data set of two files.

    Args:
        folder: Where; made if missing.
        kind: "parquet", or "tar" for a WebDataset.
        count: As in `save_samples`.

    Returns:
        What `--columns` is to name.
    """
    import datasets

    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir()
    lines = save_samples(folder / "images", count).read_text().splitlines()
    rows = [(i, json.loads(line)) for i, line in enumerate(lines)]
    for number, part in enumerate((rows[: count // 2], rows[count // 2 :])):
        shard = folder / f"train-{number:05}-of-00002.{kind}"
        files = [folder / "images" / row["image"] for _, row in part]
        if kind == "parquet":
            read = [{"bytes": file.read_bytes(), "path": None} for file in files]
            asked = [row["question"] for _, row in part]
            datasets.Dataset.from_dict({"picture": read, "asked": asked}).to_parquet(shard)
            continue
        with tarfile.open(shard, "w") as tar:
            for (i, row), file in zip(part, files, strict=True):
                for ending, data in ("png", file.read_bytes()), ("txt", row["question"].encode()):
                    info = tarfile.TarInfo(f"{i:05}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    shutil.rmtree(folder / "images")
    return "image=picture,question=asked" if kind == "parquet" else "image=png,question=txt"


def save_video_checkpoint(folder: Path) -> Path:
    """Write a tiny random LLaVA-NeXT-Video: frames of 32 x 32 pixels become 2 x 2 tokens.

    Its processor's files are written apart, because its part for videos needs torchvision.

    Args:
        folder: Where; made if missing.

    Returns:
        The folder.
    """
    plain = tiny_llava(dtype=torch.float32).config
    torch.manual_seed(0)
    transformers.LlavaNextVideoForConditionalGeneration(
        transformers.LlavaNextVideoConfig(
            vision_config=plain.vision_config.to_dict() | {"image_size": 32},
            text_config=plain.text_config.to_dict(),
            image_token_index=IMAGE,
            video_token_index=IMAGE - 1,
            image_grid_pinpoints=[[32, 32]],
        )
    ).save_pretrained(folder)
    video = f"w{IMAGE - 1}"
    tokens = make_processor().tokenizer
    tokens.add_tokens(["<image>", video], special_tokens=True)
    tokens.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    frames = {"size": {"shortest_edge": 32}, "crop_size": square, "do_center_crop": True}
    settings = {
        "processor_class": "LlavaNextVideoProcessor",
        "image_processor": {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [[32, 32]],
            **frames,
        },
        "video_processor": {"video_processor_type": "LlavaNextVideoVideoProcessor", **frames},
        "image_token": "<image>",
        "video_token": video,
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
        f"{{{{ '<image> ' if part['type'] == 'image' else '{video} ' }}}}{{% endif %}}"
        "{% endfor %}{% endfor %} ASSISTANT:"
    )
    return folder


def save_video(folder: Path, count: int = 6, size: tuple[int, int] = (32, 32)) -> Path:
    """Write an animated picture in which a white square moves to the right.

    Args:
        folder: Where.
        count: How many frames.
        size: Width and height in pixels.

    Returns:
        The GIF.
    """
    frames = []
    for i in range(count):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[8:16, 4 * i : 4 * i + 8] = 255
        frames.append(PIL.Image.fromarray(pixels))
    path = folder / "video.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250)
    return path
