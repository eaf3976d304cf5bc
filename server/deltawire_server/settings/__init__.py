"""What the operator says: one TOML file, environment variables over it, flags over both. No network.

`parse` gives an `Invocation` whose settings can be served with, or raises `SettingsError` with every problem there is.
To add a key, add a field with its description to `model`: file, environment, `--set`, `--help` and the printed settings
have it then.
"""

from deltawire_server.settings.cli import Invocation, effective, example, parse
from deltawire_server.settings.model import (
    AccessSettings,
    ImageSettings,
    LogSettings,
    ProviderSettings,
    RegistrySettings,
    RetentionSettings,
    ServerSettings,
    Settings,
    StreamSettings,
)
from deltawire_server.settings.sources import SettingsError
from deltawire_server.settings.values import is_local, shown_database_url

__all__ = [
    "AccessSettings",
    "ImageSettings",
    "Invocation",
    "LogSettings",
    "ProviderSettings",
    "RegistrySettings",
    "RetentionSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "StreamSettings",
    "effective",
    "example",
    "is_local",
    "parse",
    "shown_database_url",
]
