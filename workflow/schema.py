"""The tables of an instance file and of a host's intake, as SQL text. Made to be read: text is JSON or ISO 8601 in UTC, never pickle.

A change here is a new `VERSION` with a migration in `MIGRATIONS`; files of a newer version are refused, not guessed at.
"""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "INSTANCE", "INTAKE", "MIGRATIONS", "VERSION"]

APPLICATION_ID = 0x77666C77  # 'wflw': what `file` and our tools know an instance file by
VERSION = 2

MIGRATIONS = {
    2: "ALTER TABLE wf_instance ADD COLUMN traceparent TEXT;",
}
"""What makes an instance file of the version before one of this version."""

INSTANCE = f"""
PRAGMA page_size = 4096;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};

CREATE TABLE wf_instance (                      -- exactly one row
  one          INTEGER PRIMARY KEY CHECK (one = 1),
  id           TEXT NOT NULL,
  incarnation  TEXT NOT NULL,                   -- part of idempotency keys: a reused id never reuses them
  flow         TEXT NOT NULL,
  status       TEXT NOT NULL CHECK (status IN
               ('queued','running','waiting','paused','done','failed','cancelled','diverged','quarantined')),
  input        TEXT NOT NULL, input_sha256 TEXT NOT NULL,
  output       TEXT, output_sha256 TEXT REFERENCES wf_objects(sha256), error TEXT,
  parent_id    TEXT, parent_key TEXT,           -- the step of the parent that waits for this run
  forked_from  TEXT,
  owner        TEXT,                            -- the host whose run it is, where there is a replica
  durability   TEXT NOT NULL DEFAULT 'local' CHECK (durability IN ('local','replicated')),
  priority     INTEGER NOT NULL DEFAULT 0,
  resumes      INTEGER NOT NULL DEFAULT 0,      -- restarts after a crash since the last finished step
  created_at   TEXT NOT NULL, updated_at TEXT NOT NULL, finished_at TEXT,
  traceparent  TEXT                             -- W3C trace context of its start
) STRICT;

CREATE TABLE wf_steps (
  seq          INTEGER PRIMARY KEY,             -- order of first call
  key          TEXT NOT NULL UNIQUE,            -- '2/search#3': task path, name, ordinal
  name         TEXT NOT NULL,
  kind         TEXT NOT NULL CHECK (kind IN
               ('step','llm','tool','http','tx','sleep','receive','send','child','barrier','patch','cancel')),
  status       TEXT NOT NULL CHECK (status IN ('started','retrying','waiting','done','failed','unknown','cancelled')),
  number       INTEGER,                         -- order of finishing: results reach the flow in this order
  after        INTEGER NOT NULL DEFAULT 0,      -- the newest number when it was called: where a fork cuts
  durability   TEXT NOT NULL DEFAULT 'local' CHECK (durability IN ('local','replicated')),
  repeat       INTEGER NOT NULL DEFAULT 1 CHECK (repeat IN (0, 1)),
  input        TEXT, input_sha256 TEXT NOT NULL,
  output       TEXT, output_sha256 TEXT REFERENCES wf_objects(sha256), error TEXT,
  attempts     INTEGER NOT NULL DEFAULT 0,
  wake_at      TEXT,
  started_at   TEXT NOT NULL, finished_at TEXT
) STRICT;

CREATE TABLE wf_attempts (                      -- attempts that failed, and those that reported usage
  step_seq INTEGER NOT NULL REFERENCES wf_steps(seq), attempt INTEGER NOT NULL,
  machine TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT NOT NULL,
  outcome TEXT NOT NULL CHECK (outcome IN ('done','error','timeout','cancelled')),
  error TEXT, next_try_at TEXT, usage TEXT,     -- tokens, model, cost as JSON
  late TEXT,                                    -- how a body ended after its time was over
  PRIMARY KEY (step_seq, attempt)
) STRICT, WITHOUT ROWID;

CREATE TABLE wf_inbox (                         -- events for this run, kept until consumed
  id TEXT PRIMARY KEY, type TEXT NOT NULL, payload TEXT NOT NULL, sender TEXT,
  sent_at TEXT NOT NULL, consumed_by INTEGER REFERENCES wf_steps(seq), consumed_at TEXT,
  refused TEXT                                  -- why it was not fit to be consumed
) STRICT, WITHOUT ROWID;

CREATE TABLE wf_control (                       -- cancel, pause, resume, as they were asked for
  id TEXT PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('cancel','pause','resume')),
  sender TEXT, sent_at TEXT NOT NULL, applied_at TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE wf_objects (                       -- content-addressed: large values, artifacts
  sha256 TEXT PRIMARY KEY, bytes INTEGER NOT NULL, media_type TEXT NOT NULL,
  location TEXT NOT NULL CHECK (location IN ('inline','bucket')), body BLOB, created_at TEXT NOT NULL
) STRICT;

CREATE TABLE wf_step_objects (                  -- which steps refer to which objects
  step_seq INTEGER NOT NULL REFERENCES wf_steps(seq), sha256 TEXT NOT NULL REFERENCES wf_objects(sha256),
  PRIMARY KEY (step_seq, sha256)
) STRICT, WITHOUT ROWID;

CREATE TABLE wf_state (                         -- journal of `state`: the newest entry of a name counts
  step_seq INTEGER NOT NULL REFERENCES wf_steps(seq), name TEXT NOT NULL, value TEXT,  -- NULL: deleted
  PRIMARY KEY (step_seq, name)
) STRICT, WITHOUT ROWID;

CREATE VIEW wf_timeline AS
  SELECT seq, started_at AS at, kind, key AS step, status, attempts,
         round((julianday(coalesce(finished_at, strftime('%Y-%m-%dT%H:%M:%fZ','now'))) - julianday(started_at)) * 86400, 3) AS seconds,
         substr(input, 1, 200) AS input, substr(coalesce(error, output), 1, 200) AS result, durability
  FROM wf_steps ORDER BY seq;
CREATE VIEW wf_api_calls AS
  SELECT s.seq, a.attempt, s.kind, s.name, a.machine, a.started_at, a.outcome,
         json_extract(a.usage, '$.model') AS model, json_extract(a.usage, '$.input_tokens') AS tokens_in,
         json_extract(a.usage, '$.output_tokens') AS tokens_out, a.error,
         (SELECT id || '@' || incarnation FROM wf_instance) || '/' || s.key AS idempotency_key
  FROM wf_attempts a JOIN wf_steps s ON s.seq = a.step_seq
  WHERE s.kind IN ('llm','tool','http') ORDER BY a.started_at;
CREATE VIEW wf_decisions AS
  SELECT s.seq, i.type AS question, i.payload AS answer, i.sender AS by, i.sent_at, i.consumed_at, i.refused
  FROM wf_inbox i LEFT JOIN wf_steps s ON s.seq = i.consumed_by WHERE i.type NOT LIKE 'child:%' ORDER BY i.sent_at;
CREATE VIEW wf_waiting AS
  SELECT key, kind, started_at AS since, wake_at FROM wf_steps WHERE status IN ('waiting','retrying','unknown');
CREATE VIEW wf_state_now AS
  SELECT name, value FROM (
    SELECT j.name, j.value, row_number() OVER (PARTITION BY j.name ORDER BY s.number DESC) AS age
    FROM wf_state j JOIN wf_steps s ON s.seq = j.step_seq WHERE s.status = 'done')
  WHERE age = 1 AND value IS NOT NULL;
"""

INTAKE = f"""
CREATE TABLE IF NOT EXISTS wf_index (           -- every run of this folder, so that nothing opens 50,000 files
  id TEXT PRIMARY KEY, flow TEXT NOT NULL, status TEXT NOT NULL, wake_at TEXT,
  since TEXT,                                   -- when `wake_at` was written: an earlier clock has gone back
  priority INTEGER NOT NULL DEFAULT 0, arrival INTEGER NOT NULL,
  input_sha256 TEXT NOT NULL, parent_id TEXT, error TEXT, created_at TEXT NOT NULL, finished_at TEXT,
  gone_at TEXT                                  -- its file was deleted after its time; the row keeps the id from being used again
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS wf_old ON wf_index (finished_at) WHERE finished_at IS NOT NULL AND gone_at IS NULL;
CREATE INDEX IF NOT EXISTS wf_queue ON wf_index (flow, priority DESC, arrival) WHERE status = 'queued';
CREATE INDEX IF NOT EXISTS wf_live ON wf_index (status, wake_at) WHERE status IN ('running','waiting','paused');

CREATE TABLE IF NOT EXISTS wf_requests (        -- accepted, and not yet in an instance file
  id TEXT PRIMARY KEY, instance TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('start','event','cancel','pause','resume','fork')),
  body TEXT NOT NULL, sender TEXT, sent_at TEXT NOT NULL,
  fresh INTEGER NOT NULL DEFAULT 0 CHECK (fresh IN (0, 1))  -- written by another process, not yet seen by the engine
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS wf_fresh ON wf_requests (id) WHERE fresh = 1;
CREATE INDEX IF NOT EXISTS wf_not_starts ON wf_requests (id) WHERE kind <> 'start';
CREATE INDEX IF NOT EXISTS wf_requests_of ON wf_requests (instance, id);

CREATE TABLE IF NOT EXISTS wf_refused (         -- requests that could not be carried out, and why
  id TEXT PRIMARY KEY, instance TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, sender TEXT, reason TEXT NOT NULL, at TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS wf_inherited (       -- runs of hosts that are gone, which were given to this one and are not claimed yet
  id TEXT NOT NULL, host TEXT NOT NULL,         -- whose the run's file may say that it is
  PRIMARY KEY (id, host)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS wf_shares (          -- while this host's runs are divided, because it is gone: which heir gets which
  id TEXT PRIMARY KEY, heir TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE VIEW IF NOT EXISTS wf_runs AS
  SELECT id, flow, status, wake_at, created_at, finished_at, error FROM wf_index ORDER BY created_at;
PRAGMA user_version = {VERSION};
"""
