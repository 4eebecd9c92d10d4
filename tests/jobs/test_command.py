"""Commands: names, flags, defaults, help, log level, and what a missing extra ends with."""

import argparse
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jobs.__main__
from jobs import export, predict, prepare, serve, train
from jobs.__main__ import COMMANDS, module_of
from jobs.command import (
    EXTRAS,
    LOG_LEVELS,
    OLD_FLAGS,
    PACKAGES,
    CommandParser,
    parsed,
    profile,
    refuse_missing,
    user_errors,
)
from tests.support.commands import COMMAND_MODULES, ROOT


def parser_of(command: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = import_module(module_of(command)).parser()
    return made


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Parsers of all commands, those of subcommands included."""
    waiting = [parser_of(command) for command in COMMANDS]
    while waiting:
        parser = waiting.pop()
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


# Names and help


def test_every_module_with_a_main_is_a_command() -> None:
    assert {module_of(command) for command in COMMANDS} == {f"jobs.{module}" for module in COMMAND_MODULES}
    assert len(COMMANDS) == 21


def test_help_lists_every_command_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        jobs.__main__.main(["--help"])
    shown = capsys.readouterr().out
    for command in COMMANDS:
        (line,) = re.findall(rf"^  {command} +(.+)$", shown, re.MULTILINE)
        assert line.endswith(".")
        assert len(line) < 100


def test_no_command_prints_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.__main__.main([]) == 2
    written = capsys.readouterr()
    assert "pretrain-finetune" in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    ("text", "hint"), [("trian", "train"), ("pretrain_finetune", "pretrain-finetune"), ("xyz", "prepare, doctor")]
)
def test_an_unknown_command_ends_with_those_that_resemble_it(
    text: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        jobs.__main__.main([text])
    assert re.search(rf"unknown command '{text}'; .*{hint}", capsys.readouterr().err)


def test_the_exit_code_of_a_command_is_that_of_dfine(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("jobs.doctor.main", lambda words: given.append(words) or 1)
    assert jobs.__main__.main(["doctor", "a", "--json"]) == 1
    assert given == [["a", "--json"]]


@pytest.mark.parametrize(
    ("module", "words", "name"),
    [
        ("jobs.train", ["--help"], "python -m jobs.train"),
        ("jobs", ["train", "--help"], "dfine train"),
        ("jobs.pretrain_finetune", ["--help"], "python -m jobs.pretrain_finetune"),
        ("jobs", ["pretrain-finetune", "--help"], "dfine pretrain-finetune"),
        ("jobs", ["prepare", "coco", "--help"], "dfine prepare coco"),
        ("jobs", ["--help"], "dfine COMMAND"),
    ],
)
def test_help_shows_the_name_under_which_the_command_was_started(module: str, words: list[str], name: str) -> None:
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"usage: {name} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_parse(command: str) -> None:
    text = (import_module(module_of(command)).__doc__ or "").replace("\\\n", " ")
    lines = [re.split(r"\s{3,}| > ", line.strip())[0] for line in text.splitlines() if line.startswith("    dfine ")]
    assert lines
    for line in lines:
        program, name, *words = shlex.split(line)
        assert (program, name) == ("dfine", command)
        if not any(word.startswith("my_") for word in words):
            parser_of(command).parse_args(words)


def test_every_argument_is_explained() -> None:
    found = list(parsers())
    assert len(found) > len(COMMANDS)
    nothing = {"voc root", "yolo data_yaml", "synthetic --images", "synthetic --max-shapes", "replay --precision"}
    named = {
        f"{parser.prog.split()[-1]} {(action.option_strings or [action.dest])[0]}"
        for parser in found
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    }
    assert {name for name in named if not name.endswith(("--shard-mib", "--row-group-rows"))} <= nothing


# Flags


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [(command, old, new) for command, table in OLD_FLAGS.items() for old, new in table.items()],
)
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
def test_an_old_flag_ends_with_its_new_name(
    command: str, old: str, new: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(command)
    assert new in flags(parser)
    assert old not in flags(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["one", "two", *form.format(old).split()])
    assert f"{old} is called {new}" in capsys.readouterr().err


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(isinstance(parser, CommandParser) and not parser.allow_abbrev for parser in parsers())
    with pytest.raises(SystemExit, match="2"):
        train.parser().parse_args([str(ROOT / "configs" / "demo.yaml"), "--allow"])
    assert "unrecognized arguments: --allow" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "train", "pretrain-finetune", "tune"])
def test_commands_that_train_take_the_same_flags(command: str) -> None:
    assert {"--set", "--cluster", "--dry-run", "--log-level"} <= flags(parser_of(command))


def test_every_command_has_a_log_level() -> None:
    assert all("--log-level" in flags(parser) for parser in parsers())


@pytest.mark.parametrize(("text", "steps"), [("steps=1", 1), ("steps=10", 10)])
def test_a_profile_has_a_number_of_steps(text: str, steps: int) -> None:
    assert profile(text) == steps


@pytest.mark.parametrize("text", ["10", "steps", "steps=", "steps=0", "steps=-1", "steps=x", "epochs=1"])
def test_a_profile_without_a_number_of_steps_is_refused(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        profile(text)


def test_train_hands_its_flags_to_the_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pipeline.training.context
    import pipeline.training.launch

    launched: list[dict[str, Any]] = []

    def launch(experiment: Any, cluster: Any, **flags: Any) -> Any:
        launched.append({"name": experiment.name, "workers": cluster and cluster.workers, **flags})
        return SimpleNamespace(summary=lambda: "done")

    monkeypatch.setattr(pipeline.training.launch, "launch", launch)
    monkeypatch.setattr(pipeline.training.context, "resolve_data", lambda data: None)
    words = "demo.yaml --cluster clusters/laptop.yaml --name other --profile steps=3 --resume /a --allow-changes"
    flags = {"resume": "/a", "allow_changes": True, "profile_steps": 3, "verify_data": True}
    train.main([*words.split(), "--verify-data"])
    assert launched == [{"name": "other", "workers": 2, **flags}]
    train.main(["demo.yaml"])
    flags = {"resume": None, "allow_changes": False, "profile_steps": 0, "verify_data": False}
    assert launched[1] == {"name": "demo", "workers": None, **flags}
    assert capsys.readouterr().out == "done\ndone\n"


# Defaults: parsers state them, since importing the classes that have them would load PyTorch


def test_defaults_of_predict_are_those_of_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pipeline.open_detector
    import pipeline.predict.inputs
    import pipeline.predict.predict
    from pipeline.predict.inputs import Inputs
    from pipeline.predict.predict import PredictOptions

    taken: list[PredictOptions] = []

    def note(loaded: Any, inputs: Any, out: str, options: PredictOptions, announce: Any) -> Any:
        taken.append(options)
        return SimpleNamespace(summary=lambda: "done")

    monkeypatch.setattr(pipeline.predict.inputs, "list_inputs", lambda *given, **named: Inputs((), 1, 0))
    monkeypatch.setattr(
        pipeline.open_detector, "open_detector", lambda *given, **named: SimpleNamespace(origin="detector")
    )
    monkeypatch.setattr(pipeline.predict.predict, "predict", note)
    predict.main([str(tmp_path), "photos", "--out", str(tmp_path / "out")])
    assert taken == [PredictOptions()]


def test_formats_of_export_are_those_that_can_be_written() -> None:
    from pipeline.export.formats import FORMATS

    assert tuple(FORMATS) == export.EXPORT_FORMATS


def test_defaults_of_objects365_are_those_of_the_source() -> None:
    from pipeline.data.sources import objects365

    args = prepare.parser().parse_args(["objects365", "/data", "--split", "train", "--out", "/out"])
    assert (args.val_images, args.longest_side) == (objects365.VAL_IMAGES, objects365.LONGEST_SIDE)


def test_defaults_in_the_help_of_serve_are_those_of_its_settings() -> None:
    from pipeline.serve.replica import ServeSettings

    stated = {
        action.dest: float(match[1])
        for action in serve.parser()._actions
        if action.default is None and (match := re.search(r"\(([\d.]+)\)$", action.help or ""))
    }
    assert len(stated) == 6
    fields = {name: field.default for name, field in ServeSettings.model_fields.items()}
    fields.setdefault("batch_size", fields.get("batch"))
    assert stated == {name: fields[name] for name in stated}


# Log level


@pytest.fixture
def _restored_levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in PACKAGES}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_restored_levels")
@pytest.mark.parametrize("level", LOG_LEVELS)
@pytest.mark.parametrize("words", [["prepare", "yolo", "/a.yaml", "--split", "a", "--out", "/o"], ["replay", "/a"]])
def test_the_log_level_is_that_of_the_projects_loggers(level: str, words: list[str]) -> None:
    other = logging.getLogger("elsewhere").getEffectiveLevel()
    parsed(parser_of(words[0]), [*words[1:], "--log-level", level])
    for package in ("dfine_core.inference", "pipeline.training.loop", "jobs.command"):
        assert logging.getLogger(package).getEffectiveLevel() == getattr(logging, level.upper())
    assert logging.getLogger("elsewhere").getEffectiveLevel() == other


@pytest.mark.usefixtures("_restored_levels")
def test_a_log_level_before_the_source_counts_too() -> None:
    words = ["--log-level", "info", "yolo", "/a.yaml", "--split", "a", "--out", "/o"]
    assert parsed(prepare.parser(), words).log_level == "info"


def test_debug_shows_the_traceback_of_a_mistake() -> None:
    command = [sys.executable, "-m", "jobs", "train", "demo.yaml", "--set", "sed=1"]
    usual, debug = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        for more in ([], ["--log-level", "debug"])
    )
    assert usual.returncode == debug.returncode == 1
    assert "Traceback" not in usual.stderr
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(usual.stderr)


# Extras


@pytest.mark.parametrize(
    ("package", "own", "needed"),
    [
        ("ray", "train", "train"),
        ("ray", "serve", "serve"),
        ("pydantic", "export", "export"),
        ("onnx", "train", "export"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package: str, own: str, needed: str) -> None:
    with (
        pytest.raises(SystemExit, match=rf'needs {package}, .*pip install "ray-dfine\[{needed}\]"'),
        user_errors(extra=own),
    ):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@pytest.mark.parametrize("name", ["pipeline.gone", "ray.gone", "gone", None])
def test_a_module_that_no_extra_brings_is_a_bug_and_passes_through(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError), user_errors():
        raise ModuleNotFoundError("No module named ...", name=name)


def test_the_table_of_extras_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    homes = metadata.packages_distributions()
    for extra, packages in EXTRAS.items():
        stated = {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"][extra]}
        named = {canonicalize_name(name) for package in packages for name in homes[package]}
        assert stated - {"ray-dfine"} - (named | {"ray"}) == set(), extra
        assert len(packages) > 3


@pytest.mark.parametrize(
    ("command", "words", "name"),
    [
        ("predict", ["photos", "--out", "out"], "detector"),
        ("evaluate", ["shards"], "detector"),
        ("benchmark", [], "detector"),
        ("export", ["--to", "onnx", "--out", "out"], "model"),
        ("serve", [], "source"),
    ],
)
def test_every_command_takes_published_names_where_it_takes_a_detector(
    command: str, words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in ("dfine-s-coco", "hf://me/mine@v2"):
        args = parsed(parser_of(command), [source, *words])
        assert getattr(args, name) == source
        refuse_missing(source, "detector")
    assert getattr(parsed(parser_of(command), ["runs/mine", *words]), name) == os.path.abspath("runs/mine")
    with pytest.raises(SystemExit, match="2"):
        parsed(parser_of(command), ["dfine-n-obj365", *words])
    assert "did you mean dfine-" in capsys.readouterr().err
