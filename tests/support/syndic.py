"""A salt-syndic: the process beside a lower master that passes jobs down from a higher one, and returns up to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from tests.support.mariadb import LOOPBACK
from tests.support.salt import SaltMaster, _Daemon

ID: Final = "lower_syndic"


def lower_config(directory: Path, top: SaltMaster) -> dict[str, Any]:
    """What the config of a master in `directory` needs, besides its own, for a syndic to pass on what `top` says."""
    return {
        "syndic_master": LOOPBACK,
        "syndic_master_port": top.config["ret_port"],
        "syndic_log_file": str(directory / "syndic" / "log"),
        "syndic_pidfile": str(directory / "syndic" / "pid"),
        "syndic_event_forward_timeout": 0.1,
    }


class SaltSyndic(_Daemon):
    """The syndic of `lower`, a master with `lower_config` below `top`. It reads that master's file, and a minion's."""

    role = "syndic"
    patience = 0.5  # as a minion, it sleeps after SIGTERM, and has nothing to save

    def __init__(self, lower: SaltMaster, top: SaltMaster) -> None:
        self.lower = lower
        names = ("root_dir", "cachedir", "sock_dir", "user")
        shared = {name: lower.config[name] for name in names}
        directory = lower.directory / "syndic"
        own = {"id": ID, "master": LOOPBACK, "pki_dir": str(directory / "pki")}
        # It listens where the highest master publishes; of the ports only that of `syndic_master_port` has an option.
        super().__init__(directory, {**shared, **own, "publish_port": top.config["publish_port"]})

    @property
    def _config_file(self) -> Path:
        return self.config_dir / "minion"

    def launch(self) -> None:
        """Beside a lower master that runs."""
        self.config_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.lower.config_dir / "master", self.config_dir / "master")
        super().launch()

    def _ready(self) -> bool:
        """Nothing says so but a job that arrives: ask for one."""
        return True
