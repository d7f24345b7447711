-- Which canaries have come back from a worker last: step (task, chord) -> the token that the canary carried.
ALTER TABLE patchpilot.worker ADD COLUMN canary jsonb NOT NULL DEFAULT '{}';

-- What is left of canaries is looked for by every recovery, however many chords were ever run.
CREATE INDEX chord_canary ON patchpilot.chord (created_at) WHERE callback_name = 'patchpilot.canary';
