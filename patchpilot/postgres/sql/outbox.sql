-- Task messages: written before they leave for the broker, gone when their task ends.

-- name: record
INSERT INTO patchpilot.outbox (
    message_id, task_id, task_name, group_id, callback_of, exchange, routing_key, queue, headers, properties, body,
    content_type, content_encoding, eta, expires
) VALUES (
    %(message_id)s, %(task_id)s, %(task_name)s, %(group_id)s, %(callback_of)s, %(exchange)s, %(routing_key)s, %(queue)s,
    %(headers)s, %(properties)s, %(body)s, %(content_type)s, %(content_encoding)s, %(eta)s, %(expires)s
)
ON CONFLICT (message_id) DO UPDATE SET sent_at = now()

-- name: end
DELETE FROM patchpilot.outbox WHERE message_id = %(message_id)s
