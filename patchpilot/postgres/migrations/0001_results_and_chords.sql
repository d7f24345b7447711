-- What workers write: results, chords with their parts, task messages, and the fence.

-- Celery's result meta of one task, as the application's result serialiser encoded it.
CREATE TABLE patchpilot.result (
    task_id     text PRIMARY KEY,
    state       text NOT NULL,
    meta        bytea NOT NULL,
    stored_at   timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz            -- null: kept until somebody forgets it
);
CREATE INDEX result_expiry ON patchpilot.result (expires_at) WHERE expires_at IS NOT NULL;

-- A saved GroupResult (GroupResult.save), which is not what a chord's membership is kept in.
CREATE TABLE patchpilot.saved_group (
    group_id    text PRIMARY KEY,
    meta        bytea NOT NULL,
    stored_at   timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz
);
CREATE INDEX saved_group_expiry ON patchpilot.saved_group (expires_at) WHERE expires_at IS NOT NULL;

-- open:        parts are still to come, or have come and nobody has taken the callback
-- claimed:     one process has taken the callback and is joining results; a lease, not a lock
-- dispatched:  the callback's messages are in the outbox, since the same transaction: from here on they are its affair
-- failed:      a part failed, and the error path has run; what it published is in the outbox, since the same transaction
CREATE TYPE patchpilot.chord_state AS ENUM ('open', 'claimed', 'dispatched', 'failed');

CREATE TABLE patchpilot.chord (
    group_id          text PRIMARY KEY,
    state             patchpilot.chord_state NOT NULL DEFAULT 'open',
    callback_id       text NOT NULL,
    callback_name     text NOT NULL,
    callback          bytea,           -- null when it could not be stored: then only the header's messages have it
    callback_type     text,            -- content type and encoding of the callback
    callback_encoding text,
    unrecoverable     text,            -- why it could not be stored, or not unchanged, and where in the callback
    opener            text NOT NULL,   -- the task that sent it, or the one call that did: each sends it once
    generating        boolean NOT NULL DEFAULT false,  -- a generator still produces its header
    size              int NOT NULL DEFAULT 0,  -- the parts it has if a generator produced them: some may not be known yet
    counting          text NOT NULL DEFAULT 'postgres' CHECK (counting IN ('postgres', 'valkey')),
    shadow            boolean NOT NULL DEFAULT false,  -- watched only: Celery's own backend counts and dispatches it
    routes            jsonb NOT NULL DEFAULT '{}',  -- task name -> publishing options, as the application routes it
    result_serializer text NOT NULL,
    structure         jsonb,           -- the header's results as a tuple, when they nest; null when they are flat
    publish_error     text,            -- set when publishing the header raised in the caller
    created_at        timestamptz NOT NULL DEFAULT now(),
    claim_token       uuid,
    claim_until       timestamptz,
    claims            int NOT NULL DEFAULT 0,
    finish_token      uuid,            -- of the claim under which it was finished
    distrusted        boolean NOT NULL DEFAULT false,  -- its count in Valkey may have lost parts: ask here instead
    finished_at       timestamptz,     -- when the callback was dispatched, or the error path had run
    CONSTRAINT claim_is_a_lease CHECK ((state = 'claimed') = (claim_token IS NOT NULL)),
    CONSTRAINT claim_has_an_end CHECK ((claim_token IS NULL) = (claim_until IS NULL)),
    CONSTRAINT finished_when_over CHECK ((state IN ('dispatched', 'failed')) = (finished_at IS NOT NULL)),
    CONSTRAINT stored_whole CHECK ((callback IS NULL) = (callback_type IS NULL) AND (callback IS NULL) = (callback_encoding IS NULL)),
    CONSTRAINT a_reason_for_what_is_missing CHECK (callback IS NOT NULL OR unrecoverable IS NOT NULL)
);
-- Recovery scans what is open, however much was ever run.
CREATE INDEX chord_open ON patchpilot.chord (created_at) WHERE state IN ('open', 'claimed');
CREATE INDEX chord_open_callback ON patchpilot.chord (callback_id) WHERE state IN ('open', 'claimed');
CREATE INDEX chord_over ON patchpilot.chord (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE patchpilot.chord_part (
    group_id     text NOT NULL REFERENCES patchpilot.chord ON DELETE CASCADE,
    position     int NOT NULL,
    task_id      text NOT NULL,
    state        text,                 -- null while the part is still to come
    payload      bytea,                -- the part's return value or exception, encoded
    returned_at  timestamptz,
    PRIMARY KEY (group_id, position),
    CONSTRAINT returned_whole CHECK ((state IS NULL) = (returned_at IS NULL) AND (state IS NULL) = (payload IS NULL))
);
CREATE INDEX chord_part_pending ON patchpilot.chord_part (group_id) WHERE state IS NULL;

-- Task messages that have been, or are about to be, given to the broker and whose task has not ended.
CREATE TABLE patchpilot.outbox (
    message_id       uuid PRIMARY KEY,
    task_id          text NOT NULL,
    task_name        text NOT NULL,
    group_id         text,             -- the chord whose header this message belongs to
    callback_of      text,             -- the chord whose callback this message is
    scope            text NOT NULL,    -- with the attempt: the start in the fence that this message would be
    attempt          text NOT NULL,
    exchange         text NOT NULL,
    routing_key      text NOT NULL,
    queue            text,
    headers          bytea NOT NULL,   -- JSON, but jsonb takes no NUL, which a representation of arguments may hold
    properties       bytea NOT NULL,
    body             bytea NOT NULL,
    content_type     text NOT NULL,
    content_encoding text NOT NULL,
    eta              timestamptz,
    expires          timestamptz,
    recorded_at      timestamptz NOT NULL DEFAULT now(),
    sent_at          timestamptz NOT NULL DEFAULT now(),  -- the last time it was given to the broker
    resends          int NOT NULL DEFAULT 0,
    shadow           boolean NOT NULL DEFAULT false       -- watched only: never sent again
);
CREATE INDEX outbox_sent ON patchpilot.outbox (sent_at);
CREATE INDEX outbox_group ON patchpilot.outbox (group_id) WHERE group_id IS NOT NULL;
CREATE INDEX outbox_callback ON patchpilot.outbox (callback_of) WHERE callback_of IS NOT NULL;

-- What starts twice runs once: the start of a task, under a lease renewed while it runs.
CREATE TABLE patchpilot.fence (
    scope        text NOT NULL,        -- what the start belongs to: a callback's chord, the message before it in a chain,
                                       -- or its own message. Sent anew under the same task id it has another scope
    task_id      text NOT NULL,
    attempt      text NOT NULL,        -- retries/replacements: a retry is a start of its own
    owner        uuid NOT NULL,        -- one execution
    worker       text NOT NULL,        -- worker instance and pid, for people and for siblings
    starts       int NOT NULL DEFAULT 1,
    started_at   timestamptz NOT NULL DEFAULT now(),
    lease_until  timestamptz NOT NULL,
    finished_at  timestamptz,
    PRIMARY KEY (scope, task_id, attempt)
);
CREATE INDEX fence_over ON patchpilot.fence (coalesce(finished_at, lease_until));

-- Workers that are alive, as they say themselves: one that is here and does not answer makes what it may hold unknown.
CREATE TABLE patchpilot.worker (
    instance  uuid PRIMARY KEY,
    name      text NOT NULL,
    seen_at   timestamptz NOT NULL DEFAULT now()
);

-- Every remedy that recovery applied. Append-only.
CREATE TABLE patchpilot.remedy (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    applied_at   timestamptz NOT NULL DEFAULT now(),
    run_id       text,                 -- the run of the pilot that asked for it, if one did
    kind         text NOT NULL,
    subject      text NOT NULL,        -- the chord's or task's id
    diagnosis    text NOT NULL,
    remedy       text NOT NULL,
    callback     text,
    reason       text NOT NULL
);
CREATE INDEX remedy_run ON patchpilot.remedy (run_id) WHERE run_id IS NOT NULL;
