"""Files of the Hugging Face hub, with huggingface_hub: what a repository states about them, and their download.

Its cache, HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold here. The library is imported with the first look at the hub.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

WEIGHTS = "model.safetensors"
RELEASE = "https://github.com/Peterande/storage/releases/download/dfinev1.0"
TIMEOUT_S = 10.0  # for the hub to state what it has
MOST_RESTARTS = 2  # times that a download begins anew, where the server cannot continue one
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class PretrainedError(UserError, ValueError):
    """Weights that the hub does not hand out, or that are not what it states."""


@dataclass(frozen=True)
class Published:
    """One row of the table, or a repository that was named directly."""

    name: str  # as it was written
    repo: str
    revision: str = "main"
    licence: str = "not noted here"
    classes: str = "named by the repository"
    ap: float | None = None  # on COCO val2017
    size_mb: float | None = None
    sha256: str | None = None  # None: not published here
    released: str | None = None  # file of the same weights in the authors' release

    @property
    def elsewhere(self) -> str:
        """The way that does without the hub."""
        url = f" ({RELEASE}/{self.released})" if self.released else ""
        return f"or get the file by other means{url} and name its path"


def stated(published: Published, file: str) -> "HfFileMetadata | None":
    """Facts that the hub states about a file; None where it cannot be reached, or offline mode is on.

    Raises:
        PretrainedError: the hub refuses, or has no such repository or revision.
        FileNotFoundError: the repository has no such file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with _refusals(published):
            url = hf_hub_url(published.repo, file, revision=published.revision)
            try:
                return get_hf_file_metadata(url, timeout=TIMEOUT_S)
            except Exception as error:
                if _is_unreachable(error):
                    return None
                raise
    except EntryNotFoundError:
        raise FileNotFoundError(file) from None


@dataclass(frozen=True)
class CachedFile:
    """One file of a repository in the hub's cache."""

    path: Path
    sha256: str | None  # as the hub states it; None where it states none


def download(published: Published, file: str) -> CachedFile | None:
    """Find a file in the cache, or fetch it; None if the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    pinned = bool(_COMMIT.fullmatch(published.revision)) and is_cached(published, file)  # a commit never changes
    try:
        metadata = None if pinned else stated(published, file)
        if metadata is not None and metadata.commit_hash is None:
            raise PretrainedError(f"{published.name}: {_endpoint()} is no server of the hub's API; check HF_ENDPOINT")
        with _refusals(published):
            path = Path(
                hf_hub_download(
                    published.repo,
                    file,
                    revision=published.revision,
                    local_files_only=metadata is None,
                    tqdm_class=_progress_bar(published),
                )
            )
    except LocalEntryNotFoundError:
        if file != WEIGHTS and is_cached(published, WEIGHTS):
            return None  # offline, the files of a repository are those in the cache
        raise PretrainedError(_no_connection(published)) from None
    except FileNotFoundError:
        return None
    return CachedFile(path, digest(metadata.etag if metadata else path.resolve().name))


def is_cached(published: Published, file: str) -> bool:
    """Whether a file is in the cache, as the revision was when it was last looked up."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(published.repo, file, revision=published.revision), str)


def digest(etag: str | None) -> str | None:
    """SHA-256 in a tag of the hub, which large files have; None for other tags."""
    return etag if etag and _SHA256.fullmatch(etag) else None


@contextmanager
def _refusals(published: Published) -> Iterator[None]:
    """Turn what the hub answers, and what fails on the way, into sentences with a way out."""
    from huggingface_hub import errors

    name, repo = published.name, published.repo
    try:
        yield
    except errors.GatedRepoError:
        raise PretrainedError(
            f"{name}: {repo} is gated: accept its conditions at {_endpoint()}/{repo}, then `hf auth login` or set HF_TOKEN to"
            f" a token of that account, {published.elsewhere}"
        ) from None
    except errors.RevisionNotFoundError:
        raise PretrainedError(
            f"{name}: {repo} has no revision {published.revision!r}; its revisions are at {_endpoint()}/{repo}/tree/main"
        ) from None
    except errors.RepositoryNotFoundError:
        raise PretrainedError(
            f"{name}: {_endpoint()} has no repository {repo}, or it is private: check the name, or set HF_TOKEN to a token"
            f" that may read it, {published.elsewhere}"
        ) from None
    except errors.EntryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        way = "check the token (HF_TOKEN, `hf auth whoami`)" if status in (401, 403) else "try again later"
        raise PretrainedError(
            f"{name}: {_endpoint()} answered {status} for {repo}: {way}, {published.elsewhere}"
        ) from None
    except PretrainedError:
        raise
    except Exception as error:
        cut = isinstance(error, errors.XetDownloadError) or (isinstance(error, OSError) and error.errno is None)
        if not cut and not _is_unreachable(error):
            raise
        raise PretrainedError(
            f"{name}: the download of {repo} broke off ({type(error).__name__}); give the command again, it continues where it"
            f" stopped, {published.elsewhere}"
        ) from None


def _is_unreachable(error: BaseException) -> bool:
    """Whether an error is one of the connection, or of offline mode, rather than an answer of the hub."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    # The HTTP library of huggingface_hub is an implementation detail of it, with one name or another.
    transport = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return transport or isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError)


def no_weights(published: Published) -> str:
    """Message about a repository without weights."""
    return f"{published.name}: {published.repo} has no {WEIGHTS}; give a repository or revision that has one"


def _no_connection(published: Published) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        reason, way = "offline mode is on (HF_HUB_OFFLINE)", "switch it off"
    else:
        reason, way = f"{_endpoint()} cannot be reached", "check the connection, a proxy and HF_ENDPOINT"
    return (
        f"{published.name}: {reason}, and the cache {constants.HF_HUB_CACHE} does not have {published.repo}: {way}, or run"
        f" `dfine weights fetch {published.name}` where there is a connection and copy the cache (HF_HOME), {published.elsewhere}"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _progress_bar(published: Published) -> Any:
    """Progress bar of a download that ends it where the connection is cut again and again and nothing is gained."""
    from huggingface_hub.utils.tqdm import tqdm

    class Progress(tqdm):
        restarts = 0

        def update(self, n: float | None = 1) -> bool | None:
            if n is not None and n < 0:  # what had arrived is lost: the server sends whole files alone
                self.restarts += 1
                if self.restarts > MOST_RESTARTS:
                    raise PretrainedError(
                        f"{published.name}: the connection was cut {self.restarts + 1} times during the download, and"
                        f" {_endpoint()} cannot continue one: try again on another connection, {published.elsewhere}"
                    )
            return super().update(n)

    return Progress


def checked(published: Published, file: CachedFile) -> str:
    """Compare the content of a file with the digests that are known of it: the table's and the hub's."""
    sha256 = sha256_of(file.path)
    for author, expected in (("the table", published.sha256), ("the hub", file.sha256)):
        if expected is not None and expected != sha256:
            blob = file.path.resolve()
            file.path.unlink()
            blob.unlink(missing_ok=True)
            raise PretrainedError(
                f"{published.name}: {file.path.name} of {published.repo} has SHA-256 {sha256}, {author} states {expected}: it was"
                " damaged or replaced on the way, and has been removed from the cache. Give the command again; if it"
                f" stays so, give another revision (hf://{published.repo}@REVISION), {published.elsewhere}"
            )
    return sha256


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
