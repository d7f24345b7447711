-- What chords there are, and the life of one. Reads only.

-- name: by_callback
SELECT callback_name, count(*) AS open, min(created_at) AS oldest,
       count(*) FILTER (WHERE callback IS NULL) AS unrecoverable,
       count(*) FILTER (WHERE publish_error IS NOT NULL) AS half_published,
       count(*) FILTER (WHERE shadow) AS shadow
FROM patchpilot.chord
WHERE state IN ('open', 'claimed')
GROUP BY callback_name
ORDER BY open DESC, callback_name

-- name: backlog
SELECT count(*) AS open, coalesce(now() - min(created_at), interval '0') AS oldest,
       count(*) FILTER (WHERE callback IS NULL) AS unrecoverable
FROM patchpilot.chord
WHERE state IN ('open', 'claimed') AND callback_name <> 'patchpilot.canary'

-- name: elsewhere
-- What is open of other brokers that share this record.
SELECT broker, sum(chords)::int AS chords, sum(messages)::int AS messages
FROM (
    SELECT broker, count(*) AS chords, 0 AS messages FROM patchpilot.chord
    WHERE state IN ('open', 'claimed') AND broker <> ALL(%(brokers)s::text[]) GROUP BY broker
    UNION ALL
    SELECT broker, 0, count(*) FROM patchpilot.outbox WHERE broker <> ALL(%(brokers)s::text[]) GROUP BY broker
) foreign_work
GROUP BY broker
ORDER BY broker

-- name: chord
SELECT c.group_id, c.state::text, c.callback_id, c.callback_name, c.created_at, c.finished_at, c.claims, c.claim_until,
       c.claim_until < now() AS claim_over, c.publish_error, c.unrecoverable, c.generating, c.counting, c.shadow, c.callback,
       c.callback_type, c.callback_encoding
FROM patchpilot.chord c WHERE c.group_id = %(id)s OR c.callback_id = %(id)s
ORDER BY c.created_at DESC LIMIT 1

-- name: by_task
-- The chord that has a task in its header, in a chain of it, or among those of its callback.
SELECT c.group_id, t.what
FROM (
    SELECT group_id, 'header-task' AS what FROM patchpilot.chord_part WHERE task_id = %(id)s
    UNION ALL
    SELECT group_id, 'header-task' FROM patchpilot.outbox WHERE task_id = %(id)s AND group_id IS NOT NULL
    UNION ALL
    SELECT callback_of, 'callback-task' FROM patchpilot.outbox WHERE task_id = %(id)s AND callback_of IS NOT NULL
) t
JOIN patchpilot.chord c USING (group_id)
ORDER BY c.created_at DESC LIMIT 1

-- name: by_prefix
-- The chords whose id, or that of their callback or of a task of their header, begins so.
SELECT c.group_id, c.callback_id, c.callback_name, c.state::text, c.created_at, p.task_id, count(*) OVER () AS number
FROM patchpilot.chord c
LEFT JOIN (
    SELECT group_id, min(task_id) AS task_id FROM patchpilot.chord_part WHERE starts_with(task_id, %(id)s) GROUP BY group_id
) p USING (group_id)
WHERE starts_with(c.group_id, %(id)s) OR starts_with(c.callback_id, %(id)s) OR p.task_id IS NOT NULL
ORDER BY c.created_at DESC LIMIT %(most)s

-- name: parts
-- Each with its last message, if that is not over, and with the open chord whose callback it is.
SELECT p.task_id, p.state, p.returned_at, o.task_name, o.exchange, o.routing_key, o.queue, o.sent_at, o.resends,
       i.group_id AS inside
FROM patchpilot.chord_part p
LEFT JOIN LATERAL (
    SELECT * FROM patchpilot.outbox m WHERE m.group_id = p.group_id AND m.task_id = p.task_id
    ORDER BY m.recorded_at DESC LIMIT 1
) o ON true
LEFT JOIN LATERAL (
    SELECT c.group_id FROM patchpilot.chord c
    WHERE c.callback_id = p.task_id AND c.state IN ('open', 'claimed') LIMIT 1
) i ON p.state IS NULL
WHERE p.group_id = %(group_id)s
ORDER BY p.position

-- name: callback_messages
-- Of the callback and of what follows in its chain, or of the errbacks. What has ended since it was written is over, even
-- if its worker could not say so.
SELECT o.task_id, o.task_name, o.attempt, o.exchange, o.routing_key, o.queue, o.recorded_at, o.sent_at, o.resends
FROM patchpilot.outbox o
WHERE (o.callback_of = %(group_id)s OR o.task_id = ANY(%(callback_ids)s) AND o.recorded_at >= %(created_at)s)
  AND NOT EXISTS (
      SELECT FROM patchpilot.result r
      WHERE r.task_id = o.task_id AND r.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
        AND patchpilot.tells_of(r.message_id, r.stored_at, o.message_id, o.headers, o.recorded_at)
  )
ORDER BY o.recorded_at

-- name: starts
SELECT task_id, attempt, worker, starts, started_at, finished_at, lease_until, lease_until < now() AS lease_over
FROM patchpilot.fence
WHERE scope = %(group_id)s OR task_id = ANY(%(callback_ids)s) AND started_at >= %(created_at)s ORDER BY started_at

-- name: results
SELECT task_id, state, stored_at FROM patchpilot.result
WHERE task_id = ANY(%(callback_ids)s) AND stored_at >= %(created_at)s ORDER BY stored_at

-- name: chords_inside
-- Chords that the callback consists of, or that a task of it was replaced by.
SELECT group_id FROM patchpilot.chord
WHERE callback_id = ANY(%(callback_ids)s) AND group_id <> %(group_id)s AND state IN ('open', 'claimed')

-- name: remedies
SELECT applied_at, diagnosis, remedy, run_id FROM patchpilot.remedy
WHERE subject = %(group_id)s OR subject = ANY(%(task_ids)s) ORDER BY applied_at
