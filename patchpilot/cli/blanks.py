"""Words of the command line that no command can do anything with."""

from __future__ import annotations

from collections.abc import Sequence

from patchpilot.errors import Usage


def refuse_blanks(arguments: Sequence[str]) -> None:
    """See to it that no option of any command has an empty value, and that no argument is empty.

    ``run --plan "$PLAN"`` must not mean a run without a plan because PLAN is not set.

    :raises Usage: one is, or is nothing but white space.
    """
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, is_option, value = word.partition("=") if word.startswith("--") else (before, True, word)
        if is_option and not value.strip():
            what = f"{option} has an empty value" if option.startswith("-") else "an argument is empty"
            raise Usage(f"{what}: is a variable not set? Give it a value, or leave it out")


def refuse_unreadable(arguments: Sequence[str]) -> None:
    """See to it that every word is a text: one that is not can be neither looked up nor printed.

    :raises Usage: one is none.
    """
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise Usage(f"{word!a} is no UTF-8: give it in the encoding of this terminal, UTF-8") from None
