"""Pushing a directory's model to the Hub in one commit: afterwards the repo has all of it, or is unchanged.

`HfApi.upload_folder` may spread one folder over several commits (huggingface_hub 2.4, with hf_xet). Between two of
them the repo would hold a configuration of one size and weights of another, so the one commit is made here.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_compressm.checkpoints import read_whole
from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import ADAPTER_CONFIG, BASE_FOLDER, CARD_FILE
from hf_compressm.reports.card import card_of
from hf_compressm.reports.hub_files import choose_files, left_behind, stale_files
from hf_compressm.utils.checks import quoted


MESSAGE = "Upload compressed model"
LONGEST_REASON = 300
_WAYS_OUT = {
    401: "The Hub does not accept the token (401). Log in with `hf auth login`, or set HF_TOKEN to a valid one",
    403: "The token may not write to {repo} (403). Make one that may at https://huggingface.co/settings/tokens, or "
    "push to a repo of your own",
    404: "{repo} is missing or hidden from this token (404). Check the id, the revision and the token's permissions",
    412: "Others commit to {repo} at the same time (412). Push again when they are done",
}


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: with its owner.
        url: of the repo, the branch or the pull request.
        commit: id of the commit.
        files: bytes of each file that was pushed, by its name in the repo.
        left: files and folders of the directory that were not pushed.
        removed: files of an earlier push that were deleted.
    """

    repo_id: str
    url: str
    commit: str
    files: dict[str, int]
    left: list[str]
    removed: list[str]


@dataclass(frozen=True)
class PushTarget:
    """Where a push goes.

    Attributes:
        repo_id: `owner/name`, or a name for a repo of the token's owner; created if it does not exist.
        private: whether a new repo is private; an existing one must be private already.
        revision: branch to push to, created from `main` if it does not exist; by default `main`.
        message: title of the commit.
        create_pr: open a pull request instead of committing to `main`.

    Raises:
        ValueError: for a repo, branch or title that the Hub does not accept.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    message: str = MESSAGE
    create_pr: bool = False

    def __post_init__(self) -> None:
        """Check the names before anything is sent."""
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError:
            raise ValueError(
                f"{quoted(self.repo_id)} is not an id on the Hub: give owner/name, with letters, digits, '-', '_' and "
                "'.', neither '-' nor '.' at an end, and no '--' or '..'."
            ) from None
        if self.revision is not None and self.create_pr:
            raise ValueError(
                f"A pull request goes to main: give a revision, here {quoted(self.revision)}, or create_pr."
            )
        if self.revision is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.revision):
            raise ValueError(f"{quoted(self.revision)} is not the name of a branch.")
        if not self.message.strip():
            raise ValueError("The message of the commit is empty: give it a title.")


def files_to_push(directory: str | Path) -> tuple[dict[str, int], list[str]]:
    """Bytes of each file that a push would take, and what it would leave behind; nothing is sent.

    Raises:
        ValueError: naming the file, if the directory is not whole, or one of its files cannot go to the Hub.
    """
    files = choose_files(read_whole(directory))
    return {name: path.stat().st_size for name, path in files.items()}, left_behind(Path(directory), files)


def push_directory(directory: str | Path, target: PushTarget) -> PushResult:
    """Push a saved model or a Trainer's checkpoint to the Hub in one commit; the directory does not change.

    A model that was cut gets a card that says so, with the repo's id in its loading code: the directory's card with
    its section rewritten; without one, a new card, unless the repo has one. Weights of an earlier push that this one
    does not replace are deleted.

    Args:
        directory: with `config.json` or `adapter_config.json`, and safetensors weights.
        target: where it goes.

    Raises:
        ValueError: for a mistake, before anything is sent; or if the Hub or the network refuses the push.
    """
    directory = Path(directory)
    if not directory.exists():
        raise ValueError(f"{directory} does not exist.")
    if is_offline_mode():  # which is found before every file is read
        raise ValueError("The client of the Hub is offline: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to push.")
    if get_token() is None:
        raise ValueError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    files = choose_files(read_whole(directory))
    card_of(directory, target.repo_id)  # a history that cannot be read is found before a repo is made
    try:
        return _push(directory, files, target)
    except Exception as error:  # the network, the Hub and its client raise errors of several libraries
        raise ValueError(_explained(error, target)) from error


def _push(directory: Path, files: dict[str, Path], target: PushTarget) -> PushResult:
    """Create the repo and the branch if they do not exist, and commit on top of what they hold."""
    api = HfApi(library_name="hf_compressm")
    repo_id = api.create_repo(target.repo_id, private=target.private or None, exist_ok=True).repo_id
    if target.private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public: make it private in its settings first, or push without private."
        )
    if target.revision not in (None, "main") and not str(target.revision).startswith("refs/"):
        api.create_branch(repo_id, branch=str(target.revision), exist_ok=True)
    head = api.model_info(repo_id, revision=target.revision)
    present = {file.rfilename for file in head.siblings or ()}
    contents = _written_anew(directory, files, repo_id)
    card = card_of(directory, repo_id)
    if card is not None and (CARD_FILE in files or CARD_FILE not in present):
        contents[CARD_FILE] = card.encode()
    sources: dict[str, str | bytes] = {**{name: str(path.absolute()) for name, path in files.items()}, **contents}
    removed = stale_files(set(files), present)
    done = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, source) for name, source in sources.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in removed),
        ],
        commit_message=target.message,
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=head.sha,
    )
    url = done.pr_url or f"{api.endpoint}/{repo_id}"
    if target.revision is not None:
        url += f"/tree/{quote(target.revision, safe='')}"
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return PushResult(repo_id, url, done.oid, sizes, left_behind(directory, files), removed)


def _written_anew(directory: Path, files: dict[str, Path], repo_id: str) -> dict[str, bytes]:
    """Configurations of adapters, rewritten to name the base in the repo, not one in a directory of this machine."""
    contents = {}
    for name, path in files.items():
        if PurePath(name).name == ADAPTER_CONFIG and (directory / BASE_FOLDER).is_dir():
            values = read_json(path)
            base = PureWindowsPath(str(values.get("base_model_name_or_path")))  # which knows both separators
            if base.name == BASE_FOLDER:
                values["base_model_name_or_path"] = f"{repo_id}/{BASE_FOLDER}"
                contents[name] = (json.dumps(values, indent=2) + "\n").encode()
    return contents


def _explained(error: Exception, target: PushTarget) -> str:
    """The error of a push in a sentence that says what to do."""
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError | json.JSONDecodeError):
        return f"{_in_one_line(error)}."  # from this package, or from the client, which names the file
    answered = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if answered is None:
        text = (
            f"The connection to the Hub failed ({_in_one_line(error)}), and the push to {target.repo_id} is given up."
        )
    else:
        status = answered.response.status_code
        words = _in_one_line(answered.server_message or answered)
        if status in _WAYS_OUT:
            return f"{_WAYS_OUT[status].format(repo=target.repo_id)}: {words}."
        if status < 500:
            return f"The Hub refused the push to {target.repo_id} ({status}): {words}."
        text = f"The Hub answered {status}, and the push to {target.repo_id} is given up."
    look = " Before that, check whether the pull request was opened." if target.create_pr else ""
    return f"{text} Push again later, or check the network and HF_ENDPOINT.{look}"


def _in_one_line(message: object) -> str:
    """The text of any error as one short line, without characters that a terminal would act on."""
    text = " ".join(str(message).split()) or type(message).__name__
    text = "".join(character if character.isprintable() else "?" for character in text).rstrip(".")
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and its causes: an upload in a thread fails with an error that hides the reason behind it."""
    return [] if error is None else [error, *_causes(error.__cause__)]
