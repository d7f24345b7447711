-- A task id may be used twice: by a callback with an explicit one in two chords, by a frozen group in two headers, by a task
-- that sends itself again. So of a stored result it is noted whose it is. Null: stored by a version before this one, or by
-- somebody who had no message; then it counts for whatever of its task id is older.
ALTER TABLE patchpilot.result
    ADD COLUMN message_id uuid,    -- the message by which its task began, before it was retried or replaced
    ADD COLUMN group_id text;      -- the group that its message was of; '' if of none

-- The message by which the task of a message began, before it was retried or replaced. By pattern: as JSON, PostgreSQL reads
-- no header where another has a NUL. Inside a text its quotes would be escaped.
CREATE FUNCTION patchpilot.origin(p_message_id uuid, p_headers bytea) RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT coalesce(
        substring(convert_from(p_headers, 'UTF8') FROM '"patchpilot_origin": ?"([0-9a-f-]{36})"')::uuid, p_message_id
    )
$$;

-- Whether a final result tells that the task of a message has ended.
CREATE FUNCTION patchpilot.tells_of(
    p_result_of uuid, p_stored_at timestamptz, p_message_id uuid, p_headers bytea, p_recorded_at timestamptz
) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_result_of IS NULL THEN p_stored_at >= p_recorded_at
        ELSE p_result_of IN (p_message_id, patchpilot.origin(p_message_id, p_headers))
    END
$$;

-- As before, and whose the result is.
CREATE PROCEDURE patchpilot.end_task(
    p_task_id text, p_state text, p_meta bytea, p_expires interval, p_result_of uuid, p_result_group text,
    p_group_id text, p_position int, p_payload bytea,
    p_message_id uuid,
    p_scope text, p_attempt text, p_owner uuid,
    INOUT live boolean, INOUT counted_here boolean, INOUT unforeseen boolean, INOUT ready boolean
) LANGUAGE plpgsql AS $$
BEGIN
    -- A result that is a success stays: a late duplicate must not overwrite it.
    INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at, message_id, group_id)
    VALUES (p_task_id, p_state, p_meta, now() + p_expires, p_result_of, p_result_group)
    ON CONFLICT (task_id) DO UPDATE
    SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at,
        message_id = EXCLUDED.message_id, group_id = EXCLUDED.group_id
    WHERE r.state <> 'SUCCESS';
    IF p_message_id IS NOT NULL THEN
        DELETE FROM patchpilot.outbox o WHERE o.message_id = p_message_id;
    END IF;
    IF p_scope IS NOT NULL THEN
        UPDATE patchpilot.fence f SET finished_at = now()
        WHERE f.scope = p_scope AND f.task_id = p_task_id AND f.attempt = p_attempt AND f.owner = p_owner
          AND f.finished_at IS NULL;
    END IF;
    IF p_group_id IS NULL THEN
        RETURN;
    END IF;
    UPDATE patchpilot.chord_part p SET state = p_state, payload = p_payload, returned_at = now()
    WHERE p.group_id = p_group_id AND p.task_id = p_task_id AND p.state IS NULL
      -- A task id that is in a header twice returns once for each place. Where Celery numbers anew, in nested groups, the
      -- number is not the place.
      AND (p.position = p_position OR NOT EXISTS (
          SELECT FROM patchpilot.chord_part same
          WHERE same.group_id = p_group_id AND same.position = p_position AND same.task_id = p_task_id
      ));
    SELECT c.state IN ('open', 'claimed'), c.distrusted OR c.counting = 'postgres',
           (c.generating OR c.size > 0) AND NOT EXISTS (
               SELECT FROM patchpilot.chord_part p WHERE p.group_id = p_group_id AND p.task_id = p_task_id
           )
    INTO live, counted_here, unforeseen
    FROM patchpilot.chord c WHERE c.group_id = p_group_id;
    COMMIT;
    IF live AND counted_here AND NOT unforeseen THEN
        ready := NOT EXISTS (SELECT FROM patchpilot.chord_part p WHERE p.group_id = p_group_id AND p.state IS NULL)
            AND patchpilot.chord_ready(p_group_id);
    END IF;
END
$$;

-- Workers of the version before call this one. It stays what it is to PostgreSQL, so none of them trips over its plans.
CREATE OR REPLACE PROCEDURE patchpilot.end_task(
    p_task_id text, p_state text, p_meta bytea, p_expires interval,
    p_group_id text, p_position int, p_payload bytea,
    p_message_id uuid,
    p_scope text, p_attempt text, p_owner uuid,
    INOUT live boolean, INOUT counted_here boolean, INOUT unforeseen boolean, INOUT ready boolean
) LANGUAGE plpgsql AS $$
BEGIN
    CALL patchpilot.end_task(
        p_task_id, p_state, p_meta, p_expires, NULL::uuid, NULL::text, p_group_id, p_position, p_payload, p_message_id,
        p_scope, p_attempt, p_owner, live, counted_here, unforeseen, ready
    );
END
$$;
