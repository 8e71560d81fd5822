"""How the engine comes into a master: by pip, by ``saltutil.sync_*``, and without its package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mariadb import wait_until
from tests.system.conftest import ENGINE, PATIENCE, Site

ROOT = Path(__file__).parents[2]


@pytest.mark.smoke
def test_synced_from_the_fileserver_the_loader_files_work_on_a_tcp_bus_too(make_site: Callable[..., Site]) -> None:
    site = make_site({"ipc_mode": "tcp"})
    for folder in ("_engines", "_runners", "_returners"):
        shutil.copytree(ROOT / folder, site.states / folder)
    with site.master:
        for kind in ("engines", "runners", "returners"):
            assert site.master.run(f"saltutil.sync_{kind}") == [f"{kind}.{ENGINE}"]
    with site.master, site.minion("alpha"):
        assert [*site.master.directory.glob(f"**/extmods/engines/{ENGINE}.py")]
        assert site.master.salt("alpha", "test.ping") == {"alpha": True}
        site.wait_for("SELECT jid FROM salt_returns WHERE fun = 'test.ping' AND id = 'alpha'")
        assert site.status()["bus"]["address"] == f"127.0.0.1:{site.master.config['tcp_master_pub_port']}"


BLOCK = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "salt_mysql_engine":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


@pytest.mark.smoke
def test_without_the_package_one_line_says_what_to_install_and_the_master_runs_on(
    make_site: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "block"))
    site = make_site()
    site.master.config["extension_modules"] = str(Path(site.master.config["root_dir"]) / "extmods")
    for kind in ("engines", "runners"):  # as a sync would
        shutil.copytree(ROOT / f"_{kind}", site.master.directory / "extmods" / kind)
    with site.master, site.minion("alpha"):
        wait_until(
            lambda: "Run `salt-pip install salt-mysql-engine`" in site.master.log, timeout=PATIENCE, what="the line"
        )
        assert site.master.salt("alpha", "test.ping") == {"alpha": True}
        assert site.master.log.count("salt-pip install salt-mysql-engine") == 1
        status = site.master.cli("salt-run", f"{ENGINE}.status")
        assert "the Python package salt-mysql-engine is not installed for Salt" in status.stdout + status.stderr


def test_a_wrong_option_in_the_master_config_is_named_and_the_engine_runs_on(make_site: Callable[..., Site]) -> None:
    site = make_site(batchsize=3, flush_interval=0)
    with site.master:
        wait_until(lambda: "did you mean batch_size?" in site.master.log, timeout=PATIENCE, what="the error")
        status = site.status()
        assert len(status["settings_problems"]) == 2
        assert status["settings"]["flush_interval"] == {"value": 1.0, "source": "default"}
