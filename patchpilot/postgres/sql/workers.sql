-- Which workers are alive, as they say themselves.

-- name: seen
INSERT INTO patchpilot.worker (instance, name, broker) VALUES (%(instance)s, %(name)s, %(broker)s)
ON CONFLICT (instance) DO UPDATE SET seen_at = now(), name = EXCLUDED.name, broker = EXCLUDED.broker

-- name: gone
DELETE FROM patchpilot.worker WHERE instance = %(instance)s OR seen_at < now() - interval '1 day'

-- name: workers
SELECT instance::text, name, broker, seen_at, seen_at > now() - %(stale)s AS alive,
       seen_at > now() - interval '1 day' AS today
FROM patchpilot.worker
