-- name: make_lease
INSERT INTO patchpilot.lease (environment, cluster) VALUES (%(environment)s, %(cluster)s) ON CONFLICT DO NOTHING

-- name: lock_lease
-- Waits for whoever writes under the lease, or takes it, at this moment. PostgreSQL's clock is the only one that counts.
SELECT token, run_id, holder, claim, since, until, until > now() AS live FROM patchpilot.lease
WHERE environment = %(environment)s AND cluster = %(cluster)s FOR UPDATE

-- name: run_to_take_up
-- The unfinished run; else the one that has just been finished by a process that died before it could say so.
SELECT run.id FROM patchpilot.run
JOIN patchpilot.lease USING (environment, cluster)
WHERE environment = %(environment)s AND cluster = %(cluster)s
  AND (run.finished_at IS NULL
       OR (run.id = lease.run_id AND NOT lease.released AND run.outcome IN ('done', 'aborted')
           AND run.finished_at > now() - %(lately)s))
ORDER BY run.finished_at NULLS FIRST
LIMIT 1

-- name: make_run
INSERT INTO patchpilot.run (id, environment, cluster) VALUES (%(run_id)s, %(environment)s, %(cluster)s)

-- name: take_lease
UPDATE patchpilot.lease
SET token = token + 1, run_id = %(run_id)s, holder = %(holder)s, claim = %(claim)s, since = now(),
    until = now() + %(ttl)s, released = false
WHERE environment = %(environment)s AND cluster = %(cluster)s
RETURNING token

-- name: renew_lease
UPDATE patchpilot.lease SET until = now() + %(ttl)s
WHERE environment = %(environment)s AND cluster = %(cluster)s AND token = %(token)s

-- name: release_lease
UPDATE patchpilot.lease SET until = now(), released = true
WHERE environment = %(environment)s AND cluster = %(cluster)s AND token = %(token)s

-- name: append
-- One statement: the lease's row is locked, so that a take-over comes wholly before this write, which then writes
-- nothing and returns no row, or wholly after it. A repetition finds its entry_id and returns what was written.
WITH held AS (
    SELECT run_id, token FROM patchpilot.lease
    WHERE environment = %(environment)s AND cluster = %(cluster)s AND token = %(token)s FOR UPDATE
), written AS (
    INSERT INTO patchpilot.run_entry (run_id, seq, entry_id, token, at, kind, phase, step, data)
    SELECT held.run_id,
           (SELECT coalesce(max(seq), 0) + 1 FROM patchpilot.run_entry WHERE run_id = held.run_id),
           %(entry_id)s, held.token, %(at)s, %(kind)s, %(phase)s, %(step)s, %(data)s
    FROM held
    ON CONFLICT (entry_id) DO NOTHING
    RETURNING run_id, seq, at, data
), finished AS (
    UPDATE patchpilot.run SET outcome = coalesce(written.data ->> 'outcome', 'done'), finished_at = written.at
    FROM written WHERE run.id = written.run_id AND %(kind)s = 'finished'
)
SELECT coalesce(
    (SELECT seq FROM written), (SELECT seq FROM patchpilot.run_entry WHERE entry_id = %(entry_id)s)
) AS seq
FROM held

-- name: entries
SELECT seq, at, kind, phase, step, data FROM patchpilot.run_entry WHERE run_id = %(run_id)s ORDER BY seq

-- name: runs
SELECT run.id, run.environment, run.cluster, run.outcome, run.created_at, run.finished_at,
       lease.token, lease.holder, lease.since, lease.until, lease.until > now() AS live,
       last.kind, last.phase, last.step, last.at, last.data ->> 'why' AS why
FROM patchpilot.run
LEFT JOIN patchpilot.lease ON lease.run_id = run.id
LEFT JOIN LATERAL (
    SELECT kind, phase, step, at, data FROM patchpilot.run_entry WHERE run_id = run.id ORDER BY seq DESC LIMIT 1
) AS last ON true
WHERE (%(run_id)s::text IS NULL OR run.id = %(run_id)s)
  AND (%(environment)s::text IS NULL OR run.environment = %(environment)s)
  AND (%(cluster)s::text IS NULL OR run.cluster = %(cluster)s)
ORDER BY run.created_at DESC, run.id DESC
LIMIT %(limit)s

-- name: newest_migration
SELECT max(number) AS number FROM patchpilot.migration
