-- Canaries: how they come back, and how nothing of them stays. Their chords are known by the name of their callback.

-- name: came_back
UPDATE patchpilot.worker SET canary = canary || %(proof)s WHERE instance = %(instance)s

-- name: close
-- The callback ran: its chord is over.
DELETE FROM patchpilot.chord WHERE group_id = %(group_id)s AND callback_name = 'patchpilot.canary'

-- name: purge
-- Those that a pilot is done with, and those of its broker that are older than any pilot waits.
DELETE FROM patchpilot.chord
WHERE callback_name = 'patchpilot.canary'
  AND (
      group_id = ANY(%(group_ids)s)
      OR created_at < now() - %(age)s AND (broker IS NULL OR broker = ANY(%(brokers)s::text[]))
  )
RETURNING group_id

-- name: proofs
SELECT instance::text, canary FROM patchpilot.worker

-- name: queues
-- Every queue that a message was sent to whose task has not ended.
SELECT DISTINCT coalesce(queue, routing_key) AS queue FROM patchpilot.outbox
