-- A chord from its opening to the dispatch of its callback.

-- name: open
-- One or many, with their members.
SELECT patchpilot.open_chord(
    o.group_id, o.callback_id, o.callback_name, o.callback, o.callback_type, o.callback_encoding, o.unrecoverable,
    o.routes, o.result_serializer, o.structure, o.opener, o.generating, o.counting, o.shadow, o.publish_error, o.broker,
    ARRAY(SELECT jsonb_array_elements_text(o.task_ids))
)
FROM unnest(
    %(group_id)s::text[], %(callback_id)s::text[], %(callback_name)s::text[], %(callback)s::bytea[],
    %(callback_type)s::text[], %(callback_encoding)s::text[], %(unrecoverable)s::text[], %(routes)s::jsonb[],
    %(result_serializer)s::text[], %(structure)s::jsonb[], %(opener)s::text[], %(generating)s::boolean[],
    %(counting)s::text[], %(shadow)s::boolean[], %(publish_error)s::text[], %(broker)s::text[], %(task_ids)s::jsonb[]
) AS o (
    group_id, callback_id, callback_name, callback, callback_type, callback_encoding, unrecoverable, routes,
    result_serializer, structure, opener, generating, counting, shadow, publish_error, broker, task_ids
)

-- name: lock
SELECT group_id FROM patchpilot.chord WHERE group_id = %(group_id)s FOR UPDATE

-- name: grow
-- Under the chord's lock. Growing twice by the same task is growing once. What is added comes last, also behind what a
-- generator has yet to produce.
INSERT INTO patchpilot.chord_part (group_id, position, task_id)
SELECT c.group_id, greatest(part.next, CASE WHEN c.generating OR c.size > 0 THEN 1000000 ELSE 0 END), %(task_id)s
FROM patchpilot.chord c
CROSS JOIN LATERAL (
    SELECT coalesce(max(p.position), -1) + 1 AS next, coalesce(bool_or(p.task_id = %(task_id)s), false) AS grown
    FROM patchpilot.chord_part p WHERE p.group_id = c.group_id
) part
WHERE c.group_id = %(group_id)s AND NOT part.grown

-- name: grown
-- Where a generator produces the header, parts are counted as well: not all of them are known before they return. A
-- count in Valkey knows nothing of this part.
UPDATE patchpilot.chord
SET size = CASE WHEN generating OR size > 0 THEN size + 1 ELSE size END, distrusted = true
WHERE group_id = %(group_id)s

-- name: distrust
UPDATE patchpilot.chord SET distrusted = true WHERE group_id = %(group_id)s AND NOT distrusted

-- name: foresee
-- Under the chord's lock. A part of a header that a generator produces. Celery numbers parts, but nested groups anew.
INSERT INTO patchpilot.chord_part (group_id, position, task_id)
SELECT c.group_id, CASE WHEN part.taken THEN part.next ELSE %(position)s END, %(task_id)s
FROM patchpilot.chord c
CROSS JOIN LATERAL (
    SELECT count(*) AS count, max(p.position) + 1 AS next,
           coalesce(bool_or(p.position = %(position)s), false) AS taken,
           coalesce(bool_or(p.task_id = %(task_id)s), false) AS foreseen
    FROM patchpilot.chord_part p WHERE p.group_id = c.group_id
) part
WHERE c.group_id = %(group_id)s AND (c.generating OR c.size > part.count) AND NOT part.foreseen

-- name: generated
UPDATE patchpilot.chord SET size = size + %(size)s, generating = false WHERE group_id = %(group_id)s AND generating

-- name: return_part
-- The first return of a part stands. Parts that share a task id are told apart by their places, but only header tasks
-- are numbered as we do. No row: the chord is not in our record.
WITH returned AS (
    UPDATE patchpilot.chord_part p
    SET state = %(state)s, payload = %(payload)s, returned_at = now()
    WHERE group_id = %(group_id)s AND task_id = %(task_id)s AND state IS NULL
      AND (position = %(position)s OR NOT EXISTS (
          SELECT FROM patchpilot.chord_part same
          WHERE same.group_id = p.group_id AND same.position = %(position)s AND same.task_id = p.task_id
      ))
)
SELECT state IN ('open', 'claimed') AS live, distrusted OR counting = 'postgres' AS counted_here,
       (generating OR size > 0) AND NOT EXISTS (
           SELECT FROM patchpilot.chord_part WHERE group_id = %(group_id)s AND task_id = %(task_id)s
       ) AS unforeseen
FROM patchpilot.chord WHERE group_id = %(group_id)s

-- name: publishing_failed
UPDATE patchpilot.chord SET publish_error = %(error)s WHERE group_id = ANY(%(group_ids)s) AND state = 'open'

-- name: ready
-- Which of these chords are complete and free to be claimed.
SELECT asked.group_id FROM unnest(%(group_ids)s::text[]) AS asked (group_id) WHERE patchpilot.chord_ready(asked.group_id)

-- name: claim
-- Whoever gets the row may dispatch, the worker of the last part and recovery alike; everybody else gets nothing.
UPDATE patchpilot.chord
SET state = 'claimed', claim_token = %(token)s, claim_until = now() + %(lease)s, claims = claims + 1
WHERE group_id IN (
    SELECT c.group_id
    FROM patchpilot.chord c
    WHERE c.group_id = ANY(%(group_ids)s)
      AND (c.state = 'open' OR (c.state = 'claimed' AND (c.claim_until < now() OR c.claim_token = %(token)s)))
      AND NOT c.generating
      AND (c.size = 0 OR c.size <= (SELECT count(*) FROM patchpilot.chord_part p WHERE p.group_id = c.group_id))
      AND NOT EXISTS (SELECT FROM patchpilot.chord_part p WHERE p.group_id = c.group_id AND p.state IS NULL)
    FOR UPDATE SKIP LOCKED
)
RETURNING group_id, callback, callback_type, callback_encoding, unrecoverable, routes, structure, counting

-- name: join
SELECT group_id, task_id, state, payload
FROM patchpilot.chord_part
WHERE group_id = ANY(%(group_ids)s)
ORDER BY group_id, CASE WHEN %(ordered)s THEN position END, returned_at, position

-- name: finish
-- In the transaction that writes the callbacks' messages down: for a chord whose claim is somebody else's by now, no row
-- returns. A repetition after a commit whose answer was lost finds its own token.
UPDATE patchpilot.chord c
SET state = ending.state::patchpilot.chord_state, finish_token = %(token)s, claim_token = NULL, claim_until = NULL,
    finished_at = now()
FROM unnest(%(group_ids)s::text[], %(states)s::text[]) AS ending (group_id, state)
WHERE c.group_id = ending.group_id AND (c.claim_token = %(token)s OR c.finish_token = %(token)s)
RETURNING c.group_id

-- name: release
UPDATE patchpilot.chord
SET state = 'open', claim_token = NULL, claim_until = NULL
WHERE group_id = ANY(%(group_ids)s) AND claim_token = %(token)s

-- name: shadow_over
-- In shadow mode Celery's own backend dispatches: the chord is over when it has done so, or when all parts are in and
-- one of them failed.
UPDATE patchpilot.chord c
SET state = CASE WHEN part.failed AND NOT %(dispatched)s THEN 'failed' ELSE 'dispatched' END::patchpilot.chord_state, finished_at = now()
FROM (
    SELECT bool_or(state <> 'SUCCESS') AS failed, bool_and(state IS NOT NULL) AS complete
    FROM patchpilot.chord_part WHERE group_id = %(group_id)s
) part
WHERE c.group_id = %(group_id)s AND c.shadow AND c.state = 'open'
  AND (%(dispatched)s OR (part.complete AND part.failed))
