"""What kombu would make of settings that name its serialisers and its priority steps."""

from __future__ import annotations

from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import prepare_accept_content


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """``names`` of serialisers, if there are such here.

    :raises ValueError: if one is not.
    """
    for name in names:
        try:
            prepare_accept_content([name])
        except SerializerNotInstalled:
            raise ValueError(
                f"there is no serialiser {name!r} here: correct the name, or install its package beside patchpilot"
            ) from None
    return names


def ascending(steps: tuple[int, ...]) -> tuple[int, ...]:
    """``steps`` of priorities, if kombu takes them as they are.

    :raises ValueError: if it does not.
    """
    if not steps or min(steps) < 0 or list(steps) != sorted(set(steps)):
        raise ValueError(
            "write the application's steps from the lowest to the highest, none below 0, as in [0, 3, 6, 9]; leave it "
            "out where the application sets none"
        )
    return steps
