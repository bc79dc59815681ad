"""The server config of compose.yaml on a real nats-server, and a daemon on that.

single.conf, cluster.conf and roles.conf have test_nats_roles.py.
"""

import asyncio
import json
import re
import urllib.request
from pathlib import Path

from dbtstream.config import NatsConfig
from dbtstream.embedded import find_nats_server
from tests.daemons import daemon_config, serving
from tests.deploy import DEPLOY, read_yaml
from tests.guarantees import check_run
from tests.scripted_child import GOOD_RUN

NATS = DEPLOY / "nats"
NATS_SERVER = find_nats_server()


async def test_the_private_server_serves_a_daemon(tmp_path: Path) -> None:
    # On this machine: another folder, the loopback, and ports that it chooses.
    here = tmp_path / "private.conf"
    text = (NATS / "private.conf").read_text(encoding="utf-8")
    here.write_text(text.replace('"/data"', f'"{tmp_path}/data"'), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(NATS_SERVER, "-c", str(here), "-a", "127.0.0.1", "-p", "-1", "-m", "-1"),
        *("--ports_file_dir", str(tmp_path), "-l", str(tmp_path / "log")),
    )
    ports_file = tmp_path / f"nats-server_{process.pid}.ports"
    try:
        async with asyncio.timeout(30):
            while not ports_file.exists() or not ports_file.read_bytes():
                assert process.returncode is None, (tmp_path / "log").read_text()
                await asyncio.sleep(0.01)  # there is nothing to wait on but the file system
        ports = json.loads(ports_file.read_bytes())
        config = daemon_config(tmp_path, NatsConfig(servers=tuple(ports["nats"])), GOOD_RUN)
        async with serving(config) as served:
            check_run(await served.run())
            # What the healthcheck of compose.yaml asks for.
            url = f"{ports['monitoring'][0]}/healthz"
            with await asyncio.to_thread(urllib.request.urlopen, url) as answer:
                assert json.load(answer) == {"status": "ok"}
            assert served.link.client.max_payload >= 1024 * 1024
    finally:
        process.terminate()
        await process.wait()


def test_every_config_has_on_disk_what_it_acknowledged() -> None:
    for name in ("single", "cluster", "private"):
        text = (NATS / f"{name}.conf").read_text(encoding="utf-8")
        assert re.search(r"^  sync_interval: always\b", text, re.MULTILINE), name
        assert re.search(r"^max_payload: 1MB\b", text, re.MULTILINE), name


def test_compose_mounts_it_where_it_looks() -> None:
    text = (NATS / "private.conf").read_text(encoding="utf-8")
    nats = read_yaml(DEPLOY / "compose.yaml")["services"]["nats"]
    assert "./nats/private.conf:/etc/nats/private.conf:ro" in nats["volumes"]
    assert nats["command"] == ["-c", "/etc/nats/private.conf"]
    (store,) = re.findall(r'store_dir: "(.*)"', text)
    assert f"nats-data:{store}" in nats["volumes"]
    (monitoring,) = re.findall(r"^http: (\S+)", text, re.MULTILINE)
    assert nats["healthcheck"]["test"][-1] == f"http://{monitoring}/healthz"
