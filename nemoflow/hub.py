"""Datasets and tokenizers on the Hugging Face Hub: what is there, pinned, and how it gets here.

The hub's own clients do the talking (huggingface_hub, datasets; imported when needed), so HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE and proxies work as everywhere. Which files a subset has is what `datasets` would load: the `data_files`
of the dataset's card, or its rules for a dataset without them; never a comparison of names.

A file comes as ranges of bytes and goes on where it stopped, also in another process. (hf_hub_download does not: it
gives each attempt a temporary file of its own and deletes that on failure.) Its digest is computed on the way.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemoflow.errors import NemoflowError

SCHEME = "hf://"
Kind = Literal["dataset", "model"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What is taken of a tokenizer; the first two must be there."""

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""What is taken of a model besides its weights and tokenizer."""

RUN_CONFIG = "run_config.yaml"
"""Megatron-Bridge's file that says what model a checkpoint is of; in each of its iter_* directories."""

_TRIES = 6
"""How often something is asked for again, after 1, 2, 4, ... seconds, before it is given up."""
_BATCH = 500
"""Files asked about in one request."""
_RANGE = 32 * 2**30
"""Bytes asked for in one request: content delivery networks refuse answers above 50 GB."""
_CHUNK = 2**20
_FOOTER = 2**16
"""Bytes first read of a Parquet file's end: nearly every footer fits."""


@dataclass(frozen=True)
class Resolved:
    """What a name on the hub stands for today.

    commit: 40 hex digits. config: the dataset's configuration ("" for a tokenizer). files: {"path" in the repository,
    "size" in bytes, and "sha256", or "git_sha1" of the git blob for small files the hub has no sha256 of}.
    """

    commit: str
    config: str
    files: list[dict]


def repository(address: str) -> str:
    """The repository ORGANISATION/NAME of hf://ORGANISATION/NAME. Raises NemoflowError for anything else."""
    name = address.removeprefix(SCHEME)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise NemoflowError(
            f"{address!r}: write hf://ORGANISATION/NAME, and beside it `config`, `split` and `revision`"
        )
    return name


# -- errors ------------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _explained(repo: str, kind: Kind, revision: str | None = None) -> Iterator[None]:
    """Turn what the clients raise into one line that says what to do."""
    import httpx
    from huggingface_hub import constants, errors, get_token

    try:
        yield
    except NemoflowError:
        raise
    except Exception as error:
        name = f"{SCHEME}{repo}"
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        token = get_token() is not None
        for cause in _chain(error):
            status = getattr(getattr(cause, "response", None), "status_code", None)
            missing = isinstance(cause, errors.RepositoryNotFoundError)
            match cause:
                case errors.OfflineModeIsEnabled():
                    text = "HF_HUB_OFFLINE is set and this needs the hub; unset it, or run this where the network is"
                case errors.GatedRepoError():
                    text = f"is gated: accept its terms on {page}, then set HF_TOKEN to a token of that account" + (
                        " (the account of today's HF_TOKEN has no access)" if token else ""
                    )
                case errors.RevisionNotFoundError():
                    text = f"has no revision {revision!r}; give a branch, a tag or a commit, see {page}/commits/main"
                case errors.HfHubHTTPError() if status == 401 and token and not missing:
                    text = f"{constants.ENDPOINT} refuses HF_TOKEN as invalid; set it to a valid token, or unset it"
                case errors.HfHubHTTPError() if (
                    status == 401 or missing
                ):  # 401 is also the answer to those without a token
                    text = f"there is no such {kind} on {constants.ENDPOINT}, or it is private and " + (
                        "the account of HF_TOKEN may not read it" if token else "HF_TOKEN is not set"
                    )
                case errors.EntryNotFoundError():
                    text = f"a file that was pinned is no longer there ({_first_line(cause)}); lock again"
                case errors.HfHubHTTPError():
                    text = f"{constants.ENDPOINT} answers with HTTP status {status}; try again later"
                case httpx.TransportError():
                    text = (
                        f"{constants.ENDPOINT} cannot be reached ({type(cause).__name__}: {_first_line(cause)}); check "
                        "the network, the proxy and HF_ENDPOINT"
                    )
                case _:
                    continue
            raise NemoflowError(f"{name}: {text}") from None
        raise


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _patiently(ask: Callable[[], Any]) -> Any:
    """The answer, asked for again while the hub is overloaded or connections break."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(_TRIES):
        try:
            return ask()
        except (httpx.TransportError, HfHubHTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if attempt + 1 == _TRIES or isinstance(error, httpx.ConnectError) or (status < 500 and status != 429):
                raise
        time.sleep(2**attempt)
    raise AssertionError("unreachable")


# -- what is there -----------------------------------------------------------------------------------------------------


def commit(repo: str, revision: str | None, kind: Kind = "dataset") -> str:
    """The commit that a branch, tag or commit (the main branch for None) of a repository is today.

    Raises NemoflowError for a repository that is missing, has no such revision, or is gated or private and not for this
    account.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()

    def names(sha: str) -> Iterator[str]:
        for entry in api.list_repo_tree(repo, repo_type=kind, revision=sha, recursive=True):
            if isinstance(entry, RepoFile) and entry.path not in ("README.md", ".gitattributes"):
                yield entry.path

    with _explained(repo, kind, revision):
        sha = _patiently(lambda: api.repo_info(repo, repo_type=kind, revision=revision, expand=["sha"])).sha
        # What is gated shows its card and the names of its files to everyone: ask for a file, as a download would
        if example := _patiently(lambda: next(names(sha), None)):
            _patiently(lambda: get_hf_file_metadata(_url(repo, kind, sha, example)))
        return sha


def resolve(repo: str, config: str | None, split: str, commit: str) -> Resolved:
    """The files of a dataset's configuration and split at a commit, sorted by path.

    Raises NemoflowError for a configuration or split there is not, naming those there are, and for a wrong card.
    """
    import datasets

    datasets.disable_progress_bars()
    name, address = f"{SCHEME}{repo}", f"hf://datasets/{repo}"
    with _explained(repo, "dataset", commit), tempfile.TemporaryDirectory() as nowhere:
        try:
            # An empty cache_dir: with one, `datasets` would fall back on whatever it loaded in the past
            found = _patiently(
                lambda: datasets.load_dataset_builder(address, config, revision=commit, cache_dir=nowhere)
            )
        except Exception as error:
            if _comes_from_the_hub(error):
                raise
            _refuse_config(name, config, lambda: datasets.get_dataset_config_names(address, revision=commit))
            raise NemoflowError(f"{name}: `datasets` cannot tell what its files are: {_first_line(error)}") from error
        splits = found.config.data_files or {}
        if split not in splits:
            raise NemoflowError(
                f"{name}: split: configuration {found.config.name!r} has no {split!r}; there are {', '.join(splits)}"
            )
        inside = f"{address}@{commit}/"
        for url in splits[split]:
            if not url.startswith(inside):
                raise NemoflowError(f"{name}: {url} lies outside the dataset; only files of the dataset can be pinned")
        paths = sorted({url.removeprefix(inside) for url in splits[split]})
        return Resolved(commit, found.config.name, _files(repo, "dataset", commit, paths))


def _comes_from_the_hub(error: Exception) -> bool:
    import httpx
    from huggingface_hub import errors

    hub = (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, httpx.TransportError)
    # A file that may be there or not, such as the card, is looked for on the way to every other error
    return any(isinstance(e, hub) and not isinstance(e, errors.EntryNotFoundError) for e in _chain(error))


def _refuse_config(name: str, config: str | None, names: Callable[[], list[str]]) -> None:
    """Say which configurations there are, if that is what is wrong."""
    try:
        there = names()
    except Exception:  # then something else is wrong, which is said instead
        return
    if config not in there:
        wrong = f"there is no {config!r}" if config else "is missing, and the dataset has several"
        raise NemoflowError(f"{name}: config: {wrong}; choose from {', '.join(there)}") from None


def resolve_tokenizer(repo: str, commit: str) -> Resolved:
    """The tokenizer's files in a model's repository at a commit. Raises NemoflowError when there is no tokenizer."""
    with _explained(repo, "model", commit):
        files = _files(repo, "model", commit, TOKENIZER_FILES)
    there = {file["path"] for file in files}
    for needed in TOKENIZER_FILES[:2]:
        if needed not in there:
            raise NemoflowError(
                f"{SCHEME}{repo}: has no {needed}; give a model whose tokenizer is of the `tokenizers` kind"
            )
    return Resolved(commit, "", files)


def iteration(directory: Path) -> Path | None:
    """The last iteration of a Megatron-Bridge checkpoint: `directory`, or one in it; None where there is none."""
    if (directory / RUN_CONFIG).is_file():
        return directory
    found = {p.parent for p in directory.glob(f"iter_[0-9]*/{RUN_CONFIG}")}
    return max(found, key=lambda p: int(p.name.removeprefix("iter_")), default=None)


def is_model_file(name: str) -> bool:
    """Whether a file of a model's repository is part of the checkpoint: weights, configuration, tokenizer."""
    return name.endswith(".safetensors") or name in (*MODEL_FILES, *TOKENIZER_FILES)


def resolve_model(repo: str, commit: str) -> Resolved:
    """The files of a model's checkpoint at a commit. Raises NemoflowError when there is none in safetensors."""
    from huggingface_hub import HfApi

    with _explained(repo, "model", commit):
        names = _patiently(lambda: HfApi().list_repo_files(repo, revision=commit))
        files = _files(repo, "model", commit, sorted(name for name in names if is_model_file(name)))
    check_model([file["path"] for file in files], f"{SCHEME}{repo}")
    return Resolved(commit, "", files)


def check_model(names: list[str], where: str) -> None:
    """Raise NemoflowError, starting with `where`, unless files of these names are a model's checkpoint."""
    for needed, there in (("config.json", "config.json" in names), ("*.safetensors", _weights(names))):
        if not there:
            raise NemoflowError(f"{where}: has no {needed}; a Hugging Face checkpoint in safetensors is wanted")


def _weights(names: list[str]) -> bool:
    return any(name.endswith(".safetensors") for name in names)


def license_of(repo: str, commit: str, kind: Kind = "dataset") -> str | None:
    """The license that a repository's card names at a commit: the hub's identifier, or where that is `other` the name
    beside it; None where the card, or the repository, says nothing.
    """
    import yaml
    from huggingface_hub import RepoCard

    with _explained(repo, kind, commit):
        found = _files(repo, kind, commit, ["README.md"])
        if not found:
            return None
        text = b"".join(_bytes(_url(repo, kind, commit, "README.md"), 0, found[0]["size"]))
    try:
        said = RepoCard(text.decode("utf-8", "replace"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):  # the hub shows such a card all the same, without what it says of itself
        return None
    names = said.get("license")
    names = names if isinstance(names, list) else [names]
    names = [said.get("license_name", name) if name == "other" else name for name in names]
    return ", ".join(str(name) for name in names if name) or None


def _files(repo: str, kind: Kind, commit: str, paths: Sequence[str]) -> list[dict]:
    """Sizes and digests of those of `paths` that exist, in their order."""
    from huggingface_hub import HfApi

    api = HfApi()
    batches = [list(paths[i : i + _BATCH]) for i in range(0, len(paths), _BATCH)]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda batch: _patiently(lambda: api.get_paths_info(repo, batch, repo_type=kind, revision=commit)), batches
        )
        known = {info.path: info for answer in answers for info in answer}
    return [
        {"path": path, "size": known[path].size}
        | ({"sha256": known[path].lfs.sha256} if known[path].lfs else {"git_sha1": known[path].blob_id})
        for path in paths
        if path in known
    ]


# -- bytes -------------------------------------------------------------------------------------------------------------


def _url(repo: str, kind: Kind, commit: str, path: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, repo_type=kind, revision=commit)


def _bytes(url: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes `start` to `end` (excluded) of a file, in order, across broken connections."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    failures = 0
    while start < end:
        last = min(end, start + _RANGE) - 1
        headers = build_hf_headers() | {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        failure: Exception | None = None
        failures += 1
        try:
            with http_stream_backoff(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
            ) as response:
                hf_raise_for_status(response)
                skip = 0 if response.status_code == 206 else start  # a server without ranges sends it all
                for chunk in response.iter_bytes():
                    wanted = chunk[skip : skip + end - start]
                    skip = max(0, skip - len(chunk))
                    if wanted:
                        failures = 0
                        start += len(wanted)
                        yield wanted
        except httpx.TransportError as error:
            failure = error
        if failures == _TRIES:
            raise failure or httpx.ReadError(f"{url} ends before its last byte")
        if failures or failure:
            time.sleep(2**failures / 2)


def row_groups(repo: str, commit: str, file: dict) -> list[tuple[int, int]]:
    """(rows, compressed bytes) of each row group of a Parquet file, from its footer alone.

    Raises NemoflowError when it is no Parquet file.
    """
    import pyarrow as pa

    url, size = _url(repo, "dataset", commit, file["path"]), file["size"]
    with _explained(repo, "dataset", commit):
        end = b"".join(_bytes(url, max(0, size - _FOOTER), size))
        needed = int.from_bytes(end[-8:-4], "little") + 8
        if end[-4:] == b"PAR1" and len(end) < needed <= size:
            end = b"".join(_bytes(url, size - needed, size))
    return footer(pa.BufferReader(end), f"{SCHEME}datasets/{repo}@{commit[:12]}/{file['path']}")


def footer(file: Any, name: str) -> list[tuple[int, int]]:
    """(rows, compressed bytes) of each row group of a Parquet file, or of the end of one that holds its footer.

    Raises NemoflowError when `file`, called `name`, is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise NemoflowError(f"{name}: is no readable Parquet file ({_first_line(error)})") from None
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return [(g.num_rows, sum(g.column(c).total_compressed_size for c in range(g.num_columns))) for g in groups]


def part(target: Path) -> Path:
    """Where what has come of `target` is kept until it is whole."""
    return target.with_name(f".{target.name}.part")


def download(
    repo: str, commit: str, file: dict, target: Path, count: Callable[[int, bool], None], kind: Kind = "dataset"
) -> str:
    """Bring one file here as `target`, which then is there whole and verified, or not at all; returns its sha256.

    What arrives is kept in a hidden file beside it, from which the next call goes on. A file that does not have the
    pinned digest is fetched once more. count(bytes, kept) is told of what came, and of what was kept from before.

    Raises NemoflowError when it cannot be had, or twice has other bytes than were pinned.
    """
    begun = part(target)
    with _explained(repo, kind, commit):
        url = _url(repo, kind, commit, file["path"])
        for _ in range(2):
            sha256 = hashlib.sha256()
            git = hashlib.sha1(b"blob %d\0" % file["size"], usedforsecurity=False)
            digests = [sha256] if "sha256" in file else [sha256, git]

            def take(chunk: bytes, kept: bool, digests: list = digests) -> None:
                for digest in digests:
                    digest.update(chunk)
                count(len(chunk), kept)

            with begun.open("a+b") as out:
                have = out.tell()
                if have > file["size"]:
                    have = out.truncate(0)
                out.seek(0)
                while chunk := out.read(_CHUNK):
                    take(chunk, True)
                for chunk in _bytes(url, have, file["size"]):
                    out.write(chunk)
                    take(chunk, False)
                out.flush()
                os.fsync(out.fileno())
            if sha256.hexdigest() == file.get("sha256") or git.hexdigest() == file.get("git_sha1"):
                begun.replace(target)
                return sha256.hexdigest()
            begun.unlink()
            count(-file["size"], True)
    raise NemoflowError(
        f"{SCHEME}{repo}@{commit[:12]}/{file['path']}: came twice with other bytes than were pinned; check the network "
        "and HF_ENDPOINT, then run the same command again"
    )
