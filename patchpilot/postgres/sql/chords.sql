-- A chord from its opening to the dispatch of its callback.

-- name: open
-- A frozen chord that is applied again keeps its group id, gets a new callback id, and begins anew. The same callback
-- id is a repetition (the step before it in a chain was delivered twice): what is on record stands, and no row returns.
INSERT INTO patchpilot.chord AS c (
    group_id, callback_id, callback_name, callback, callback_type, callback_encoding, routes, result_serializer, structure
) VALUES (
    %(group_id)s, %(callback_id)s, %(callback_name)s, %(callback)s, %(callback_type)s, %(callback_encoding)s,
    %(routes)s, %(result_serializer)s, %(structure)s
)
ON CONFLICT (group_id) DO UPDATE SET
    state = 'open', callback_id = EXCLUDED.callback_id, callback_name = EXCLUDED.callback_name,
    callback = EXCLUDED.callback, callback_type = EXCLUDED.callback_type, callback_encoding = EXCLUDED.callback_encoding,
    routes = EXCLUDED.routes, result_serializer = EXCLUDED.result_serializer, structure = EXCLUDED.structure,
    publish_error = NULL, created_at = now(), claim_token = NULL, claim_until = NULL, claims = 0, distrusted = false, finished_at = NULL
WHERE c.callback_id <> EXCLUDED.callback_id
RETURNING group_id

-- name: clear_parts
DELETE FROM patchpilot.chord_part WHERE group_id = %(group_id)s

-- name: add_parts
INSERT INTO patchpilot.chord_part (group_id, position, task_id)
SELECT %(group_id)s, header.position - 1, header.task_id
FROM unnest(%(task_ids)s::text[]) WITH ORDINALITY AS header (task_id, position)

-- name: lock
SELECT group_id FROM patchpilot.chord WHERE group_id = %(group_id)s FOR UPDATE

-- name: grow
-- Under the chord's lock. Growing twice by the same task is growing once.
INSERT INTO patchpilot.chord_part (group_id, position, task_id)
SELECT %(group_id)s, coalesce(max(position), -1) + 1, %(task_id)s
FROM patchpilot.chord_part
WHERE group_id = %(group_id)s
HAVING coalesce(bool_and(task_id <> %(task_id)s), true)

-- name: return_part
-- The first return of a part stands. No row: the chord is not in our record.
WITH returned AS (
    UPDATE patchpilot.chord_part
    SET state = %(state)s, payload = %(payload)s, returned_at = now()
    WHERE group_id = %(group_id)s AND task_id = %(task_id)s AND state IS NULL
)
SELECT state IN ('open', 'claimed') AS live, distrusted FROM patchpilot.chord WHERE group_id = %(group_id)s

-- name: publishing_failed
UPDATE patchpilot.chord SET publish_error = %(error)s WHERE group_id = %(group_id)s AND state = 'open'

-- name: claim
-- Whoever gets the row may dispatch, the worker of the last part and recovery alike; everybody else gets nothing.
UPDATE patchpilot.chord
SET state = 'claimed', claim_token = %(token)s, claim_until = now() + %(lease)s, claims = claims + 1
WHERE group_id IN (
    SELECT c.group_id
    FROM patchpilot.chord c
    WHERE c.group_id = %(group_id)s
      AND (c.state = 'open' OR (c.state = 'claimed' AND (c.claim_until < now() OR c.claim_token = %(token)s)))
      AND NOT EXISTS (SELECT FROM patchpilot.chord_part p WHERE p.group_id = c.group_id AND p.state IS NULL)
    FOR UPDATE SKIP LOCKED
)
RETURNING group_id, callback_id, callback_name, callback, callback_type, callback_encoding, routes, result_serializer,
          structure, claims

-- name: is_free
-- Whether a claim that got no row may get it in a moment: the row was merely locked, by somebody who did not claim it.
SELECT 1
FROM patchpilot.chord c
WHERE c.group_id = %(group_id)s
  AND (c.state = 'open' OR (c.state = 'claimed' AND c.claim_until < now()))
  AND NOT EXISTS (SELECT FROM patchpilot.chord_part p WHERE p.group_id = c.group_id AND p.state IS NULL)

-- name: join
SELECT task_id, state, payload
FROM patchpilot.chord_part
WHERE group_id = %(group_id)s
ORDER BY CASE WHEN %(ordered)s THEN position END, returned_at, position

-- name: already_dispatched
-- After a claim that was interrupted: did the callback get out before its claimer died? A callback of one task is
-- known by its id; one of many (a group, a chain) is sent again whole, and the fence stops what already ran.
SELECT EXISTS (
        SELECT FROM patchpilot.result r JOIN patchpilot.chord c ON c.group_id = %(group_id)s
        WHERE r.task_id = c.callback_id AND r.state IN ('SUCCESS', 'FAILURE', 'REVOKED') AND r.stored_at > c.created_at
    )
    OR EXISTS (SELECT FROM patchpilot.fence WHERE group_id = %(group_id)s AND task_id = %(callback_id)s)
    OR EXISTS (SELECT FROM patchpilot.outbox WHERE task_id = %(callback_id)s AND callback_of = %(group_id)s) AS yes

-- name: finish
UPDATE patchpilot.chord
SET state = %(state)s, claim_token = NULL, claim_until = NULL, finished_at = now()
WHERE group_id = %(group_id)s AND claim_token = %(token)s

-- name: release
UPDATE patchpilot.chord
SET state = 'open', claim_token = NULL, claim_until = NULL
WHERE group_id = %(group_id)s AND claim_token = %(token)s
