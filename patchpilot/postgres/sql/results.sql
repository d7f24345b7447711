-- Task results and saved groups.

-- name: store
-- A result that is a success stays: a late duplicate must not overwrite it.
INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at, message_id, group_id)
VALUES (%(task_id)s, %(state)s, %(meta)s, now() + %(expires)s, %(result_of)s, %(result_group)s)
ON CONFLICT (task_id) DO UPDATE
SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at,
    message_id = EXCLUDED.message_id, group_id = EXCLUDED.group_id
WHERE r.state <> 'SUCCESS'

-- name: store_all
-- As `store`, any number of them.
INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at, message_id, group_id)
SELECT stored.task_id, stored.state, stored.meta, now() + stored.expires, stored.result_of, stored.result_group
FROM unnest(
    %(task_id)s::text[], %(state)s::text[], %(meta)s::bytea[], %(expires)s::interval[], %(result_of)s::uuid[],
    %(result_group)s::text[]
) AS stored (task_id, state, meta, expires, result_of, result_group)
ON CONFLICT (task_id) DO UPDATE
SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at,
    message_id = EXCLUDED.message_id, group_id = EXCLUDED.group_id
WHERE r.state <> 'SUCCESS'

-- name: finish
CALL patchpilot.end_task(
    %(task_id)s, %(state)s, %(meta)s, %(expires)s, %(result_of)s, %(result_group)s, %(group_id)s, %(position)s,
    %(payload)s, %(message_id)s, %(scope)s, %(attempt)s, %(owner)s, NULL, NULL, NULL, NULL
)

-- name: get
SELECT task_id, meta FROM patchpilot.result WHERE task_id = ANY(%(task_ids)s)

-- name: succeeded
-- By this message, and by no other one of the same task id. Of a result that a version before stored only that tells which
-- went with it: the message's end.
SELECT 1 FROM patchpilot.result r
WHERE r.task_id = %(task_id)s AND r.state = 'SUCCESS'
  AND (
      r.message_id = %(result_of)s
      OR r.message_id IS NULL AND %(recorded)s
      AND NOT EXISTS (SELECT FROM patchpilot.outbox o WHERE o.message_id = %(message_id)s)
  )

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
