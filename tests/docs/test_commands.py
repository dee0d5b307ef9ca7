"""Every command of the README and of the pages is tried, in the order in which somebody reads them; most are run."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from launch.cli import parse
from tests.docs.alone import one_rank_in_this_process
from tests.docs.pages import PAGES, ROOT, commands, mentions, text_of
from tests.docs.workplace import TREATMENTS, lay_out, treat

# they look at what the others have left behind
LAST = ("msmil doctor", "msmil runs", "msmil report", "msmil watch")
_FOUND = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
COMMANDS = sorted(_FOUND, key=lambda line: line.startswith(LAST))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseException | None]:
    """What became of each command."""
    folder = tmp_path_factory.mktemp("workplace")
    found: dict[str, BaseException | None] = {}
    with pytest.MonkeyPatch.context() as patch, one_rank_in_this_process():
        patch.chdir(folder)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})  # one process packs
        lay_out(Path())
        for line in COMMANDS:
            try:
                treat(line)
            except (Exception, SystemExit, pytest.fail.Exception) as error:  # the test of this command raises it
                found[line] = error
            else:
                found[line] = None
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # of all commands together: the first test runs them
@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_works(line: str, outcomes: dict[str, BaseException | None]) -> None:
    error = outcomes[line]
    if error is not None:
        raise error


@pytest.mark.parametrize("page", [*PAGES, "docs/extending.md"])
def test_commands_in_running_text_exist(page: str) -> None:
    for line in mentions(page):
        name, *rest = shlex.split(line.removeprefix("msmil "))
        if rest and not re.search(r"\b(CONFIG|RUN|COMMAND)\b", line) and not rest[0].startswith("-"):
            assert callable(parse([name, *rest]).run), line
        else:
            with pytest.raises(SystemExit, match="0"):
                parse([name, "--help"])


@pytest.mark.parametrize("page", [*PAGES, "docs/extending.md"])
def test_named_files_exist(page: str) -> None:
    named = re.findall(
        r"\b(?:configs|docs|tests|msmil|shards|launch)/[\w./-]+\.(?:yaml|py|md|png|jpg)\b", text_of(page)
    )
    new = set(re.findall(r'^```python title="([^"]+)"', text_of(page), flags=re.MULTILINE))
    for path in set(named) - new:
        assert (ROOT / path).is_file(), path


def test_every_treatment_is_needed() -> None:
    unused = [pattern for pattern, _ in TREATMENTS if not any(re.fullmatch(pattern, line) for line in COMMANDS)]
    assert not unused
