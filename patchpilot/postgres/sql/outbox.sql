-- Task messages: written before they leave for the broker, gone when their task ends.

-- name: record
-- All messages of one dispatch in one statement. A repetition, after a commit whose answer was lost, changes nothing.
INSERT INTO patchpilot.outbox (
    message_id, task_id, task_name, group_id, callback_of, scope, attempt, exchange, routing_key, queue, headers,
    properties, body, content_type, content_encoding, eta, expires, broker, shadow
)
SELECT message.*, %(shadow)s FROM unnest(
    %(message_id)s::uuid[], %(task_id)s::text[], %(task_name)s::text[], %(group_id)s::text[], %(callback_of)s::text[],
    %(scope)s::text[], %(attempt)s::text[], %(exchange)s::text[], %(routing_key)s::text[], %(queue)s::text[],
    %(headers)s::bytea[], %(properties)s::bytea[], %(body)s::bytea[], %(content_type)s::text[],
    %(content_encoding)s::text[], %(eta)s::timestamptz[], %(expires)s::timestamptz[],
    %(broker)s::text[]
) AS message
ON CONFLICT (message_id) DO UPDATE SET sent_at = now()

-- name: going_on
-- Whoever pushes these is still at it.
UPDATE patchpilot.outbox SET sent_at = now() WHERE message_id = ANY(%(message_ids)s::uuid[])

-- name: end
DELETE FROM patchpilot.outbox WHERE message_id = ANY(%(message_ids)s::uuid[])
