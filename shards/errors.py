"""The one error class for users: it names the file, the thing that is wrong and the fix."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """Something a user can mend. Commands print it as one line without a traceback and exit with code 2.

    Args:
        thing: what is wrong, with the offending value.
        fix: what to do about it, as an instruction.
        file: the file or folder it is about, if there is one.
    """

    def __init__(self, thing: str, *, fix: str, file: str | Path | None = None) -> None:
        self.thing = thing
        self.fix = fix
        self.file = None if file is None else str(file)
        super().__init__(thing, fix, self.file)

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self.thing, self.fix, self.file)

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        return f"{where}{self.thing}. Fix: {self.fix}"


def _restore(thing: str, fix: str, file: str | None) -> UserError:
    """Unpickle in another process: exceptions are rebuilt from positional arguments only."""
    return UserError(thing, fix=fix, file=file)
