"""What goes wrong in a lab, as data: the tables of a scenario's TOML file. `scenarios/README.md` explains them.

Reading is all that happens here. :mod:`patchpilot.lab.disturbances` plays what concerns the API's answers and
:mod:`patchpilot.lab.choreography` what happens to the nodes.
"""

from __future__ import annotations

import tomllib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from patchpilot.durations import parse_duration
from patchpilot.errors import Usage
from patchpilot.lab.answers import check, is_of_cloudwatch, operations
from patchpilot.lab.world import Milestone
from patchpilot.settings import Duration

FOLDER = Path(__file__).with_name("scenarios")
"""The scenarios that come with patchpilot."""


def _as_operation(pattern: str) -> str:
    operations(pattern)
    return pattern


Operation = Annotated[str, AfterValidator(_as_operation)]
"""The name of an operation, or a pattern such as `Describe*`."""


def _as_call(pattern: str) -> str:
    if not is_of_cloudwatch(pattern):
        operations(pattern)
    return pattern


Call = Annotated[str, AfterValidator(_as_call)]
"""Likewise; or of operations of CloudWatch, if ElastiCache has none that it means."""


def _as_shift(value: object) -> object:
    """A duration that may point into the past: `-3d`."""
    if isinstance(value, str) and value.startswith("-"):
        return -parse_duration(value[1:])
    return parse_duration(value) if isinstance(value, str) else value


Shift = Annotated[timedelta, BeforeValidator(_as_shift)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Moment(_Table):
    """When something happens."""

    since: Annotated[Milestone, Field(strict=False)] = Milestone.START
    after: Duration = timedelta()

    def begins(self, reached: datetime | None) -> datetime | None:
        """When that is, given when its milestone was reached; None if that is still to come."""
        return reached + self.after if reached is not None else None


class Window(Moment):
    """From when, and for how long. Without a word: always."""

    lasting: Duration | None = None
    """None: for ever."""

    def holds(self, reached: datetime | None, now: datetime) -> bool:
        """Whether ``now`` is in it."""
        begin = self.begins(reached)
        return begin is not None and begin <= now and (self.lasting is None or now < begin + self.lasting)


class Some(Window):
    """Some of the calls that come within a window."""

    skip: int = Field(default=0, ge=0)
    """So many of them are let through first."""
    calls: int | None = Field(default=None, ge=1)
    """So many are hit then; None: all the rest."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """The chance of each of those to be hit."""


class Stale(Window):
    """Answers lag behind what is so."""

    operation: Operation = "Describe*"
    lag: Duration
    flicker: bool = False
    """Each answer is as old as it falls, up to ``lag``: one may be older than the one before."""


class Failing(Some):
    """Calls fail with an error."""

    operation: Call = "*"
    code: str = Field(min_length=1)
    message: str = "The scenario wants it so."
    status: int = Field(400, ge=400, le=599)
    took_effect: bool = False
    """The call does what it should, and the answer is lost."""


class Refusal(Some):
    """BatchApplyUpdateAction answers 200 and `UnprocessedUpdateActions`."""

    error_type: str = Field(min_length=1)
    error_message: str = "The scenario wants it so."
    took_effect: bool = False
    """The update is started all the same."""


class Gap(Some):
    """DescribeUpdateActions does not list any update action."""


class Telling(_Table):
    """How DescribeEvents tells of certain events."""

    like: str = "*"
    """A pattern for the message; `*` and `?` as in file names."""
    source: str = "*"
    """A pattern for the source identifier."""
    late: Duration = timedelta()
    missing: bool = False


class Override(Some):
    """Members of an answer have other values than they should."""

    operation: Operation
    values: dict[str, object] = Field(min_length=1)
    """By path, as in `ReplicationGroups.AutomaticFailover`; in a list every item is meant."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for path, value in self.values.items():
            check(self.operation, path, value)
        return self


class Stall(_Table):
    """The replacement of a node takes longer, once."""

    node: int = Field(ge=1)
    """The number at the end of its name."""
    lasting: Duration | None = None
    """None: for ever."""


class Unsynced(Stall):
    """A node comes back from its replacement, AWS calls it available, and it does not synchronise."""


class Failover(Moment):
    """One more failover than the rotation needs."""


class BySystem(Moment):
    """AWS applies the update by itself."""

    scheduling: Duration = timedelta()
    """How long it is `scheduling` before."""
    scheduled: Duration = timedelta()
    """How long it is `scheduled` then."""


class Superseded(Moment):
    """The update ceases to apply."""

    by: str | None = Field(default=None, min_length=1)
    """The name of the update that replaces it; None: nothing does."""


class Update(_Table):
    """The service update of the lab. Dates count from the start."""

    severity: Literal["critical", "important", "medium", "low"] = "important"
    recommended_by: Shift = timedelta(days=23)
    ends: Shift = timedelta(days=83)
    automatic: bool = True


_LIST = Field(strict=False)  # TOML has lists where we want tuples

Outcome = Literal["done", "nothing-to-do", "error", "resume-later", "blocked", "verification-failed"]


class Scenario(_Table):
    """Everything that goes wrong. An empty one: nothing does."""

    title: str = Field(min_length=1)
    ends: Outcome = "done"
    """How the first `patchpilot run` ends if nobody disturbs it."""
    page_size: int | None = Field(default=None, ge=1, le=100)
    """So many rows at most are on a page, whatever was asked for."""
    seed: int = 0
    """Of everything that is left to chance."""
    update: Update = Update()
    stale: Annotated[tuple[Stale, ...], _LIST] = ()
    failing: Annotated[tuple[Failing, ...], _LIST] = ()
    refusal: Annotated[tuple[Refusal, ...], _LIST] = ()
    gap: Annotated[tuple[Gap, ...], _LIST] = ()
    event: Annotated[tuple[Telling, ...], _LIST] = ()
    override: Annotated[tuple[Override, ...], _LIST] = ()
    stall: Annotated[tuple[Stall, ...], _LIST] = ()
    unsynced: Annotated[tuple[Unsynced, ...], _LIST] = ()
    failover: Annotated[tuple[Failover, ...], _LIST] = ()
    by_system: BySystem | None = None
    superseded: Superseded | None = None

    @property
    def longest_lag(self) -> timedelta:
        """How far an answer may lag behind at most."""
        return max((each.lag for each in self.stale), default=timedelta())

    @property
    def highest_node(self) -> int:
        """The highest number of a node that it names."""
        return max((each.node for each in (*self.stall, *self.unsynced)), default=0)

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        for name in ("stall", "unsynced"):
            nodes = [each.node for each in getattr(self, name)]
            if len(nodes) != len(set(nodes)):
                raise ValueError(f"[[{name}]] names a node twice")
        return self


CALM = Scenario(title="nothing goes wrong")


def known() -> dict[str, Path]:
    """The scenarios that come with patchpilot, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a scenario.

    :param name: of one that comes with patchpilot, or a path: anything with a slash or the ending `.toml`.
    :raises Usage: if there is none; the message lists those there are.
    """
    if "/" in name or name.endswith(".toml"):
        return Path(name).absolute()
    if name not in known():
        raise Usage(
            f"there is no scenario {name!r}: say one of {', '.join(known())}, or the path of a file of your own"
        )
    return known()[name]


def read(path: Path) -> Scenario:
    """Read a scenario.

    :raises Usage: for an unreadable or malformed file, an unknown key or a bad value, in one line.
    """
    try:
        return Scenario.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise Usage(f"{path}: no such scenario file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise Usage(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise Usage(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    # A misspelt key is missing as well; what is misspelt says more.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    where = _written(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key; there are {', '.join(_keys(problem['loc']))}"
        case "missing":
            return f"{where}: is missing"
        case "tuple_type":
            return f"{where}: is a list of tables: write [[{where}]]"
        case "model_type":
            return f"{where}: is a table: write [{where}]"
    return f"{where or 'the file'}: {problem['msg'].removeprefix('Value error, ')}"


def _written(place: tuple[int | str, ...]) -> str:
    """A place as in `stale[0].lag`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _keys(place: tuple[int | str, ...]) -> list[str]:
    """The keys of the table that the last part of ``place`` is not one of."""
    model: Any = Scenario
    for part in place[:-1]:
        if isinstance(part, str):
            annotation: Any = model.model_fields[part].annotation
            model = next(kind for kind in (annotation, *getattr(annotation, "__args__", ())) if _is_table(kind))
    return sorted(model.model_fields)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, _Table)
