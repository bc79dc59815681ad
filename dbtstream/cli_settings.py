"""The global options of the command line and the config that they lead to.

`cli` and `cli_dead` get it with `click.pass_obj`. Imports of the work are inside the functions,
as there.
"""

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbtstream.config import Config, NatsConfig


class Settings:
    """`--config` and `--nats`."""

    def __init__(self, config_path: str | None, url: str | None) -> None:
        self._config_path = config_path
        self._url = url

    def config(self) -> "Config":
        """Raises ConfigError."""
        import msgspec

        from dbtstream.config import find_config, load_config

        config = load_config(find_config(self._config_path))
        if self._url is None:
            return config
        nats = msgspec.structs.replace(config.nats, servers=tuple(self._url.split(",")))
        return msgspec.structs.replace(config, nats=nats)

    def nats(self) -> "NatsConfig":
        """For commands that only need a connection: `--nats` alone asks for no valid config."""
        from dbtstream.config import NatsConfig

        if self._url is not None and self._config_path is None:
            return NatsConfig(servers=tuple(self._url.split(",")))
        return self.config().nats


def run_to_end(work: Coroutine[Any, Any, int]) -> int:
    import uvloop

    return uvloop.run(work)
