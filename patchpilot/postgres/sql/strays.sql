-- Whose keys in Valkey may go.

-- name: unswept
-- Chords that are over, that had keys, and whose keys nobody has looked after since. Oldest first.
SELECT group_id FROM patchpilot.chord
WHERE counting = 'valkey' AND finished_at < now() - %(min_age)s AND NOT swept AND NOT shadow
  AND (broker IS NULL OR broker = ANY(%(brokers)s::text[]))
ORDER BY finished_at LIMIT %(batch)s

-- name: swept
-- Not those that began anew meanwhile: their keys are theirs.
UPDATE patchpilot.chord SET swept = true WHERE group_id = ANY(%(group_ids)s) AND finished_at IS NOT NULL

-- name: on_record
SELECT group_id FROM patchpilot.chord WHERE group_id = ANY(%(group_ids)s)
