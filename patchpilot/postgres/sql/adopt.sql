-- Taking over chords that Celery's own backend has begun.

-- name: now
SELECT now() AS now

-- name: of_these
-- Which of these chords are on record, and which of those were taken over and are not over yet.
SELECT group_id, opener = 'adopted' AND state IN ('open', 'claimed') AS adopted
FROM patchpilot.chord WHERE group_id = ANY(%(group_ids)s)

-- name: adopt
-- Its parts are counted here from now on. That it has had keys in Valkey is told by the counting.
INSERT INTO patchpilot.chord (
    group_id, callback_id, callback_name, callback, callback_type, callback_encoding, unrecoverable, routes,
    result_serializer, structure, opener, size, counting, distrusted, broker, created_at
) VALUES (
    %(group_id)s, %(callback_id)s, %(callback_name)s, %(callback)s, %(callback_type)s, %(callback_encoding)s,
    %(unrecoverable)s, %(routes)s, %(result_serializer)s, %(structure)s, 'adopted', %(size)s, 'valkey', true, %(broker)s,
    %(since)s
)
ON CONFLICT (group_id) DO NOTHING
RETURNING group_id

-- name: add_parts
INSERT INTO patchpilot.chord_part (group_id, position, task_id, state, payload, returned_at)
SELECT %(group_id)s, part.position, part.task_id, part.state, part.payload,
       CASE WHEN part.state IS NOT NULL THEN now() END
FROM unnest(%(positions)s::int[], %(task_ids)s::text[], %(states)s::text[], %(payloads)s::bytea[])
    AS part (position, task_id, state, payload)

-- name: backdate
-- A task that ended while its message was written down has ended all the same.
UPDATE patchpilot.outbox SET recorded_at = %(since)s WHERE message_id = ANY(%(message_ids)s::uuid[])

-- name: parts_ended
-- A part that returned needs its message no more.
DELETE FROM patchpilot.outbox o USING patchpilot.chord_part p
WHERE p.group_id = %(group_id)s AND p.state IS NOT NULL AND o.group_id = p.group_id AND o.task_id = p.task_id

-- name: give_back
WITH message AS (DELETE FROM patchpilot.outbox WHERE group_id = %(group_id)s)
DELETE FROM patchpilot.chord WHERE group_id = %(group_id)s AND opener = 'adopted' AND state = 'open'
