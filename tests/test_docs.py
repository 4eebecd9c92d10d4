"""The pages name only what exists: files, anchors, config keys, commands, flags, make targets, functions."""

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel

from dfine_core.config import ModelConfig
from pipeline.config import Cluster, Experiment
from pipeline.training.chain import Chain, ChainStage
from pipeline.tuning.sweep import Sweep

ROOT = Path(__file__).parent.parent
README_WORDS = 750
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILE_SUFFIXES = {"json", "py", "safetensors", "yaml"}  # data.yaml is no key of `data`
STAGES = {"pretrain", "finetune"}  # stages of the shipped chains, before a key of an experiment


# What the pages contain


def pages() -> list[Path]:
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "DECISIONS.md", "CHANGELOG.md")]
    return [*top, ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """The text outside of code blocks."""
    return FENCE.sub("", page.read_text())


def inline_code() -> Iterator[tuple[str, str]]:
    """(page, code) for every piece of inline code."""
    for page in pages():
        yield from ((page.name, code) for code in INLINE.findall(prose(page)))


def shell_lines() -> Iterator[tuple[str, str]]:
    """(source, command) for shell blocks of pages, inline commands, and commands in the headers of configs."""
    for page in pages():
        for language, block in FENCE.findall(page.read_text()):
            if language == "bash":
                yield from ((page.name, line) for line in joined(block).splitlines() if line.strip())
    for name, code in inline_code():
        if code.startswith(("dfine ", "python -m ", "make ", ".venv/bin/")):
            yield name, code
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        comments = [line[1:] for line in config.read_text().splitlines() if line.startswith("#")]
        lines = [line for line in joined("\n".join(comments)).splitlines() if line.startswith("    ")]
        yield from ((config.name, re.split(r"\s{4,}", line.strip())[0]) for line in lines)  # up to an explanation


def joined(text: str) -> str:
    """With lines that end in a backslash continued."""
    return re.sub(r"\\\n\s*", " ", text)


@dataclass(frozen=True)
class Command:
    source: str
    module: str  # jobs.train, benchmarks.flops
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {self.module} {shlex.join(self.words)}"


@cache
def commands() -> tuple[Command, ...]:
    return tuple(command for source, line in shell_lines() if (command := parsed(source, line)))


def parsed(source: str, line: str) -> Command | None:
    """The project's own command in a shell line; None where it is another program's, or only a name."""
    words = shlex.split(line, comments=True)
    if "--" in words and words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words:
        return None
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "dfine" and rest and re.fullmatch(r"[a-z-]+", rest[0]):
        return Command(source, f"jobs.{rest[0].replace('-', '_')}", tuple(rest[1:]))
    if program == "python" and rest[:1] == ["-m"] and re.fullmatch(r"(jobs|benchmarks)\.[a-z_]+", rest[1]):
        return Command(source, rest[1], tuple(rest[2:]))
    return None


def with_arguments(package: str) -> list[Command]:
    """Commands that are complete; one without any argument only names the command."""
    return [c for c in commands() if c.module.startswith(f"{package}.") and c.words and "..." not in c.words]


# The words of README


def visible_words(page: str) -> int:
    """Whitespace-separated words with a letter or digit, code blocks included, addresses of links left out."""
    text = re.sub(r"\]\([^)\s]+\)", "]", page)
    return sum(any(sign.isalnum() for sign in word) for word in text.split())


def test_the_readme_is_a_page() -> None:
    words = visible_words((ROOT / "README.md").read_text())
    assert 300 < words <= README_WORDS


def test_words_are_counted_without_addresses_and_signs() -> None:
    assert (
        visible_words("| **One** | [two words](https://a.b/c) | - |\n```bash\nthree 4\n```") == 5 + 1
    )  # and the fence's "bash"


# Files, links and anchors


def anchors(page: Path) -> set[str]:
    """Fragments under which GitHub links the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    links = [(page, target) for page in pages() for target in LINK.findall(prose(page)) if "://" not in target]
    assert len(links) > 40
    broken = []
    for page, target in links:
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(f"{page.name}: {target}")
    assert broken == []


def named_paths() -> Iterator[tuple[str, str]]:
    """(page, path) for inline code that is a path from the root of the repository."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {
        "shards",
        "runs",
        "demo",
    }
    for name, code in inline_code():
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+", code) and code.split("/")[0] in tops:
            yield name, code


def test_every_named_file_exists() -> None:
    found = list(named_paths())
    assert len(found) > 60
    assert [f"{name}: {path}" for name, path in found if not (ROOT / path).exists()] == []


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    docs = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert len(docs) >= 9
    assert docs - {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())} == set()


def rooms() -> list[tuple[str, list[str]]]:
    """(file, names) for every row of the table of architecture.md that says where a new thing belongs."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Where do I put")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [(INLINE.findall(place)[0], INLINE.findall(names)) for _, place, names in rows]


def test_every_room_holds_what_it_is_said_to_hold() -> None:
    table = rooms()
    assert len(table) > 20
    missing = [f"{file}: {name}" for file, names in table for name in names if not defines(ROOT / file, name)]
    assert missing == []


def defines(file: Path, name: str) -> bool:
    return file.exists() and bool(re.search(rf"^(def|class) {name}\b|^{name}\b.*=", file.read_text(), re.MULTILINE))


def test_every_row_of_the_table_of_failures_names_its_tests() -> None:
    table = (ROOT / "docs" / "failures.md").read_text().split("\n\n")[1]
    rows = [line.strip("|").split("|") for line in table.splitlines()][2:]
    assert len(rows) > 15
    tests = {event: [path for path in INLINE.findall(held) if path.startswith("tests/")] for event, _, held in rows}
    assert [event for event, found in tests.items() if not found] == []


# Config keys


def keys_of(kind: Any) -> set[str]:
    """Dotted keys of a config class, sections included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        hints = {name: field.annotation for name, field in kind.model_fields.items()}
    elif isinstance(kind, type) and is_dataclass(kind):
        hints = {name: hint for name, hint in get_type_hints(kind).items() if name in {f.name for f in fields(kind)}}
    else:
        return set().union(*(keys_of(part) for part in get_args(kind)))
    return set(hints) | {f"{name}.{key}" for name, hint in hints.items() for key in keys_of(hint)}


@cache
def experiment_keys() -> frozenset[str]:
    model = {f"model.{field.name}" for field in fields(ModelConfig)} - {"model.num_classes", "model.loss"}
    return frozenset(keys_of(Experiment) | model)


@cache
def all_keys() -> frozenset[str]:
    return experiment_keys() | keys_of(Cluster) | keys_of(Sweep) | keys_of(Chain) | keys_of(ChainStage)


def test_the_schema_is_walked_to_its_leaves() -> None:
    assert {"schedule", "schedule.epochs", "loss.ddf", "model.reg_max", "augment.hue"} <= experiment_keys()
    assert "model.num_classes" not in experiment_keys()


def set_keys(command: Command) -> list[str]:
    """Keys that a command gives behind --set."""
    keys, words = [], list(command.words)
    while "--set" in words:
        words = words[words.index("--set") + 1 :]
        for word in words:
            if word.startswith("-"):
                break
            keys.append(word.partition("=")[0])
    return keys


def test_every_key_that_is_set_exists() -> None:
    given = [(command, key) for command in with_arguments("jobs") for key in set_keys(command)]
    assert len(given) > 20
    assert [f"{command}: {key}" for command, key in given if not takes(command.module, key)] == []


def takes(module: str, key: str) -> bool:
    """Whether a command has this key in what it loads."""
    section, _, rest = key.partition(".")
    if module == "jobs.pretrain_finetune":
        return key in keys_of(Chain) or (section in STAGES and rest in experiment_keys())
    if module == "jobs.tune" and section == "space":
        return rest in experiment_keys()
    return key in experiment_keys() or (module == "jobs.tune" and key in keys_of(Sweep))


def named_keys() -> Iterator[tuple[str, str]]:
    """(page, key) for inline code that is a dotted key of an experiment, or a key with a value."""
    sections = {key.split(".")[0] for key in experiment_keys() if "." in key}
    for name, code in inline_code():
        dotted = re.fullmatch(r"([a-z_]+\.[a-z_.]+)(=.*|: .*)?", code)
        if dotted and code.split(".")[0] in sections and dotted[1].rpartition(".")[2] not in FILE_SUFFIXES:
            yield name, dotted[1]
        elif name != "CONTRIBUTING.md" and (valued := re.fullmatch(r"([a-z_]+): .+", code)):
            yield name, valued[1]


def test_every_named_key_exists() -> None:
    found = list(named_keys())
    assert len(found) > 30
    assert [f"{name}: {key}" for name, key in found if key not in all_keys()] == []


def test_the_table_of_cluster_keys_has_cluster_keys() -> None:
    section = (ROOT / "docs" / "cluster.md").read_text().split("## The cluster file")[1].split("| File |")[0]
    found = [
        key for line in section.splitlines() if line.startswith("| `") for key in INLINE.findall(line.split("|")[1])
    ]
    assert len(found) > 10
    assert set(found) - keys_of(Cluster) == set()


# Commands


def test_every_command_parses(capsys: pytest.CaptureFixture[str]) -> None:
    found = with_arguments("jobs")
    assert len(found) > 40
    wrong = []
    for command in found:
        try:
            importlib.import_module(command.module).parser().parse_args(list(command.words))
        except SystemExit as end:
            if end.code:  # 0 behind --help
                wrong.append(f"{command}\n{capsys.readouterr().err.strip().splitlines()[-1]}")
    assert wrong == []


def test_every_named_command_exists() -> None:
    found = {command.module for command in commands()}
    assert {"jobs.train", "jobs.serve", "benchmarks.criterion"} <= found
    assert [module for module in found if not (ROOT / f"{module.replace('.', '/')}.py").exists()] == []


def test_every_command_is_documented() -> None:
    jobs = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py") if "def parser(" in path.read_text()}
    assert len(jobs) > 10
    assert jobs - {command.module for command in commands()} == set()


def test_every_flag_of_a_benchmark_exists() -> None:
    found = [
        (command, word.partition("=")[0])
        for command in with_arguments("benchmarks")
        for word in command.words
        if word.startswith("--")
    ]
    assert len(found) > 6
    sources = {command.module: (ROOT / f"{command.module.replace('.', '/')}.py").read_text() for command, _ in found}
    assert [f"{command}: {flag}" for command, flag in found if f'"{flag}"' not in sources[command.module]] == []


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = {
        (source, line.split()[1]) for source, line in shell_lines() if re.fullmatch(r"\s*make [a-z-]+\s*(#.*)?", line)
    }
    assert len(found) > 8
    assert [f"{source}: make {target}" for source, target in found if target not in targets] == []


@pytest.mark.parametrize(
    ("line", "module", "words"),
    [
        ("dfine pretrain-finetune a.yaml --dry-run  # only shown", "jobs.pretrain_finetune", ("a.yaml", "--dry-run")),
        (".venv/bin/python -m jobs.train a.yaml", "jobs.train", ("a.yaml",)),
        ("ray job submit --working-dir . -- python -m jobs.train a.yaml", "jobs.train", ("a.yaml",)),
        (
            "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.train_step --variant n",
            "benchmarks.train_step",
            ("--variant", "n"),
        ),
    ],
)
def test_commands_are_found_behind_what_stands_before_them(line: str, module: str, words: tuple[str, ...]) -> None:
    assert parsed("page", line) == Command("page", module, words)


def test_commands_of_other_programs_are_left_alone() -> None:
    assert parsed("page", "curl -F image=@a.jpg http://127.0.0.1:8000/detect") is None
