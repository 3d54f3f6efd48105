"""What goes wrong on the way to the Hub: what may pass and is tried again, and how the rest is said in one line."""

import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError


Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt."""
PASSING = (408, 412, 429, 500, 502, 503, 504)
"""Statuses of a Hub that is busy or down; 412 is a commit of somebody else since the repo was looked at."""
LONGEST_REASON = 300

_WAYS_OUT = {
    401: "The Hub does not accept the token (401). Log in with `hf auth login`, or set HF_TOKEN to a valid one",
    403: "The token may not write to {repo} (403). Make one that may at https://huggingface.co/settings/tokens, or "
    "push to a repo of your own",
    404: "{repo} is not there for this token (404). Check the id, the revision and the token's permissions",
    412: "Others commit to {repo} at the same time (412). Push again when they are done",
}


def retried(action: Callable[[], Result], say: Callable[[str], None], waits: tuple[float, ...] = WAITS) -> Result:
    """The result of an action that is tried again after what may pass: a broken connection, a Hub that is down.

    Args:
        action: safe to be carried out twice.
        say: told of each failure that is not the last.
        waits: seconds before each further attempt.
    """
    for wait in waits:
        try:
            return action()
        except Exception as error:  # of the network, the Hub and its client, in several libraries
            reason = passing_reason(error)
            if reason is None:
                raise
            say(f"{reason}; trying again in {wait:g} s.")
            time.sleep(wait)
    return action()


def passing_reason(error: BaseException) -> str | None:
    """Why an attempt failed, if the next one may not; None if that would fail too."""
    status = status_of(error)
    if status is not None:
        return f"The Hub answered {status}" if status in PASSING else None
    for cause in _causes(error):
        if isinstance(cause, (HTTPError, TimeoutError, ConnectionError)):  # of the client's library of HTTP, or Python
            return f"The connection to the Hub failed ({in_one_line(cause)})"
        if isinstance(cause, JSONDecodeError):
            return "What answered was not the Hub, or not whole"
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error comes from; None if the Hub did not answer."""
    return next((cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def explained(error: BaseException, repo_id: str, attempts: int) -> str:
    """An error of a push in a sentence that names the way out.

    Args:
        error: the last one.
        repo_id: where to the push was.
        attempts: how often what may pass was tried.
    """
    status = status_of(error)
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError) and passing_reason(error) is None:
        return f"{in_one_line(error)}."  # of this package, or of the client, which names the file
    if status in _WAYS_OUT:
        return f"{_WAYS_OUT[status].format(repo=repo_id)}: {_words_of_the_hub(error)}."
    if status is not None and status < 500 and status not in PASSING:
        return f"The Hub refused the push to {repo_id} ({status}): {_words_of_the_hub(error)}."
    reason = passing_reason(error)
    if reason is None:
        return f"The push to {repo_id} failed: {in_one_line(error)}."
    times = "once" if attempts == 1 else f"{attempts} times"
    return (
        f"{reason}, {times}, and the push to {repo_id} is given up. Try later, or check the network and HF_ENDPOINT."
    )


def in_one_line(error: BaseException) -> str:
    """The text of an error, of whatever origin: one line, short, and without what a terminal would act on."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "?" for character in text).rstrip(".")
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


def _words_of_the_hub(error: BaseException) -> str:
    """What the Hub itself said, without what its client puts around that."""
    answered = next(cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError))
    return in_one_line(ValueError(answered.server_message or answered))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it comes from: an upload in a thread fails with what says so, and the reason behind it."""
    while error is not None:
        yield error
        error = error.__cause__
