-- Whose turn it is to sweep. The times are PostgreSQL's: the workers' clocks may differ.

-- name: take
INSERT INTO patchpilot.sweep AS s (broker, holder, began_at, lease_until)
VALUES (%(broker)s, %(holder)s, now(), now() + %(lease)s)
ON CONFLICT (broker) DO UPDATE
SET holder = EXCLUDED.holder, began_at = EXCLUDED.began_at, lease_until = EXCLUDED.lease_until
WHERE (s.lease_until < now() OR s.holder = EXCLUDED.holder)
  AND (s.covered_at IS NULL OR s.covered_at < now() - %(since)s)
RETURNING s.began_at

-- name: covered
SELECT covered_at FROM patchpilot.sweep WHERE broker = %(broker)s AND covered_at >= now() - %(since)s

-- name: end
UPDATE patchpilot.sweep
SET lease_until = now(), covered_at = CASE WHEN %(whole)s THEN began_at ELSE covered_at END
WHERE broker = %(broker)s AND holder = %(holder)s
