"""The tables of older journals, as releases made them."""

from __future__ import annotations

from typing import Final

FORMAT_1: Final = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL,
    error TEXT NOT NULL,
    failed_at REAL NOT NULL
);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE identity (uuid BLOB NOT NULL);
INSERT INTO identity VALUES (X'0102030405060708');
INSERT INTO events (captured_at, jid, minion, body) VALUES (1.5, 'gone', 'm', X'00');
DELETE FROM events;
INSERT INTO events (captured_at, jid, minion, body) VALUES (2.5, 'j2', 'm2', X'6232'), (3.5, 'j3', '', X'6233');
INSERT INTO dead_letters VALUES (1, 1.5, 'j1', 'm1', X'6231', 'Data too long', 9.5);
INSERT INTO counters VALUES
    ('captured', 20), ('written', 9), ('duplicates', 3), ('ignored.peer', 4), ('dropped.memory_full', 1);
PRAGMA application_id = 0x53414C54;
PRAGMA user_version = 1;
"""

FORMAT_2: Final = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL,
    trusted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX events_by_job ON events (jid, minion);
CREATE TABLE waiting (
    seq INTEGER PRIMARY KEY,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL,
    since REAL NOT NULL
);
CREATE INDEX waiting_by_job ON waiting (jid, minion);
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY,
    captured_at REAL NOT NULL,
    jid TEXT NOT NULL,
    minion TEXT NOT NULL,
    body BLOB NOT NULL,
    error TEXT NOT NULL,
    failed_at REAL NOT NULL,
    reason TEXT NOT NULL DEFAULT 'refused'
);
CREATE INDEX dead_letters_by_job ON dead_letters (jid, minion);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE identity (uuid BLOB NOT NULL);
INSERT INTO identity VALUES (X'0102030405060708');
PRAGMA application_id = 0x53414C54;
PRAGMA user_version = 2;
"""
