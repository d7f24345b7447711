"""The chords on record, as models that Django neither makes nor migrates. For reading only."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import models

STATES = (("open", "open"), ("claimed", "claimed"), ("dispatched", "dispatched"), ("failed", "failed"))


class Chord(models.Model):
    """One chord."""

    group_id = models.TextField(primary_key=True)
    state = models.TextField(choices=STATES)
    callback_id = models.TextField()
    callback_name = models.TextField("callback")
    broker = models.TextField(null=True)
    unrecoverable = models.TextField(null=True)
    publish_error = models.TextField(null=True)
    shadow = models.BooleanField()
    created_at = models.DateTimeField("sent")
    finished_at = models.DateTimeField(null=True)

    class Meta:
        managed = False
        db_table = 'patchpilot"."chord'
        default_permissions = ("view",)
        permissions: ClassVar[Any] = [("recover_chord", "Can recover chord")]

    def __str__(self) -> str:
        return f"{self.callback_name} of {self.group_id}"


class ChordPart(models.Model):
    """One part of a chord's header."""

    chord = models.ForeignKey(Chord, models.DO_NOTHING, related_name="parts", db_column="group_id")
    task_id = models.TextField(primary_key=True)  # within its chord; Django wants one
    position = models.IntegerField()
    state = models.TextField(null=True)
    returned_at = models.DateTimeField(null=True)

    class Meta:
        managed = False
        db_table = 'patchpilot"."chord_part'
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.task_id} {self.state or 'to come'}"
