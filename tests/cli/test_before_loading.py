"""What can be seen to be wrong is refused before a model is loaded and anything is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from helpers.command_line import run
from pore.data import loading

WRONG = [
    *[
        (command, *wrong)
        for command in ("evaluate", "evaluate --all", "evaluate --corrections", "demo")
        for wrong in (
            ("--out FILE/below", "--out"),
            ("--keep many", "--keep"),
            ("--keep 0", "--keep"),
            ("--max-bad 2", "--max-bad"),
        )
    ],
    *[
        (command, *wrong)
        for command in ("evaluate", "evaluate --all", "evaluate --corrections", "calibrate")
        for wrong in (
            ("--samples ./missing.jsonl", "missing.jsonl"),
            ("--columns photo=x", "--columns"),
            ("--samples FOLDER --questions ./missing.txt", "missing.txt"),
        )
    ],
    *[
        (command, "WITHOUT matplotlib", "pore-vlm[plot]")
        for command in ("evaluate --all", "evaluate --corrections", "demo", "calibrate --page p")
    ],
    ("calibrate --figures f", "WITHOUT matplotlib", "pore-vlm[plot]"),
    ("demo", "--test ./missing.jsonl", "missing.jsonl"),
    ("demo", "--calibration ./missing.jsonl", "missing.jsonl"),
    ("evaluate --all", "--calibration ./missing.jsonl", "missing.jsonl"),
    ("evaluate --all", "--layer 3", "--layer"),
    ("evaluate --corrections", "--average", "--average"),
    ("evaluate", "--method magic", "--method"),
    ("evaluate", "--reweight ./missing.json", "missing.json"),
    ("evaluate", "--set nonsense=1", "nonsense"),
    ("evaluate", "--methods magic", "--methods"),
    ("evaluate", "--methods fastv --out FILE/below", "--out"),
    ("evaluate", "--methods fastv --layer 3", "--layer"),
    ("evaluate", "--table nonsense", "--table"),
    ("evaluate", "--tasks gqa WITHOUT lmms_eval", "pip install 'pore-vlm[eval]'"),
    ("evaluate", "--table1", "--table1 needs P of the model"),
    ("evaluate", "--table1 --keep 3", "--table1 sets --tasks"),
    *[
        ("evaluate", f"--methods fastv --tasks pore_embedded {wrong}", f"{wrong.split()[0]}: with")
        for wrong in (
            *("--samples embedded:test", "--questions x.txt", "--columns answer=x", "--split val"),
            *("--metric vqa", "--max-new-tokens 3", "--max-bad 0.5", "--timing", "--method FastV"),
            *("--calibration embedded:test", "--images 3", "--reweight rope", "--guide embedded"),
            *("--allow layer", "--max-new-tokens 16"),  # the default, but asked for
        )
    ],
    *[
        ("evaluate", f"--methods fastv {wrong}", f"{wrong.split()[0]}: with")
        for wrong in ("--include-path FOLDER", "--timing", "--images 3", "--allow layer")
    ],
    *[
        (command, *wrong)
        for command in ("evaluate --all", "evaluate --corrections")
        for wrong in (
            ("--include-path FOLDER", "--include-path: with"),
            ("--method FastV", "--method: with"),
            ("--allow layer", "--allow: with"),
            ("--keep ,", "--keep ',' names nothing"),
        )
    ],
    ("evaluate", "--images 3 --calibration embedded:test", "--calibration and --images: with"),
    ("evaluate", "--include-path FOLDER", "--include-path: with"),
    ("evaluate", "--allow layer", "--allow: with"),
    ("evaluate", "--columns ,", "--columns"),
    ("evaluate", "--methods ,", "--methods ',' names nothing"),
    ("evaluate", "--tasks ,", "--tasks ',' names nothing"),
    ("evaluate", "--methods fastv --keep ,", "--keep ',' names nothing"),
    ("generate FILE what", "--guide embedded", "--guide is for --method SGL"),
    ("calibrate", "--out FILE/below", "--out"),
    ("calibrate", "--out FOLDER", "--out"),
    ("calibrate", "--page FILE/below", "--page"),
    ("calibrate", "--figures FILE/below", "--figures"),
    ("calibrate", "--checkpoint FILE/below", "--checkpoint"),
    ("calibrate", "--kind magic", "--kind"),
    ("calibrate", "--mean magic", "--mean"),
    ("calibrate", "--over magic", "--over"),
    ("calibrate", "--heads", "--kind"),
    ("calibrate", "--keep many", "--keep"),
    ("calibrate", "--method magic", "--method"),
    ("calibrate", "--method Random", "Random"),
    ("calibrate", "--engine magic", "--engine"),
    ("calibrate", "--max-bad 2", "--max-bad"),
    ("calibrate", "--set nonsense=1", "nonsense"),
    ("bench -m embedded", "--out FILE/below", "--out"),
    ("bench -m embedded", "--method magic", "--method"),
    ("bench -m embedded", "--keep many", "--keep"),
    ("bench -m embedded", "--reweight ./missing.json", "missing.json"),
    ("bench -m embedded", "--set nonsense=1", "nonsense"),
    ("generate FILE what", "--method magic", "--method"),
    ("generate FILE what", "--keep many", "--keep"),
    ("serve", "--method magic", "--method"),
    ("serve", "--keep many", "--keep"),
    ("serve", "--reweight ./missing.json", "missing.json"),
]


class Loaded(BaseException):
    """A model was loaded, which is too late."""


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a package missing, also for what has imported it."""
    for name in [name for name in sys.modules if name.startswith("pore.evaluation.harness.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(("command", "wrong", "named"), WRONG)
def test_it_is_refused_before_a_model_is_loaded(
    command: str, wrong: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.chdir(tmp_path)
    picture, folder = tmp_path / "file.png", tmp_path / "folder"
    folder.mkdir()
    PIL.Image.new("RGB", (28, 28)).save(picture)
    wrong, _, missing = wrong.partition("WITHOUT ")
    if missing:
        hide(missing, monkeypatch)
    line = f"{command} {wrong}".replace("FILE", str(picture)).replace("FOLDER", str(folder))
    found = None
    for code in (1, 2):
        try:
            found = run(*line.split(), code=code)
        except AssertionError as error:
            told = error
    assert found is not None, told
    assert named in "".join(found.stderr.split("\n"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png", "folder"]


@pytest.mark.parametrize(("images", "refused"), [(700, False), (7, True)])
def test_defaults_in_a_file_are_not_refused(
    images: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that --save-config wrote has the values of all options."""

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(loading, "load_model", load)
    config = tmp_path / "run.yaml"
    config.write_text(f"methods: fastv\ntiming: true\nimages: {images}\nmethod: FastV\n")
    if refused:
        assert "--images: without" in run("evaluate", "--config", config, code=1).stderr
        return
    with pytest.raises(Loaded):
        run("evaluate", "--config", config)
