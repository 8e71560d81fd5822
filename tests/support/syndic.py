"""A salt-syndic: the process beside a lower master that passes jobs down from a higher one, and returns up to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from tests.support.mariadb import LOOPBACK
from tests.support.salt import SaltMaster, _Daemon

ID: Final = "lower_syndic"


class SaltSyndic(_Daemon):
    """The syndic of `lower` below `top`. Make it before `lower` starts, whose configuration it adds to.

    Its program reads that master's file, and a minion's beside it; its paths are the master's.
    """

    role = "syndic"
    patience = 0.5  # as a minion, it sleeps after SIGTERM, and has nothing to save

    def __init__(self, lower: SaltMaster, top: SaltMaster) -> None:
        self.lower = lower
        root = Path(lower.config["root_dir"])
        lower.config |= {
            "syndic_master": LOOPBACK,
            "syndic_master_port": top.config["ret_port"],
            "syndic_log_file": str(root / "syndic_log"),
            "syndic_pidfile": str(root / "syndic_pid"),
            "syndic_event_forward_timeout": 0.1,
        }
        shared = {name: lower.config[name] for name in ("root_dir", "cachedir", "sock_dir", "user")}
        own = {"id": ID, "master": LOOPBACK, "pki_dir": str(root / "syndic_pki")}
        # It listens where the highest master publishes; of that one's ports `syndic_master_port` names only the other.
        super().__init__(lower.directory / "syndic", {**shared, **own, "publish_port": top.config["publish_port"]})
        self.log_file = lower.directory / "syndic_log"

    @property
    def _config_file(self) -> Path:
        return self.config_dir / "minion"

    def launch(self) -> None:
        """Beside the lower master, which must run."""
        self.config_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.lower.config_dir / "master", self.config_dir / "master")
        super().launch()

    def _ready(self) -> bool:
        """Nothing says so but the answers that it passes up: wait for them."""
        return True
