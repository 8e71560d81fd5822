"""A master's job cache with the returns of :mod:`benchmarks.payloads`, laid out as Salt's ``local_cache`` does it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgpack

from benchmarks.payloads import returns


def fill(cachedir: Path, first: int, count: int) -> None:
    """Stores the returns numbered from ``first`` on as the master would have, before they are fired."""
    jid = ""
    folder = Path()
    for _, ret in returns(first, count):
        if ret["jid"] != jid:
            jid = ret["jid"]
            digest = hashlib.sha256(jid.encode()).hexdigest()
            folder = cachedir / "jobs" / digest[:2] / digest[2:]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "jid").write_text(jid)
            load = {"jid": jid, "tgt": "*", "tgt_type": "glob", "fun": ret["fun"], "arg": [], "user": "root"}
            _dump(folder / ".load.p", load)
        minion = folder / ret["id"]
        minion.mkdir(exist_ok=True)
        _dump(minion / "return.p", {key: ret[key] for key in ("return", "retcode", "success")})


def _dump(path: Path, value: Any) -> None:
    path.write_bytes(msgpack.packb(value, use_bin_type=True))
