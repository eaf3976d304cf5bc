"""The operator's settings: one TOML file, overridden by environment variables, overridden by flags. No network access.

`parse` returns an `Invocation` with valid settings, or raises `SettingsError` with every problem. To add a key, add a field
with a docstring to `model`: the file, the environment, `--set`, `--help` and the printed settings then support it.
"""

from deltawire_server.settings.cli import Invocation, effective, example, parse
from deltawire_server.settings.model import (
    AccessSettings,
    ImageSettings,
    LimitsSettings,
    LogSettings,
    MetricsSettings,
    ProviderSettings,
    RegistrySettings,
    RetentionSettings,
    ServerSettings,
    Settings,
    StreamSettings,
    UsageSettings,
)
from deltawire_server.settings.sources import SettingsError
from deltawire_server.settings.values import is_local, shown_database_url

__all__ = [
    "AccessSettings",
    "ImageSettings",
    "Invocation",
    "LimitsSettings",
    "LogSettings",
    "MetricsSettings",
    "ProviderSettings",
    "RegistrySettings",
    "RetentionSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "StreamSettings",
    "UsageSettings",
    "effective",
    "example",
    "is_local",
    "parse",
    "shown_database_url",
]
