"""The chords in the admin: to look at, and to recover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import ImproperlyConfigured
from django.db.models import Count, IntegerField, OuterRef, QuerySet, Subquery
from django.http import HttpRequest

from patchpilot.clock import SYSTEM
from patchpilot.contrib.django.conf import alias, celery_app, dsn, site
from patchpilot.contrib.django.models import STATES, Chord, ChordPart
from patchpilot.dsn import mask
from patchpilot.durations import LONGEST, ago
from patchpilot.errors import PatchpilotError
from patchpilot.postgres.record import Record
from patchpilot.recovery import Finding, Recovery, Sweep, Window
from patchpilot.recovery.inventory import life

OPEN = ("open", "claimed")

NAMED = 50
"""How many chords in which nothing is stuck are named: all that one page shows."""

if TYPE_CHECKING:
    Admin = admin.ModelAdmin[Chord]
else:
    Admin = admin.ModelAdmin


class StateFilter(admin.SimpleListFilter):
    """By state; those that are open unless another is asked for, because those that are over are many."""

    title = "state"
    parameter_name = "state"

    def lookups(self, _request: HttpRequest, _model_admin: Any) -> list[tuple[str, str]]:
        return [("dispatched", "dispatched"), ("failed", "failed"), ("all", "all")]

    def choices(self, changelist: Any) -> Iterator[Any]:
        first, *others = super().choices(changelist)
        first["display"] = "open"
        yield first
        yield from others

    def queryset(self, _request: HttpRequest, queryset: QuerySet[Chord]) -> QuerySet[Chord]:
        wanted = self.value()
        if wanted == "all":
            return queryset
        if wanted not in (None, *(state for state, _ in STATES)):
            raise IncorrectLookupParameters  # to PostgreSQL it would be an error: its states are an enumeration
        return queryset.filter(state__in=OPEN if wanted is None else (wanted,))


@admin.register(Chord)
class ChordAdmin(Admin):
    """Nothing can be added, changed or deleted here: the record is the workers'."""

    list_display = ("group_id", "callback_name", "state", "header", "age", "broker")
    list_filter = (StateFilter,)
    search_fields = ("group_id__exact", "callback_id__exact")
    search_help_text = "A chord's group id, or its callback's task id; whole. Mind the state."
    ordering = ("-created_at",)
    show_full_result_count = False
    list_per_page = 50
    fields = ("group_id", "why", "state", "callback_name", "callback_id", "header", "age", "broker", "created_at",
              "finished_at", "unrecoverable", "publish_error", "shadow")  # fmt: skip
    readonly_fields = fields
    actions = ("recover",)

    def lookup_allowed(self, lookup: str, *args: Any, **kwargs: Any) -> bool:
        """By state there is the filter: see there."""
        return not lookup.startswith("state__") and super().lookup_allowed(lookup, *args, **kwargs)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Chord | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Chord | None = None) -> bool:
        return False

    def has_recover_permission(self, request: HttpRequest) -> bool:
        """Asked for the action of that name."""
        user: Any = request.user
        return bool(user.has_perm("patchpilot.recover_chord"))

    def get_queryset(self, request: HttpRequest) -> QuerySet[Chord]:
        parts = ChordPart.objects.using(alias()).filter(chord=OuterRef("pk")).order_by().values("chord")
        numbers: dict[str, Any] = {
            name: Subquery(parts.annotate(number=Count(what)).values("number"), output_field=IntegerField())
            for name, what in (("parts_total", "pk"), ("parts_done", "state"))
        }
        return super().get_queryset(request).using(alias()).annotate(**numbers)

    @admin.display(description="header")
    def header(self, chord: Any) -> str:
        """How many of its tasks have returned."""
        return f"{chord.parts_done or 0}/{chord.parts_total or 0}"

    @admin.display(description="age", ordering="created_at")
    def age(self, chord: Chord) -> str:
        """Since it was sent."""
        return ago(SYSTEM.now() - chord.created_at)

    @admin.display(description="why")
    def why(self, chord: Chord) -> str:
        """Where it stands: why its callback has run, or has not."""
        with Record(dsn(), budget=0) as database:
            return life(database, chord.group_id, celery_app().conf.accept_content).why

    @admin.action(permissions=["recover"], description="Recover what is stuck of the selected chords")
    def recover(self, request: HttpRequest, queryset: QuerySet[Chord]) -> None:
        """One pass of recovery, over these chords only."""
        chosen = {chord.group_id: chord for chord in queryset}
        complaints: dict[Finding, str] = {}

        def complain(finding: Finding, error: PatchpilotError) -> None:
            complaints[finding] = f"{finding.kind} {finding.id} was not recovered: {mask(str(error))}"

        try:
            where, config = site()
            window = Window(config.recovery_min_age, LONGEST)
            with Recovery(where, complain=complain) as recovery:
                sweep = recovery.sweep(window, ids=set(chosen))
        except (PatchpilotError, ImproperlyConfigured) as error:
            self.message_user(request, mask(str(error)), messages.ERROR)
            return
        for chord_id in dict.fromkeys(it.id for it in sweep.applied):
            self.log_change(request, chosen[chord_id], "Recovered.")
        for level, words in _told(sweep, complaints, list(chosen), config.recovery_min_age):
            self.message_user(request, words, level)


def _told(
    sweep: Sweep, complaints: Mapping[Finding, str], chosen: Sequence[str], min_age: timedelta
) -> Iterator[tuple[int, str]]:
    """What became of each chord, and how good that is."""
    applied = {(it.kind, it.id, it.diagnosis) for it in sweep.applied}
    for it in sweep.applied:
        yield messages.SUCCESS, f"{it.kind} {it.id} recovered by {it.remedy} ({it.diagnosis}): {it.reason}"
    for finding in sweep.findings:
        what = f"{finding.kind} {finding.id}"
        if not finding.curable:
            yield messages.WARNING, f"{what} was left alone ({finding.diagnosis}): {finding.reason}"
        elif finding in complaints:
            yield messages.ERROR, complaints[finding]
        elif (finding.kind, finding.id, finding.diagnosis) not in applied:
            moved = "somebody else was first, or it has moved on"
            yield messages.WARNING, f"{what} was stuck ({finding.diagnosis}), and was not recovered here: {moved}"
    found = {finding.id for finding in sweep.findings}
    if well := [chord_id for chord_id in chosen if chord_id not in found]:
        more = f" and {len(well) - NAMED} more" if len(well) > NAMED else ""
        words = f"nothing is stuck of {', '.join(well[:NAMED])}{more}, or it made progress in the last {ago(min_age)}"
        yield messages.INFO, f"{len(well)} of {len(chosen)}: {words}"
