-- Of the times that a message was to be sent again, those that reached the broker: what nobody could push, nobody refused.
ALTER TABLE patchpilot.outbox ADD COLUMN pushes int NOT NULL DEFAULT 0;
UPDATE patchpilot.outbox SET pushes = resends WHERE resends > 0;
