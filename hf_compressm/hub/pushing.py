"""A directory's model to the Hub, in one commit: the repo has all of it afterwards, or is as it was."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from hf_compressm.bases import ADAPTER_CONFIG
from hf_compressm.checkpoints import BASE_FOLDER
from hf_compressm.durable import quoted, read_json
from hf_compressm.hub.failures import WAITS, explained, passing_reason, retried
from hf_compressm.hub.files import Selection, choose_files, stale_files
from hf_compressm.reporting.cards import CARD_FILE, card_of


logger = logging.get_logger(__name__)

MESSAGE = "Upload compressed model"


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: with its owner.
        url: of the repo, the branch or the pull request.
        commit: id of the commit.
        created: whether the repo was not there before.
        selection: what was pushed, and what stayed behind.
        removed: files of an earlier push that are gone.
    """

    repo_id: str
    url: str
    commit: str
    created: bool
    selection: Selection
    removed: tuple[str, ...]


def push_directory(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = MESSAGE,
    create_pr: bool = False,
    say: Callable[[str], None] = logger.warning,
) -> PushResult:
    """Push a saved model or a Trainer's checkpoint to the Hub; the directory stays as it is.

    A model that was cut gets a card that says so, with the id in its loading code: a new one, unless the repo has one,
    or the directory's with its section written anew.

    What may pass, a broken connection or a Hub that is down, is tried again, except the commit of a pull request,
    which could be opened twice.

    Args:
        directory: that `choose_files` passes.
        repo_id: `owner/name`, or a name for a repo of the token's owner; made if it is not there.
        private: whether a repo that is made is private; one that is there must be so already.
        revision: branch to push to, made from `main` if it is not there; by default `main`.
        message: title of the commit.
        create_pr: open a pull request in the place of a commit to `main`.
        say: told of each failure that is followed by another attempt.

    Raises:
        ValueError: for a mistake, found before anything is sent, or for what the Hub or the network refused; it says
            if a repo was made.
    """
    check_target(repo_id, revision, message, create_pr)
    selection = choose_files(directory)
    card_of(directory, repo_id)  # a history that cannot be read is found before a repo is made
    _check_reach()
    push = _Push(Path(directory), repo_id, selection, revision, message, create_pr, say)
    try:
        return push.run(private)
    except Exception as error:  # of the network, the Hub and its client, in several libraries
        raise ValueError(push.failure(error)) from error


def check_target(repo_id: str, revision: str | None, message: str, create_pr: bool) -> None:
    """Raise `ValueError` for a repo, branch or title that no Hub would take."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{quoted(repo_id)} is not an id on the Hub: give owner/name, with letters, digits, '-', '_' and '.', "
            "neither '-' nor '.' at an end, and no '--' or '..'."
        ) from None
    if revision is not None and create_pr:
        raise ValueError(f"A pull request goes to main: give a revision, here {quoted(revision)}, or create_pr.")
    if revision is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision):
        raise ValueError(f"{quoted(revision)} is not the name of a branch.")
    if not message.strip():
        raise ValueError("The message of the commit is empty: give it a title.")


def _check_reach() -> None:
    """Raise `ValueError` where the client would send nothing."""
    if is_offline_mode():
        raise ValueError("The client of the Hub is offline: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to push.")
    if get_token() is None:
        raise ValueError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")


@dataclass
class _Push:
    """One push, and how far it came."""

    directory: Path
    repo_id: str
    selection: Selection
    revision: str | None
    message: str
    create_pr: bool
    say: Callable[[str], None]
    api: HfApi = field(default_factory=lambda: HfApi(library_name="hf_compressm"))
    created: bool = False
    committing: bool = False

    def run(self, private: bool) -> PushResult:
        """Look the repo up, make what is not there, and commit."""
        if "/" not in self.repo_id:
            owner = retried(self.api.whoami, self.say)["name"]
            self.repo_id = f"{owner}/{self.repo_id}"
        found = retried(self._look_up, self.say)
        if found is None:
            retried(lambda: self._create(private), self.say)
        elif private and not found.private:
            raise ValueError(
                f"{self.repo_id} is there and public: make it private in its settings first, or push without private."
            )
        if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
            branch = str(self.revision)
            retried(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True), self.say)
        self.committing = True
        return retried(self._commit, self.say, () if self.create_pr else WAITS)

    def failure(self, error: BaseException) -> str:
        """What went wrong, and what is on the Hub because of it."""
        is_pull_request = self.create_pr and self.committing
        text = explained(error, self.repo_id, 1 if is_pull_request else 1 + len(WAITS))
        unsure = passing_reason(error) is not None
        if is_pull_request and unsure:
            text += " Look whether the pull request was opened before you do."
        if self.created:
            text += f" {self.repo_id} was made for it and stays, {'whole or empty' if unsure else 'empty'}."
        return text

    def _look_up(self) -> Any:
        try:
            return self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return None

    def _create(self, private: bool) -> None:
        try:
            self.api.create_repo(self.repo_id, private=private or None)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:  # it is there, out of sight of the token or since a moment ago
                raise
        else:
            self.created = True

    def _commit(self) -> PushResult:
        """Commit on top of what is there now: a second attempt after a lost answer finds that nothing has changed."""
        head = self.api.model_info(self.repo_id, revision=self.revision)
        present = {file.rfilename for file in head.siblings or ()}
        removed = stale_files(self.selection, present)
        contents = self._own_contents()
        card = card_of(self.directory, self.repo_id)
        if card is not None and (CARD_FILE in self.selection.names or CARD_FILE not in present):
            contents[CARD_FILE] = card.encode()
        on_disk = {file.name: str(file.path.absolute()) for file in self.selection.files}
        sources: dict[str, str | bytes] = {**on_disk, **contents}
        done = self.api.create_commit(
            self.repo_id,
            [
                *(CommitOperationAdd(name, source) for name, source in sources.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in removed),
            ],
            commit_message=self.message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=head.sha,
        )
        url = done.pr_url or f"{self.api.endpoint}/{self.repo_id}"
        if self.revision is not None:
            url += f"/tree/{quote(self.revision, safe='')}"
        return PushResult(self.repo_id, url, done.oid, self.created, self.selection, tuple(removed))

    def _own_contents(self) -> dict[str, bytes]:
        """Configurations of adapters that name the base in the repo, not that in a directory of this machine."""
        contents = {}
        for file in self.selection.files:
            if PurePath(file.name).name == ADAPTER_CONFIG and (self.directory / BASE_FOLDER).is_dir():
                values = read_json(file.path)
                if PurePath(str(values.get("base_model_name_or_path"))).name == BASE_FOLDER:
                    values["base_model_name_or_path"] = f"{self.repo_id}/{BASE_FOLDER}"
                    contents[file.name] = (json.dumps(values, indent=2) + "\n").encode()
        return contents
