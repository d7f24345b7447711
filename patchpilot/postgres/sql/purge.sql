-- What is over, in small batches. Rows that somebody else has locked are left for the next time.

-- name: results
-- Not the result of a task that an open chord still waits for: recovery may need it to record the part. Nor one that
-- tells that a message on record is over: its task would run again.
DELETE FROM patchpilot.result WHERE task_id IN (
    SELECT r.task_id FROM patchpilot.result r
    WHERE r.expires_at < now()
      AND NOT EXISTS (
          SELECT FROM patchpilot.chord c JOIN patchpilot.chord_part p USING (group_id)
          WHERE c.state IN ('open', 'claimed') AND p.state IS NULL AND p.task_id = r.task_id
      )
      AND NOT EXISTS (
          SELECT FROM patchpilot.outbox o WHERE o.task_id = r.task_id AND o.recorded_at <= r.stored_at
      )
    ORDER BY r.expires_at LIMIT %(batch)s FOR UPDATE OF r SKIP LOCKED
)

-- name: saved_groups
DELETE FROM patchpilot.saved_group WHERE group_id IN (
    SELECT group_id FROM patchpilot.saved_group WHERE expires_at < now()
    ORDER BY expires_at LIMIT %(batch)s FOR UPDATE SKIP LOCKED
)

-- name: parts
-- Of the chords that are over: they go part by part, or a few large ones would be one large transaction. One whose
-- callback's message is still on its way is not over yet.
WITH over AS (
    SELECT c.group_id FROM patchpilot.chord c
    WHERE c.finished_at < now() - %(retention)s
      AND NOT EXISTS (SELECT FROM patchpilot.outbox o WHERE o.callback_of = c.group_id)
    ORDER BY c.finished_at LIMIT %(batch)s FOR UPDATE OF c SKIP LOCKED
)
DELETE FROM patchpilot.chord_part WHERE (group_id, position) IN (
    SELECT p.group_id, p.position FROM over JOIN patchpilot.chord_part p USING (group_id) LIMIT %(batch)s
)

-- name: chords
-- Those of the same chords that have no parts left.
WITH over AS (
    SELECT c.group_id FROM patchpilot.chord c
    WHERE c.finished_at < now() - %(retention)s
      AND NOT EXISTS (SELECT FROM patchpilot.outbox o WHERE o.callback_of = c.group_id)
    ORDER BY c.finished_at LIMIT %(batch)s FOR UPDATE OF c SKIP LOCKED
)
DELETE FROM patchpilot.chord WHERE group_id IN (
    SELECT o.group_id FROM over o
    WHERE NOT EXISTS (SELECT FROM patchpilot.chord_part p WHERE p.group_id = o.group_id)
)

-- name: messages
-- Messages whose task has ended, but whose worker died before it could say so.
DELETE FROM patchpilot.outbox WHERE message_id IN (
    SELECT o.message_id FROM patchpilot.outbox o
    JOIN patchpilot.result r
        ON r.task_id = o.task_id AND r.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
        AND patchpilot.tells_of(r.message_id, r.stored_at, o.message_id, o.headers, o.recorded_at)
    WHERE o.sent_at < now() - %(retention)s
    ORDER BY o.sent_at LIMIT %(batch)s FOR UPDATE OF o SKIP LOCKED
)

-- name: starts
DELETE FROM patchpilot.fence WHERE (scope, task_id, attempt) IN (
    SELECT f.scope, f.task_id, f.attempt FROM patchpilot.fence f
    WHERE coalesce(f.finished_at, f.lease_until) < now() - %(retention)s
      AND NOT EXISTS (SELECT FROM patchpilot.outbox o WHERE o.task_id = f.task_id AND f.finished_at IS NULL)
    ORDER BY coalesce(f.finished_at, f.lease_until) LIMIT %(batch)s FOR UPDATE OF f SKIP LOCKED
)
