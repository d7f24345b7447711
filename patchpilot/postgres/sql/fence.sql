-- What starts twice runs once.

-- name: start
-- A row comes back when the execution may begin: nobody began it, or whoever did is gone.
INSERT INTO patchpilot.fence AS f (scope, task_id, attempt, owner, worker, lease_until)
VALUES (%(scope)s, %(task_id)s, %(attempt)s, %(owner)s, %(worker)s, now() + %(lease)s)
ON CONFLICT (scope, task_id, attempt) DO UPDATE
SET owner = EXCLUDED.owner, worker = EXCLUDED.worker, lease_until = EXCLUDED.lease_until, started_at = now(),
    starts = f.starts + CASE WHEN f.owner = EXCLUDED.owner THEN 0 ELSE 1 END
WHERE f.finished_at IS NULL
  AND (f.lease_until < now() OR f.owner = EXCLUDED.owner OR f.worker = %(gone)s)
RETURNING f.starts

-- name: look
SELECT worker, finished_at IS NOT NULL AS finished
FROM patchpilot.fence WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s

-- name: renew
-- A row is touched for as long as nobody else has begun it: also if it is over by now.
UPDATE patchpilot.fence SET lease_until = now() + %(lease)s
WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s AND owner = %(owner)s

-- name: end
-- An execution is over: its start, and its message with it.
WITH ended AS (
    DELETE FROM patchpilot.outbox WHERE message_id = %(message_id)s
)
UPDATE patchpilot.fence SET finished_at = now()
WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s AND owner = %(owner)s
  AND finished_at IS NULL

-- name: give_up
-- The task was rejected to be delivered again: the next delivery is a first one.
DELETE FROM patchpilot.fence
WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s AND owner = %(owner)s
  AND finished_at IS NULL

-- name: end_for_others
UPDATE patchpilot.fence SET finished_at = now()
WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s AND finished_at IS NULL

-- name: runs_again
SELECT 1 FROM patchpilot.outbox
WHERE message_id = %(message_id)s AND NOT EXISTS (
    SELECT FROM patchpilot.fence
    WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s AND starts >= %(most)s
)

-- name: on_record
SELECT 1 FROM patchpilot.outbox WHERE message_id = %(message_id)s
