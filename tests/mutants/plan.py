"""Which tests are asked about which module: its own quick ones first, and those against a server of what lives. Between
them all unit tests are asked."""

from __future__ import annotations

from typing import Final, NamedTuple


class Tests(NamedTuple):
    """Files under ``tests``."""

    quick: tuple[str, ...]
    then: tuple[str, ...] = ()


PLAN: Final[dict[str, Tests]] = {
    "saltevent": Tests(
        ("unit/test_records.py", "unit/test_items.py", "unit/test_jobcache.py"),
        ("integration/test_verify.py", "integration/test_writer.py"),
    ),
    "jobload": Tests(
        ("unit/test_records.py", "unit/test_items.py", "unit/test_jobcache.py"),
        ("integration/test_verify.py", "integration/test_writer.py"),
    ),
    "records": Tests(
        ("unit/test_records.py", "unit/test_items.py", "unit/test_jobcache.py"),
        ("integration/test_verify.py", "integration/test_writer.py"),
    ),
    "jobcache": Tests(
        ("unit/test_jobcache.py", "unit/test_verify.py"),
        ("integration/test_verify.py", "integration/test_reconcile.py"),
    ),
    "verify": Tests(
        ("unit/test_verify.py",),
        (
            "integration/test_verify.py",
            "integration/test_machine.py",
            "integration/test_large.py",
            "integration/test_forged_floods.py",
        ),
    ),
    "journal": Tests(
        ("unit/test_journal.py", "unit/test_salvage.py"),
        ("integration/test_journal_faults.py", "integration/test_machine.py"),
    ),
    "journalfile": Tests(("unit/test_journal.py", "unit/test_salvage.py"), ("integration/test_journal_faults.py",)),
    "letters": Tests(("unit/test_journal.py",), ("integration/test_verify.py", "integration/test_large.py")),
    "capture": Tests(("unit/test_capture.py",), ("integration/test_journal_faults.py", "integration/test_writer.py")),
    "batcher": Tests(("unit/test_batcher.py",), ("integration/test_machine.py",)),
    "sql": Tests(("unit/test_sql.py",), ("integration/test_writer.py", "integration/test_old_tables.py")),
    "items": Tests(
        ("unit/test_items.py", "unit/test_stencil.py", "unit/test_large.py"), ("integration/test_writer.py",)
    ),
    "rows": Tests((), ("integration/test_writer.py", "integration/test_old_tables.py", "integration/test_large.py")),
    "control": Tests(("unit/test_control.py",)),
    "settings": Tests(("unit/test_settings.py",)),
    "database": Tests(("unit/test_database.py",), ("integration/test_servers.py", "integration/test_outages.py")),
    "spool": Tests(("unit/test_spool.py", "unit/test_pending.py"), ("integration/test_handoff.py",)),
    "intake": Tests(("unit/test_intake.py",), ("integration/test_handoff.py", "integration/test_spool_machine.py")),
}
