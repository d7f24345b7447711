-- What recovery reads, and the guards under which it writes.

-- name: open_chords
-- Every chord whose callback is not out yet and that made no progress for a while; and how many made progress too lately
-- or too long ago to be looked at: too long also by the time that a task of its header waits for. There is always a row:
-- with no group_id if there is nothing to look at.
WITH open_chord AS (
    SELECT c.group_id, c.callback_id, c.callback_name, c.state = 'claimed' AS claimed, c.publish_error, c.shadow,
           c.counting, c.unrecoverable,
           coalesce(c.claim_until > now(), false) AS claim_live,
           greatest(c.created_at, part.last_return, message.last_sent) AS progress_at, message.last_eta,
           part.total, part.returned, part.failed, part.ended, part.inner_chords, coalesce(message.count, 0) AS messages
    FROM patchpilot.chord c
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.generating THEN count(*) + 1 ELSE greatest(count(*), c.size) END AS total,
               count(p.state) AS returned,
               count(*) FILTER (WHERE p.state <> 'SUCCESS') AS failed, max(p.returned_at) AS last_return,
               count(*) FILTER (WHERE p.state IS NULL AND r.task_id IS NOT NULL) AS ended,
               count(*) FILTER (WHERE p.state IS NULL AND inner_chord.group_id IS NOT NULL) AS inner_chords
        FROM patchpilot.chord_part p
        LEFT JOIN LATERAL (
            SELECT result.task_id FROM patchpilot.result
            WHERE p.state IS NULL AND result.task_id = p.task_id AND result.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
              AND result.stored_at BETWEEN c.created_at AND now() - %(interrupted_after)s
              AND coalesce(result.group_id = p.group_id, true)
              AND NOT (
                  -- A task that is in the header more than once: while a message of it is left, its result is another's.
                  EXISTS (SELECT FROM patchpilot.outbox o WHERE o.group_id = p.group_id AND o.task_id = p.task_id)
                  AND EXISTS (
                      SELECT FROM patchpilot.chord_part same
                      WHERE same.group_id = p.group_id AND same.task_id = p.task_id AND same.position <> p.position
                  )
              )
            LIMIT 1
        ) r ON true
        LEFT JOIN LATERAL (
            -- With a limit: two chords may have one callback id.
            SELECT waited_for.group_id FROM patchpilot.chord waited_for
            WHERE p.state IS NULL AND waited_for.callback_id = p.task_id AND waited_for.state IN ('open', 'claimed')
            LIMIT 1
        ) inner_chord ON true
        WHERE p.group_id = c.group_id
    ) part
    LEFT JOIN LATERAL (
        SELECT count(*) AS count, max(o.sent_at) AS last_sent, max(o.eta) AS last_eta
        FROM patchpilot.outbox o WHERE o.group_id = c.group_id
    ) message ON true
    -- A canary is the pilot's own: it is never stuck, only late, and what is left of it is purged.
    WHERE c.state IN ('open', 'claimed') AND c.callback_name <> 'patchpilot.canary'
      AND (c.broker IS NULL OR c.broker = ANY(%(brokers)s::text[]))
)
SELECT outside.*, found.*, now() - found.progress_at AS age
FROM (
    SELECT count(*) FILTER (WHERE progress_at > now() - %(min_age)s) AS young,
           count(*) FILTER (WHERE greatest(progress_at, last_eta) < now() - %(max_age)s) AS old
    FROM open_chord
) outside
LEFT JOIN open_chord found
    ON found.progress_at <= now() - %(min_age)s AND greatest(found.progress_at, found.last_eta) >= now() - %(max_age)s
ORDER BY found.progress_at, found.group_id

-- name: distrust_counts
-- A count in Valkey that was cut short shows only when the last part has returned, and that may be long after recovery. From here
-- on the parts of every chord that is open now are counted in PostgreSQL.
UPDATE patchpilot.chord SET distrusted = true
WHERE state IN ('open', 'claimed') AND counting = 'valkey' AND NOT distrusted
  AND (broker IS NULL OR broker = ANY(%(brokers)s::text[]))

-- name: messages
-- Every message whose task has not ended, as far as PostgreSQL knows; and how many are too young or too old to be looked
-- at: too old also by the time that their tasks wait for. There is always a row: with no message_id if there is nothing to
-- look at. Without a result only its part tells that a header task has ended; it is of this sending if it returned after
-- it. What tells that a task has ended does not tell which of two of them that share an id in one header, so each of their
-- messages stands until all their parts are here.
WITH part AS (
    SELECT open_group.group_id, p.task_id, max(p.returned_at) AS returned_at, max(p.position) AS place,
           max(p.position) FILTER (WHERE p.returned_at IS NOT NULL) AS returned_place
    FROM (SELECT DISTINCT group_id FROM patchpilot.outbox WHERE group_id IS NOT NULL) open_group
    CROSS JOIN LATERAL (
        SELECT task_id, returned_at, position FROM patchpilot.chord_part WHERE group_id = open_group.group_id
        OFFSET 0  -- group by group, by their index: never through all that was ever run
    ) p
    GROUP BY open_group.group_id, p.task_id
), reached AS (
    SELECT group_id, max(returned_at) AS returned_at, max(returned_place) AS place FROM part GROUP BY group_id
), progress AS (
    -- A header is pushed in its order, and that may take long. As long as parts return, and none has that comes behind
    -- this one, it may still be on its way from the producer: so it is as old as the last return.
    SELECT o.message_id, o.group_id, part.returned_at,
           CASE WHEN part.place < reached.place THEN o.sent_at ELSE greatest(o.sent_at, reached.returned_at) END AS at,
           o.eta
    FROM patchpilot.outbox o
    LEFT JOIN part ON part.group_id = o.group_id AND part.task_id = o.task_id
    LEFT JOIN reached ON reached.group_id = o.group_id
    WHERE o.broker IS NULL OR o.broker = ANY(%(brokers)s::text[])
), looked_at AS (
    SELECT message_id, returned_at, at FROM progress
    WHERE at <= now() - %(min_age)s
      -- The message of a chord that goes on without it is never too old.
      AND (greatest(at, eta) >= now() - %(max_age)s OR group_id = ANY(%(group_ids)s::text[]))
)
SELECT outside.*, found.*
FROM (
    SELECT count(*) FILTER (WHERE at > now() - %(min_age)s) AS young,
           count(*) FILTER (
               WHERE greatest(at, eta) < now() - %(max_age)s
                 AND NOT coalesce(group_id = ANY(%(group_ids)s::text[]), false)
           ) AS old
    FROM progress
) outside
LEFT JOIN (
    SELECT o.message_id::text, o.task_id, o.task_name, o.group_id, o.callback_of, o.exchange, o.routing_key, o.queue,
           o.sent_at, o.resends, o.pushes, o.shadow, o.expires < now() AS expired, now() - looked_at.at AS age,
           coalesce(f.finished, false)
           OR ((r.task_id IS NOT NULL OR coalesce(looked_at.returned_at >= o.recorded_at, false)) AND NOT EXISTS (
               SELECT FROM patchpilot.chord_part p
               JOIN patchpilot.chord_part same USING (group_id, task_id)
               WHERE p.group_id = o.group_id AND p.task_id = o.task_id AND p.state IS NULL
                 AND same.position <> p.position
           )) AS ended,
           coalesce(f.running, false) AS running, f.started,
           EXISTS (
               SELECT FROM patchpilot.chord_part p
               WHERE p.group_id = o.group_id AND p.task_id = o.task_id AND p.state IS NULL
           ) AS awaited
    FROM looked_at
    JOIN patchpilot.outbox o USING (message_id)
    -- With a limit: one look into the index for each message, however many results there are.
    LEFT JOIN LATERAL (
        SELECT result.task_id FROM patchpilot.result
        WHERE result.task_id = o.task_id AND result.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
          AND patchpilot.tells_of(result.message_id, result.stored_at, o.message_id, o.headers, o.recorded_at)
        LIMIT 1
    ) r ON true
    LEFT JOIN LATERAL (
        SELECT bool_or(fence.finished_at IS NOT NULL) AS finished,
               bool_or(fence.finished_at IS NULL AND fence.lease_until > now()) AS running, count(*) > 0 AS started
        FROM patchpilot.fence
        WHERE fence.scope = o.scope AND fence.task_id = o.task_id AND fence.attempt = o.attempt
    ) f ON true
) found ON true
ORDER BY found.sent_at, found.message_id

-- name: last_parts
-- The tasks that would finish these chords, or return a part to them: those that returned last, and those that ended
-- without returning. Not more than a few of each: whoever finishes a chord is among the last.
SELECT group_id, task_id FROM (
    SELECT p.group_id, p.task_id, row_number() OVER (PARTITION BY p.group_id ORDER BY p.returned_at DESC NULLS FIRST) AS place
    FROM patchpilot.chord_part p
    JOIN patchpilot.chord c USING (group_id)
    LEFT JOIN LATERAL (
        SELECT true AS ended FROM patchpilot.result
        WHERE p.state IS NULL AND task_id = p.task_id AND state IN ('SUCCESS', 'FAILURE', 'REVOKED')
          AND stored_at >= c.created_at AND coalesce(result.group_id = p.group_id, true)
        LIMIT 1
    ) r ON true
    WHERE p.group_id = ANY(%(group_ids)s) AND (p.state IS NOT NULL OR r.ended)
) part
WHERE place <= 100
UNION
-- All parts of a chord that is claimed are here. Who may be calling its errbacks runs a task of its header that has not
-- ended; of a chain that failed on the way that is not the one that returns the part.
SELECT o.group_id, o.task_id FROM patchpilot.outbox o JOIN patchpilot.chord c USING (group_id)
WHERE o.group_id = ANY(%(group_ids)s) AND c.state = 'claimed'

-- name: still_there
-- Which of these messages nobody has ended or sent again since they were looked at, or is still about to push.
SELECT o.message_id::text
FROM patchpilot.outbox o
JOIN unnest(%(message_ids)s::uuid[], %(resends)s::int[], %(sent_at)s::timestamptz[]) AS seen (message_id, resends, sent_at)
    ON seen.message_id = o.message_id AND seen.resends = o.resends AND seen.sent_at = o.sent_at

-- name: ended_parts
-- Parts that are still to come although their task has ended: the return was interrupted.
SELECT p.group_id, p.task_id, c.created_at, r.meta
FROM patchpilot.chord_part p
JOIN patchpilot.chord c USING (group_id)
CROSS JOIN LATERAL (
    SELECT result.meta FROM patchpilot.result
    WHERE result.task_id = p.task_id AND result.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
      AND result.stored_at >= c.created_at AND coalesce(result.group_id = p.group_id, true)
      AND NOT (
          -- A task that is in the header more than once: while a message of it is left, its result is another's.
          EXISTS (SELECT FROM patchpilot.outbox o WHERE o.group_id = p.group_id AND o.task_id = p.task_id)
          AND EXISTS (
              SELECT FROM patchpilot.chord_part same
              WHERE same.group_id = p.group_id AND same.task_id = p.task_id AND same.position <> p.position
          )
      )
    LIMIT 1
) r
WHERE p.group_id = ANY(%(group_ids)s) AND p.state IS NULL

-- name: record_parts
-- Compare and set, as a worker returns a part: of several who saw it, one records it. Not in a chord that has begun anew.
UPDATE patchpilot.chord_part p
SET state = ended.state, payload = ended.payload, returned_at = now()
FROM unnest(
    %(group_ids)s::text[], %(task_ids)s::text[], %(created_at)s::timestamptz[], %(states)s::text[], %(payloads)s::bytea[]
) AS ended (group_id, task_id, created_at, state, payload)
JOIN patchpilot.chord c USING (group_id, created_at)
WHERE p.group_id = ended.group_id AND p.task_id = ended.task_id AND p.state IS NULL
RETURNING p.group_id

-- name: failed
-- The callbacks of those of these chords that were ended as failed: no process will return them as parts.
SELECT callback_id, callback, callback_type, callback_encoding FROM patchpilot.chord
WHERE group_id = ANY(%(group_ids)s) AND state = 'failed'

-- name: around
-- Open chords that wait for one of these tasks.
SELECT DISTINCT ON (c.group_id) c.group_id, c.callback_name, p.task_id
FROM patchpilot.chord c
JOIN patchpilot.chord_part p ON p.group_id = c.group_id AND p.task_id = ANY(%(task_ids)s) AND p.state IS NULL
WHERE c.state IN ('open', 'claimed') AND NOT c.shadow AND c.publish_error IS NULL
ORDER BY c.group_id, p.position

-- name: take
-- Compare and set: of several recoveries that saw the same loss, one gets the message; none if its producer is at it.
UPDATE patchpilot.outbox o
SET sent_at = now(), resends = o.resends + 1
FROM unnest(%(message_ids)s::uuid[], %(resends)s::int[], %(sent_at)s::timestamptz[]) AS seen (message_id, resends, sent_at)
WHERE o.message_id = seen.message_id AND o.resends = seen.resends AND o.sent_at = seen.sent_at AND NOT o.shadow
RETURNING o.message_id::text, o.task_id, o.task_name, o.exchange, o.routing_key, o.headers, o.properties, o.body,
          o.content_type, o.content_encoding

-- name: pushed
-- These have reached the broker.
UPDATE patchpilot.outbox SET pushes = pushes + 1 WHERE message_id = ANY(%(message_ids)s::uuid[])

-- name: revoke
-- Compare and set: the message is still the one that was seen, its task has not ended, and its chord waits for it. The
-- part is recorded here and not from the result, which may be that of another message. Returns the chords of which one was.
WITH gone AS (
    DELETE FROM patchpilot.outbox o
    USING unnest(%(message_ids)s::uuid[], %(resends)s::int[], %(metas)s::bytea[], %(payloads)s::bytea[])
        AS seen (message_id, resends, meta, payload)
    WHERE o.message_id = seen.message_id AND o.resends = seen.resends AND NOT o.shadow
      AND EXISTS (
          SELECT FROM patchpilot.chord_part p
          WHERE p.group_id = o.group_id AND p.task_id = o.task_id AND p.state IS NULL
      )
      AND (
          NOT EXISTS (
              SELECT FROM patchpilot.result r
              WHERE r.task_id = o.task_id AND r.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
                AND patchpilot.tells_of(r.message_id, r.stored_at, o.message_id, o.headers, o.recorded_at)
          )
          -- A task that is in the header more than once: the result is that of another message.
          OR EXISTS (
              SELECT FROM patchpilot.chord_part p
              JOIN patchpilot.chord_part same USING (group_id, task_id)
              WHERE p.group_id = o.group_id AND p.task_id = o.task_id AND same.position <> p.position
          )
      )
    -- By pattern: as JSON, PostgreSQL reads no header where another has a NUL. Inside a text its quotes would be escaped.
    RETURNING o.group_id, o.task_id, o.recorded_at, seen.meta, seen.payload,
              patchpilot.origin(o.message_id, o.headers) AS began_by,
              coalesce(substring(convert_from(o.headers, 'UTF8') FROM '"group_index": ?([0-9]+)')::int, 0) AS place
), latest AS (
    SELECT DISTINCT ON (task_id) * FROM gone ORDER BY task_id, recorded_at DESC
), stored AS (
    INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at, message_id, group_id)
    SELECT task_id, 'REVOKED', meta, now() + %(expires)s, began_by, group_id FROM latest
    ON CONFLICT (task_id) DO UPDATE
    SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at,
        message_id = EXCLUDED.message_id, group_id = EXCLUDED.group_id
    -- What its other message came to stays; what it came to when it was sent before does not.
    WHERE r.state NOT IN ('SUCCESS', 'FAILURE', 'REVOKED')
       OR r.stored_at < (SELECT latest.recorded_at FROM latest WHERE latest.task_id = r.task_id)
)
UPDATE patchpilot.chord_part p
SET state = 'REVOKED', payload = gone.payload, returned_at = now()
FROM gone
WHERE p.group_id = gone.group_id AND p.task_id = gone.task_id AND p.state IS NULL
  -- As a worker returns it.
  AND (p.position = gone.place OR NOT EXISTS (
      SELECT FROM patchpilot.chord_part same
      WHERE same.group_id = p.group_id AND same.position = gone.place AND same.task_id = p.task_id
  ))
RETURNING p.group_id

-- name: close_ended
-- Messages whose task has ended, but whose worker died before it could say so here: those of which that still holds, and
-- that nobody has sent again since they were looked at. Not those of a chord that is claimed: they tell who may be at it.
DELETE FROM patchpilot.outbox o
USING unnest(%(message_ids)s::uuid[], %(resends)s::int[]) AS seen (message_id, resends)
WHERE o.message_id = seen.message_id AND o.resends = seen.resends
  AND coalesce((SELECT c.state <> 'claimed' FROM patchpilot.chord c WHERE c.group_id = o.group_id), true)
  AND (
      EXISTS (
          SELECT FROM patchpilot.fence f
          WHERE f.scope = o.scope AND f.task_id = o.task_id AND f.attempt = o.attempt AND f.finished_at IS NOT NULL
      )
      OR (
          (
              EXISTS (
                  SELECT FROM patchpilot.result r
                  WHERE r.task_id = o.task_id AND r.state IN ('SUCCESS', 'FAILURE', 'REVOKED')
                    AND patchpilot.tells_of(r.message_id, r.stored_at, o.message_id, o.headers, o.recorded_at)
              )
              OR EXISTS (
                  SELECT FROM patchpilot.chord_part p
                  WHERE p.group_id = o.group_id AND p.task_id = o.task_id AND p.returned_at >= o.recorded_at
              )
          )
          AND NOT EXISTS (
              SELECT FROM patchpilot.chord_part p
              JOIN patchpilot.chord_part same USING (group_id, task_id)
              WHERE p.group_id = o.group_id AND p.task_id = o.task_id AND p.state IS NULL
                AND same.position <> p.position
          )
      )
  )

-- name: record
INSERT INTO patchpilot.remedy (run_id, kind, subject, diagnosis, remedy, callback, reason)
SELECT %(run_id)s, remedy.* FROM unnest(
    %(kind)s::text[], %(id)s::text[], %(diagnosis)s::text[], %(remedy)s::text[], %(callback)s::text[], %(reason)s::text[]
) AS remedy

-- name: applied
SELECT applied_at, kind, subject, diagnosis, remedy, callback, reason
FROM patchpilot.remedy WHERE run_id = %(run_id)s ORDER BY id

-- name: serializers
-- Of a chord that was adopted it is a guess: what its parts and their tasks left tells better.
SELECT c.group_id, c.result_serializer, CASE WHEN c.opener = 'adopted' THEN ARRAY(
    SELECT coalesce(p.payload, r.meta) FROM patchpilot.chord_part p LEFT JOIN patchpilot.result r USING (task_id)
    WHERE p.group_id = c.group_id AND coalesce(p.payload, r.meta) IS NOT NULL ORDER BY p.returned_at, p.position LIMIT 10
) ELSE '{}' END AS samples
FROM patchpilot.chord c WHERE c.group_id = ANY(%(group_ids)s)

-- name: repeated_starts
-- Callbacks that started more than once because a worker died inside them: their effect may have happened twice.
SELECT f.task_id, f.scope AS group_id, f.starts, c.callback_name
FROM patchpilot.fence f LEFT JOIN patchpilot.chord c ON c.group_id = f.scope
WHERE f.starts > 1 AND f.started_at >= %(since)s
ORDER BY f.started_at
