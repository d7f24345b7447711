-- What workers and producers do most often, as procedures: PostgreSQL keeps their plans, which behind a transaction pooler
-- no client can, and what took several round trips takes one.

-- A part that returns is looked up by its task id, also in a header of thousands.
DROP INDEX patchpilot.chord_part_pending;
CREATE INDEX chord_part_pending ON patchpilot.chord_part (group_id, task_id) WHERE state IS NULL;

-- Whether a chord is complete and free to be claimed.
CREATE FUNCTION patchpilot.chord_ready(p_group_id text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM patchpilot.chord c
        WHERE c.group_id = p_group_id
          AND (c.state = 'open' OR (c.state = 'claimed' AND c.claim_until < now()))
          AND NOT c.generating
          AND (c.size = 0 OR c.size <= (SELECT count(*) FROM patchpilot.chord_part p WHERE p.group_id = c.group_id))
          AND NOT EXISTS (SELECT FROM patchpilot.chord_part p WHERE p.group_id = c.group_id AND p.state IS NULL)
    )
$$;

-- The end of a task that succeeded: its result, its part of a chord, its message and its start. What it has not got is null.
-- live is null if the part belongs to no chord on record. Whether the chord is complete is asked after the part is
-- committed: of parts that return at once, whoever commits last sees all of them, and no row is fought over.
CREATE PROCEDURE patchpilot.end_task(
    p_task_id text, p_state text, p_meta bytea, p_expires interval,
    p_group_id text, p_position int, p_payload bytea,
    p_message_id uuid,
    p_scope text, p_attempt text, p_owner uuid,
    INOUT live boolean, INOUT counted_here boolean, INOUT unforeseen boolean, INOUT ready boolean
) LANGUAGE plpgsql AS $$
BEGIN
    -- A result that is a success stays: a late duplicate must not overwrite it.
    INSERT INTO patchpilot.result AS r (task_id, state, meta, expires_at)
    VALUES (p_task_id, p_state, p_meta, now() + p_expires)
    ON CONFLICT (task_id) DO UPDATE
    SET state = EXCLUDED.state, meta = EXCLUDED.meta, stored_at = now(), expires_at = EXCLUDED.expires_at
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

-- A chord and its members. A frozen chord that is applied again keeps its ids and begins anew. Sent by the same task it is a
-- repetition (the step before it in a chain was delivered twice): what is on record stands then.
CREATE FUNCTION patchpilot.open_chord(
    p_group_id text, p_callback_id text, p_callback_name text, p_callback bytea, p_callback_type text,
    p_callback_encoding text, p_unrecoverable text, p_routes jsonb, p_result_serializer text, p_structure jsonb,
    p_opener text, p_generating boolean, p_counting text, p_shadow boolean, p_publish_error text, p_broker text, p_task_ids text[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    anew boolean;
BEGIN
    INSERT INTO patchpilot.chord AS c (
        group_id, callback_id, callback_name, callback, callback_type, callback_encoding, unrecoverable, routes,
        result_serializer, structure, opener, generating, counting, shadow, publish_error, broker
    ) VALUES (
        p_group_id, p_callback_id, p_callback_name, p_callback, p_callback_type, p_callback_encoding, p_unrecoverable,
        p_routes, p_result_serializer, p_structure, p_opener, p_generating, p_counting, p_shadow, p_publish_error,
        p_broker
    )
    ON CONFLICT (group_id) DO UPDATE SET
        state = 'open', callback_id = EXCLUDED.callback_id, callback_name = EXCLUDED.callback_name,
        callback = EXCLUDED.callback, callback_type = EXCLUDED.callback_type,
        callback_encoding = EXCLUDED.callback_encoding, unrecoverable = EXCLUDED.unrecoverable,
        routes = EXCLUDED.routes, result_serializer = EXCLUDED.result_serializer, structure = EXCLUDED.structure,
        opener = EXCLUDED.opener, generating = EXCLUDED.generating, counting = EXCLUDED.counting,
        shadow = EXCLUDED.shadow, broker = EXCLUDED.broker, publish_error = EXCLUDED.publish_error, created_at = now(), claim_token = NULL,
        size = 0, claim_until = NULL, finish_token = NULL, claims = 0, distrusted = false, swept = false,
        finished_at = NULL
    WHERE c.callback_id <> EXCLUDED.callback_id OR c.opener <> EXCLUDED.opener
    RETURNING c.xmax <> 0 INTO anew;
    IF anew IS NULL THEN
        RETURN;
    END IF;
    IF anew THEN
        DELETE FROM patchpilot.chord_part p WHERE p.group_id = p_group_id;
    END IF;
    -- The callback of a chord that begins anew is another one, under the same id.
    DELETE FROM patchpilot.fence f WHERE f.scope = p_group_id;
    INSERT INTO patchpilot.chord_part (group_id, position, task_id)
    SELECT p_group_id, header.position - 1, header.task_id
    FROM unnest(p_task_ids) WITH ORDINALITY AS header (task_id, position);
END
$$;
