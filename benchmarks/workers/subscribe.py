"""The bare subscriber: Salt's own ``set_event_handler`` with a handler that discards everything.

``python -m benchmarks.workers.subscribe CONFIG_DIR``: says ``ready`` once it listens; at the end of its input it
prints how many events came and the CPU seconds they took, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import salt.config
import salt.utils.event
import salt.version

SERIES = salt.version.__saltstack_version__.major


class Discard:
    """Counts, and does nothing else."""

    def __init__(self) -> None:
        self.events = 0

    async def __call__(self, _raw: bytes) -> None:
        self.events += 1


def salt_loop() -> Any:
    """What ``get_event`` wants for a loop, in each series."""
    if SERIES >= 3008:
        return asyncio.get_running_loop()
    if SERIES == 3007:
        import tornado.ioloop

        return tornado.ioloop.IOLoop.current()
    from salt.ext.tornado.platform.asyncio import BaseAsyncIOLoop

    class RunningLoop(BaseAsyncIOLoop):
        def initialize(self, **kwargs: Any) -> None:
            super().initialize(asyncio.get_running_loop(), close_loop=False, **kwargs)

    return RunningLoop()


async def main(config_dir: Path) -> None:
    opts = salt.config.master_config(str(config_dir / "master"))
    handler = Discard()
    event = salt.utils.event.get_event("master", sock_dir=opts["sock_dir"], opts=opts, listen=True, io_loop=salt_loop())
    event.set_event_handler(handler)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    await asyncio.sleep(1.0)  # nothing tells when Salt's client is connected
    began = os.times()
    loop.add_reader(sys.stdin, ended.set)
    print("ready", flush=True)
    await ended.wait()
    now = os.times()
    print(json.dumps({"events": handler.events, "cpu": now.user + now.system - began.user - began.system}), flush=True)
    os._exit(0)  # Salt's client has no clean end inside a running loop on every series


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
