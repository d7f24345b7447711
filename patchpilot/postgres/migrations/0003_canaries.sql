-- Which canaries have come back from a worker last: step (task, chord) -> the token that the canary carried.
ALTER TABLE patchpilot.worker ADD COLUMN canary jsonb NOT NULL DEFAULT '{}';
