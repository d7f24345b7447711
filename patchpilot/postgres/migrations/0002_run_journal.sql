-- What the pilot writes: runs, their append-only journal, and the lease that says who may write.

CREATE TABLE patchpilot.run (
    id           text PRIMARY KEY,
    environment  text NOT NULL,
    cluster      text NOT NULL,
    outcome      text,                 -- null until the run is over
    created_at   timestamptz NOT NULL DEFAULT now(),
    finished_at  timestamptz,
    CONSTRAINT finished_with_an_outcome CHECK ((outcome IS NULL) = (finished_at IS NULL))
);
-- One run at a time: whoever starts `patchpilot run` again takes the unfinished one up.
CREATE UNIQUE INDEX run_unfinished ON patchpilot.run (environment, cluster) WHERE finished_at IS NULL;
CREATE INDEX run_newest ON patchpilot.run (created_at DESC);

CREATE TYPE patchpilot.entry_kind AS ENUM (
    'started', 'resumed', 'intended', 'observed', 'acting', 'acted', 'reached', 'contradicted', 'paused', 'finished'
);

CREATE TABLE patchpilot.run_entry (
    run_id    text NOT NULL REFERENCES patchpilot.run,
    seq       int NOT NULL CHECK (seq > 0),
    entry_id  uuid NOT NULL UNIQUE,    -- made by the writer, so that a commit whose answer was lost can be repeated
    token     bigint NOT NULL,         -- the lease under which it was written
    at        timestamptz NOT NULL,    -- the pilot's clock, like everything it compares this with
    kind      patchpilot.entry_kind NOT NULL,
    phase     text NOT NULL DEFAULT '',
    step      text NOT NULL DEFAULT '',
    data      jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (run_id, seq),
    CONSTRAINT data_is_an_object CHECK (jsonb_typeof(data) = 'object')
);

CREATE FUNCTION patchpilot.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the run journal is append-only: % refused', TG_OP;
END
$$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON patchpilot.run_entry
    FOR EACH STATEMENT EXECUTE FUNCTION patchpilot.refuse_change();

-- Who may write to the journal of a cluster's run. The row stays when nobody does: its token only ever grows.
CREATE TABLE patchpilot.lease (
    environment  text NOT NULL,
    cluster      text NOT NULL,
    token        bigint NOT NULL DEFAULT 0,   -- the fencing token: one more with each acquisition
    run_id       text REFERENCES patchpilot.run,
    holder       jsonb,
    claim        uuid,                        -- made by the holder, so that an acquisition can be repeated
    since        timestamptz,
    until        timestamptz,
    released     boolean NOT NULL DEFAULT false,   -- whether its holder lived to give it back
    PRIMARY KEY (environment, cluster),
    CONSTRAINT held_by_somebody CHECK (
        (token = 0) = (run_id IS NULL) AND (token = 0) = (holder IS NULL)
        AND (token = 0) = (claim IS NULL) AND (token = 0) = (since IS NULL) AND (token = 0) = (until IS NULL)
    )
);
