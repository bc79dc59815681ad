"""From `[nats]` in the config to the arguments of nats-py's connect.

It reads secrets and key files, so it blocks: `nats_link` calls it in a thread, anew for each
client, so that a rotated password is used without a restart. Errors name the key and the
place of a secret, never its value.
"""

import ssl
from pathlib import Path
from typing import Any

from dbtstream.config import NatsConfig, SecretRef, read_secret
from dbtstream.errors import ConfigError


def connect_options(config: NatsConfig, source: str) -> dict[str, Any]:
    """Keyword arguments for `nats.aio.client.Client.connect`. Raises ConfigError."""
    options: dict[str, Any] = {
        "servers": list(config.servers),
        "inbox_prefix": config.inbox_prefix,
        "connect_timeout": config.connect_timeout_s,
    }
    if config.user is not None:
        options["user"] = config.user
    for key in ("password", "token"):
        ref: SecretRef | None = getattr(config, key)
        if ref is not None:
            options[key] = read_secret(ref, source, f"nats.{key}")
    if config.creds_file:
        _readable(config.creds_file, source, "nats.creds_file")
        options["user_credentials"] = config.creds_file
    if config.nkey_seed_file:
        # Its text, not its path: nats-py would read the file on the event loop at each connect.
        seed = _readable(config.nkey_seed_file, source, "nats.nkey_seed_file")
        options["nkeys_seed_str"] = seed.decode("ascii", "replace").strip()
    if config.tls_ca_file or config.tls_cert_file:
        options["tls"] = _tls(config, source)
    return options


def _readable(path: str, source: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(source, key, f"cannot be read: {error}") from error


def _tls(config: NatsConfig, source: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.tls_ca_file)
        if config.tls_cert_file:
            context.load_cert_chain(config.tls_cert_file, config.tls_key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            source,
            "nats.tls_ca_file" if not config.tls_cert_file else "nats.tls_cert_file",
            f"the TLS files cannot be used: {error}",
        ) from error
    return context
