-- Chords that are over and may have left keys in Valkey are looked after once, however many were ever run.
ALTER TABLE patchpilot.chord ADD COLUMN swept boolean NOT NULL DEFAULT false;
CREATE INDEX chord_unswept ON patchpilot.chord (finished_at)
    WHERE counting = 'valkey' AND finished_at IS NOT NULL AND NOT swept;
