-- name: ask
-- Of an unfinished run only; a repetition changes nothing. Returns the row in either case, or none.
WITH asked AS (
    INSERT INTO patchpilot.run_request (request_id, run_id, ask, asked_by, reason, digest)
    SELECT %(request_id)s, run.id, %(ask)s, %(asked_by)s, %(reason)s, %(digest)s
    FROM patchpilot.run WHERE run.id = %(run_id)s AND run.finished_at IS NULL
    ON CONFLICT (request_id) DO NOTHING
    RETURNING ask, asked_by, asked_at, reason, digest
)
SELECT * FROM asked
UNION ALL
SELECT ask, asked_by, asked_at, reason, digest FROM patchpilot.run_request WHERE request_id = %(request_id)s
LIMIT 1

-- name: requests
SELECT ask, asked_by, asked_at, reason, digest FROM patchpilot.run_request WHERE run_id = %(run_id)s ORDER BY id

-- name: unfinished
SELECT id FROM patchpilot.run WHERE environment = %(environment)s AND cluster = %(cluster)s AND finished_at IS NULL

-- name: keep_plan
INSERT INTO patchpilot.plan (environment, cluster, digest, content)
VALUES (%(environment)s, %(cluster)s, %(digest)s, %(content)s)
ON CONFLICT (environment, cluster, digest) DO NOTHING

-- name: plan
SELECT plan.content, (
    SELECT run.id FROM patchpilot.run
    JOIN patchpilot.run_entry AS entry ON entry.run_id = run.id AND entry.step = 'trigger' AND entry.kind = 'reached'
    WHERE run.environment = plan.environment AND run.cluster = plan.cluster AND run.outcome = 'done'
      AND entry.data ->> 'held_to' = plan.digest
    LIMIT 1
) AS carried_out_by
FROM patchpilot.plan
WHERE environment = %(environment)s AND cluster = %(cluster)s AND digest = %(digest)s
