-- The purge asks of each result whether a message of its task is left: by an index, however many messages there are.
CREATE INDEX outbox_task ON patchpilot.outbox (task_id);
