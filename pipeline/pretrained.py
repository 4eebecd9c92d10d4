"""Published weights by name, and any repository of the Hugging Face hub: `dfine-s-obj365`, `hf://org/name@revision`.

    fetched = fetch("dfine-s-obj365")            # checked by SHA-256; a folder in the hub's cache
    for line in describe("hf://me/mine@v2"):     # file, size and revision, nothing is fetched
        print(line)

`pretrained.yaml` is the table of names. huggingface_hub does the download: its cache, HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE hold here too. It is imported with the first look at the hub.
"""

import difflib
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.hub import WEIGHTS, PretrainedError, Published, checked, digest, download, is_cached, no_weights, stated
from pipeline.ray_job import absolute_location

HUB_SCHEME = "hf://"
DESCRIPTIONS = ("config.json", "detector.json")  # layout of Transformers or timm; of this project
PROCESSOR = "preprocessor_config.json"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = re.compile(r"(dfine|hgnetv2)-[\w-]+")


@dataclass(frozen=True)
class Fetched:
    """Weights in the hub's cache on this machine."""

    published: Published
    commit: str
    folder: Path  # files of this commit
    files: tuple[str, ...]  # in the order in which they are to be copied: the weights first
    sha256: str  # content of the weights

    @property
    def origin(self) -> str:
        """Name and commit, for the log."""
        return f"{self.published.name} ({self.published.repo}@{self.commit[:12]})"


def table() -> dict[str, Published]:
    """The published weights, by name."""
    return dict(_table())


def is_published(source: str) -> bool:
    """Whether a location names published weights or a repository of the hub; a path does neither."""
    return source.startswith(HUB_SCHEME) or bool(_NAME.fullmatch(source) and source in _table())


def weights_location(source: str) -> str:
    """Location of weights: published names and hf:// stay as they are, paths become absolute.

    Raises:
        ValueError: a name that looks published and is not, or a path that a submitted job cannot take.
    """
    if is_published(source):
        find(source)
        return source
    if _NAME.fullmatch(source) and not os.path.exists(source):
        raise ValueError(_unknown(source))
    return absolute_location(source)


def find(source: str) -> Published:
    """Look up a published name, or parse hf://org/name[@revision].

    Raises:
        PretrainedError: neither of the two.
    """
    if not source.startswith(HUB_SCHEME):
        if source not in _table():
            raise PretrainedError(_unknown(source))
        return _table()[source]
    repo, _, revision = source.removeprefix(HUB_SCHEME).partition("@")
    if not _REPO.fullmatch(repo) or source.endswith("@"):
        raise PretrainedError(f"{source}: write hf://ORGANISATION/NAME, or hf://ORGANISATION/NAME@REVISION")
    return Published(source, repo, revision or "main")


def describe(source: str) -> list[str]:
    """File, size and revision of published weights; nothing is fetched.

    Raises:
        PretrainedError: the hub has no such weights, or does not hand them out.
    """
    published = find(source)
    try:
        found = stated(published, WEIGHTS)
    except FileNotFoundError:
        raise PretrainedError(no_weights(published)) from None
    cached = is_cached(published, WEIGHTS)
    revision, size = f"revision {published.revision}", published.size_mb and f"{published.size_mb:g} MB"
    where, sha256 = "in the cache" if cached else "to be fetched", published.sha256
    if found is None:
        where = f"{'in' if cached else 'not in'} the cache, and the hub cannot be reached"
    else:
        revision += f" (commit {(found.commit_hash or '')[:12]})"
        size = f"{found.size / 1e6:.1f} MB" if found.size else size
        sha256 = sha256 or digest(found.etag)
    return [
        f"{published.name}: {WEIGHTS} of {published.repo}, {revision}, {size or 'size not known'}, {where}",
        f"  licence {published.licence}; classes: {published.classes}; SHA-256 {sha256 or 'not published here'}",
    ]


def fetch(source: str) -> Fetched:
    """Download published weights into the hub's cache, unless they are there, and compare their SHA-256.

    Raises:
        PretrainedError: the hub does not have them or does not hand them out, the connection fails, or the content is not
            what the hub states.
    """
    published = find(source)
    described = next(filter(None, (download(published, name) for name in DESCRIPTIONS)), None)
    if described is None:
        raise PretrainedError(
            f"{published.name}: {published.repo} has neither {' nor '.join(DESCRIPTIONS)}: it is no detector or backbone that"
            " can be read here; export one with --to huggingface or safetensors"
        )
    weights = download(published, WEIGHTS)
    if weights is None:
        raise PretrainedError(no_weights(published))
    processor = download(published, PROCESSOR) if described.path.name == DESCRIPTIONS[0] else None
    files = [file for file in (weights, described, processor) if file is not None]
    folder = weights.path.parent
    if any(file.path.parent != folder for file in files):
        raise PretrainedError(f"{published.name}: {published.repo} changed during the download; give the command again")
    sha256 = checked(published, weights)
    return Fetched(published, folder.name, folder, tuple(file.path.name for file in files), sha256)


def pinned(source: str) -> str:
    """Fetch published weights, and name them by their commit, so that every machine opens the same; other sources stay.

    Raises:
        PretrainedError: see `fetch`.
    """
    if not is_published(source):
        return source
    fetched = fetch(source)
    return f"{HUB_SCHEME}{fetched.published.repo}@{fetched.commit}"


@functools.cache
def _table() -> Mapping[str, Published]:
    import yaml

    rows: dict[str, dict[str, Any]] = yaml.safe_load(
        resources.files("pipeline").joinpath("pretrained.yaml").read_text()
    )
    return {name: Published(name, **row) for name, row in rows.items()}


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _table(), n=3)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return (
        f"{name!r}: no published weights of this name, and no such path; {hint}`dfine weights list` shows all of them"
    )
