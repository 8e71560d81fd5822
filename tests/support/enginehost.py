"""``python -m tests.support.enginehost CONFIG_DIR``: the engine of a master config in a process of its own, as Salt
runs it but without a master; with ``lab_salt`` by Salt itself. What it logs goes to stderr.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import salt.config
import salt.engines

from salt_mysql_engine import engine, retention


def main(config_dir: str) -> None:
    """Until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    opts: dict[str, Any] = salt.config.master_config(str(Path(config_dir) / "master"))
    if opts.get("lab_salt"):
        started = salt.engines.Engine(opts, "mysql_jobcache.start", opts["lab_options"], {}, {}, None, name="Engine")
        signal.signal(signal.SIGTERM, lambda *_: started.terminate())
        started.start()
        started.join()
        return
    engine.PILLAR_SECONDS = opts["lab_pillar_seconds"]
    engine._OPEN_AGAIN_SECONDS = 0.1
    retention.FIRST_SECONDS = retention._ROUND_SECONDS = 0.1
    engine.start(opts, opts["lab_options"])


if __name__ == "__main__":
    main(sys.argv[1])
