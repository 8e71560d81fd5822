"""A Galera cluster of one node: a MariaDB server that can be not ready (1047) while it runs, as a node without its
cluster is.

One node needs no state transfer, and so neither rsync nor a user that rsync works for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.support.mariadb import LOOPBACK, MariaDB, free_port, wait_until

PACKAGE: Final = "galera-4"
"""Debian's and Ubuntu's name of what has the library."""

_LIBRARIES: Final = (
    "/usr/lib/galera/libgalera_smm.so",
    "/usr/lib/libgalera_smm.so",
    "/usr/lib64/galera-4/libgalera_smm.so",
    "/usr/lib64/galera/libgalera_smm.so",
)


def find_library() -> Path | None:
    """The wsrep provider that makes a MariaDB server a Galera node, if it is installed."""
    return next((Path(path) for path in _LIBRARIES if Path(path).exists()), None)


class GaleraNode(MariaDB):
    """The only node of its cluster, in `directory`; `library` is what `find_library` found."""

    def __init__(self, directory: Path, library: Path) -> None:
        port = free_port(offset=1)
        self._nowhere = f"gcomm://{LOOPBACK}:{free_port()}?pc.wait_prim=no"
        provider = {
            "base_host": LOOPBACK,
            "base_port": port,
            "gmcast.listen_addr": f"tcp://{LOOPBACK}:{port}",
            "ist.recv_addr": f"{LOOPBACK}:{port + 1}",
            "gcache.size": "1M",
            "pc.announce_timeout": "PT0.2S",  # how long it looks for others
        }
        super().__init__(
            directory,
            options=[
                "--wsrep-on=ON",
                f"--wsrep-provider={library}",
                "--wsrep-cluster-address=gcomm://",  # a new cluster
                f"--wsrep-node-address={LOOPBACK}",
                "--wsrep-sst-method=skip",
                "--wsrep-provider-options=" + ";".join(f"{name}={value}" for name, value in provider.items()),
                "--binlog-format=ROW",
            ],
        )

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the node and return once it is ready."""
        super().start(timeout=timeout)
        self._wait(ready=True)

    def leave(self) -> None:
        """Look for a cluster that is not there: the node is non-primary then. It ends its clients' connections."""
        self.sql("SET GLOBAL wsrep_cluster_address = %s", (self._nowhere,))
        self._wait(ready=False)

    def come_back(self) -> None:
        """Undo `leave`: be a cluster by itself again."""
        self.sql("SET GLOBAL wsrep_provider_options = 'pc.bootstrap=1'")
        self._wait(ready=True)

    def reject(self) -> None:
        """Answer every statement with 1047 from now on, also on open connections, as an operator makes it do."""
        self.sql("SET GLOBAL wsrep_reject_queries = 'ALL'")

    def accept(self) -> None:
        """Undo `reject`."""
        self.sql("SET GLOBAL wsrep_reject_queries = 'NONE'")

    def mend(self) -> None:
        """Undo both, whichever was done."""
        self.accept()
        if not self._is_ready():
            self.come_back()

    def _wait(self, *, ready: bool) -> None:
        wait_until(lambda: self._is_ready() == ready, timeout=30.0, what=f"a Galera node with wsrep_ready={ready}")

    def _is_ready(self) -> bool:
        ((_, value),) = self.sql("SHOW STATUS LIKE 'wsrep_ready'")
        return str(value) == "ON"
