"""Where pretrained weights are: a file, a folder, a model of the Hugging Face hub, a URL, or what timm has for a name.

What is fetched stays in the caches of huggingface_hub (``HF_HOME``) and torch (``TORCH_HOME``) and is taken from there.
"""

import hashlib
import logging
import os
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from urllib.request import urlopen

import timm
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from models.crossformer import VARIANTS
from utils import checkpoint
from utils.bar import bar
from utils.checkpoint import CHUNK, FOLDER_WEIGHTS
from utils.errors import UserError, did_you_mean
from utils.files import reason_of, temporary_name

DEFAULT = "default"
"""Stands for what timm has for the model's name."""
HUB, OF_TIMM = "hf-hub:", "timm/"
URL = re.compile(r"https?://")
HASH = re.compile(r"-(?!\d+\.)([a-f0-9]{8,})\.\w+$")
"""What torch and timm put into the names of weights: how their SHA-256 begins. A date is none."""
PUBLISHED = re.compile(r"crossformer(pp)?[-_](t|s|b|l|h|tiny|small|base|large|huge)\.pth")
AUTHORS = "https://github.com/cheerss/CrossFormer"


def locate(source: str, name: str) -> str:
    """Give the path of weights, which are fetched if they are not here yet.

    Args:
        source: a file or folder, ``timm/NAME``, ``hf-hub:OWNER/NAME`` (perhaps with ``@REVISION``), a URL, or
            ``default`` for what timm has for the model ``name``.
        name: the model's name.

    Raises:
        UserError: there is no such thing, or it cannot be fetched.
    """
    if os.path.exists(source):
        return source
    known = source_of(name) if source == DEFAULT else source
    if URL.match(known):
        return _download(known)
    if known.startswith((HUB, OF_TIMM)):
        return _from_hub(known.removeprefix(HUB))
    raise UserError(f"{source} is not a file; expected a checkpoint (.pth){_hint(source)}")


def source_of(name: str) -> str:
    """Say where timm has weights for a model.

    Raises:
        UserError: it has none.
    """
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {name} is not a model that timm knows{did_you_mean(name, timm.list_models())}")
    cfg = timm.get_pretrained_cfg(name)
    source = f"{HUB}{cfg.hf_hub_id}" if cfg and cfg.hf_hub_id else str((cfg and cfg.url) or "")
    if not source:
        authors = f"; its authors publish some at {AUTHORS}: fetch a file and name it" if name in VARIANTS else ""
        raise UserError(f"{DEFAULT}: timm has no weights for MODEL.NAME {name}{authors}")
    return source


def _hint(source: str) -> str:
    """Say what may have been meant by a file that is not there."""
    if PUBLISHED.fullmatch(Path(source).name):
        return f"; the authors of CrossFormer publish it at {AUTHORS}"
    if timm.is_model(source):
        return f"; for timm's weights write {OF_TIMM}{source}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return f"; if it is a model of the Hugging Face hub write {HUB}{source}"
    return ""


def _from_hub(model: str) -> str:
    """Fetch the folder of a model, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``: its config.json and its weights."""
    repository, _, revision = model.partition("@")
    with suppress(LocalEntryNotFoundError, HFValidationError):
        return _files_of(repository, revision, local_files_only=True)
    elsewhere = (
        f"where there is a network run: hf download {repository}{f' --revision {revision}' if revision else ''} "
        f"config.json {FOLDER_WEIGHTS[0]} --local-dir FOLDER, bring the folder here and name it"
    )
    try:
        bar.doing("fetching weights")
        with _quiet():
            return _files_of(repository, revision)
    except HFValidationError as error:
        raise UserError(f"{model} is not the name of a model of the hub; write OWNER/NAME") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{model}: the hub has no such model, or not for you (log in with: hf auth login)") from error
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise UserError(f"{model} is not in the cache and the hub cannot be reached{offline}; {elsewhere}") from error
    except UserError:
        raise
    except Exception as error:  # the libraries below have errors of their own for proxies and broken transfers
        raise UserError(f"{model} cannot be fetched: {reason_of(error)}; {elsewhere}") from error


def _files_of(repository: str, revision: str, local_files_only: bool = False) -> str:
    def fetch(name: str) -> str:
        return hf_hub_download(repository, name, revision=revision or None, local_files_only=local_files_only)

    try:
        config = Path(fetch("config.json"))
    except LocalEntryNotFoundError:  # of the cache; also an EntryNotFoundError
        raise
    except EntryNotFoundError as error:
        raise UserError(f"{repository} has no config.json, so it is no model of timm's; take another") from error
    checkpoint.architecture_in(config)  # before gigabytes are fetched
    missing: Exception | None = None
    for name in FOLDER_WEIGHTS:
        try:
            fetch(name)
        except LocalEntryNotFoundError as error:
            missing = error
        except EntryNotFoundError:
            continue
        else:
            return str(config.parent)
    raise missing or UserError(f"{repository} has none of {', '.join(FOLDER_WEIGHTS)}; take another model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the lines to ourselves with which a request is repeated: the last word is ours.

    The hub's own bars are for where there is no live line, which they would tear.
    """
    logger = logging.getLogger("huggingface_hub")
    before, with_bars = logger.level, bar.is_live and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if with_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        if with_bars:
            enable_progress_bars()


def _download(url: str) -> str:
    """Fetch a file into torch's cache, where timm and torchvision keep theirs too.

    Where its name does not say its digest, another file of that name is kept apart by the whole address.
    """
    name = unquote(urlsplit(url).path.rpartition("/")[2]) or "weights"
    expected = HASH.search(name)
    apart = "" if expected else f"{hashlib.sha256(url.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}-"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{apart}{name}")
    if path.is_file():
        return str(path)
    bar.doing("fetching weights")
    temporary, digest = temporary_name(path), hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(quote(url, safe=string.punctuation)) as answer, open(temporary, "wb") as file:
            while data := answer.read(CHUNK):
                digest.update(data)
                file.write(data)
            length = int(answer.headers.get("Content-Length") or file.tell())
            if file.tell() != length:
                raise ValueError(f"only {file.tell():,} of {length:,} bytes have come")
        if expected and not digest.hexdigest().startswith(expected[1]):
            raise ValueError(f"its name says that its SHA-256 begins with {expected[1]}, and it does not")
        os.replace(temporary, path)
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib's errors hold another, or words
        reason = reason_of(reason) if isinstance(reason, BaseException) else reason
        raise UserError(
            f"{url} cannot be fetched: {reason}; fetch it where there is a network and put it to {path}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)
