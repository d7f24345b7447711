-- Task results and saved groups.

-- name: store
-- A result that is a success stays: a late duplicate must not overwrite it.
INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at)
VALUES (%(task_id)s, %(state)s, %(meta)s, now() + %(expires)s)
ON CONFLICT (task_id) DO UPDATE
SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at
WHERE r.state <> 'SUCCESS'

-- name: finish
-- The end of a task in one statement: its result, its part of a chord, its message and its start. What it has not got is
-- null here and matches nothing. A row returns if the part belongs to a chord on record.
WITH stored AS (
    INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at)
    VALUES (%(task_id)s, %(state)s, %(meta)s, now() + %(expires)s)
    ON CONFLICT (task_id) DO UPDATE
    SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at
    WHERE r.state <> 'SUCCESS'
), returned AS (
    UPDATE patchpilot.chord_part p
    SET state = %(state)s, payload = %(payload)s, returned_at = now()
    WHERE group_id = %(group_id)s AND task_id = %(task_id)s AND state IS NULL
      AND (position = %(position)s OR NOT EXISTS (
          SELECT FROM patchpilot.chord_part same
          WHERE same.group_id = p.group_id AND same.position = %(position)s AND same.task_id = p.task_id
      ))
), ended AS (
    DELETE FROM patchpilot.outbox WHERE message_id = %(message_id)s
), run AS (
    UPDATE patchpilot.fence SET finished_at = now()
    WHERE scope = %(scope)s AND task_id = %(task_id)s AND attempt = %(attempt)s AND owner = %(owner)s
      AND finished_at IS NULL
)
SELECT state IN ('open', 'claimed') AS live, distrusted OR counting = 'postgres' AS counted_here,
       (generating OR size > 0) AND NOT EXISTS (
           SELECT FROM patchpilot.chord_part WHERE group_id = %(group_id)s AND task_id = %(task_id)s
       ) AS unforeseen
FROM patchpilot.chord WHERE group_id = %(group_id)s

-- name: get
SELECT task_id, meta FROM patchpilot.result WHERE task_id = ANY(%(task_ids)s)

-- name: forget
DELETE FROM patchpilot.result WHERE task_id = %(task_id)s

-- name: save_group
INSERT INTO patchpilot.saved_group (group_id, meta, expires_at)
VALUES (%(group_id)s, %(meta)s, now() + %(expires)s)
ON CONFLICT (group_id) DO UPDATE SET meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at

-- name: get_group
SELECT meta FROM patchpilot.saved_group WHERE group_id = %(group_id)s

-- name: delete_group
DELETE FROM patchpilot.saved_group WHERE group_id = %(group_id)s
