-- What people ask: plans that a run can be held to, and requests that a run sees at its next look, wherever it runs.

CREATE TABLE patchpilot.plan (
    environment  text NOT NULL,
    cluster      text NOT NULL,
    digest       text NOT NULL,
    content      jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (environment, cluster, digest),
    CONSTRAINT digest_is_one CHECK (digest ~ '^[0-9a-f]{16}$')
);

CREATE TYPE patchpilot.ask AS ENUM ('stop', 'pause', 'resume', 'approve');

CREATE TABLE patchpilot.run_request (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request_id  uuid NOT NULL UNIQUE,      -- made by whoever asks, so that a commit whose answer was lost can be repeated
    run_id      text NOT NULL REFERENCES patchpilot.run,
    ask         patchpilot.ask NOT NULL,
    asked_by    text NOT NULL,
    asked_at    timestamptz NOT NULL DEFAULT now(),
    reason      text NOT NULL DEFAULT '',
    digest      text,                      -- of what is approved
    CONSTRAINT an_approval_is_of_something CHECK ((ask = 'approve') = (digest IS NOT NULL))
);
CREATE INDEX run_request_of ON patchpilot.run_request (run_id, id);

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON patchpilot.plan
    FOR EACH STATEMENT EXECUTE FUNCTION patchpilot.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON patchpilot.run_request
    FOR EACH STATEMENT EXECUTE FUNCTION patchpilot.refuse_change();
