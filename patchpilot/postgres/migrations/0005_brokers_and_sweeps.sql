-- Several brokers behind one PostgreSQL: which of them a message, a chord, a worker belongs to. Null: written by a version
-- before this one, and taken to belong to whichever broker somebody recovers.
ALTER TABLE patchpilot.outbox ADD COLUMN broker text;
ALTER TABLE patchpilot.chord ADD COLUMN broker text;
ALTER TABLE patchpilot.worker ADD COLUMN broker text;

-- Whose turn it is to sweep a broker, of all the workers that would, and which moment the last whole sweep began at.
CREATE TABLE patchpilot.sweep (
    broker       text PRIMARY KEY,
    holder       uuid NOT NULL,            -- the worker's instance
    began_at     timestamptz NOT NULL,
    lease_until  timestamptz NOT NULL,
    covered_at   timestamptz               -- when the last sweep began that came to its end
);

-- What recovery and reports ask of what is over, without reading all of it.
CREATE INDEX fence_repeated ON patchpilot.fence (started_at) WHERE starts > 1;
CREATE INDEX remedy_subject ON patchpilot.remedy (subject);
