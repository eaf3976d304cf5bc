"""The reference of the settings, from the models that validate them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.app import RELOADED
from deltawire_server.settings.cli import FLAGS, _toml
from deltawire_server.settings.fields import expectation, is_secret, is_table
from deltawire_server.settings.model import SECTIONS
from deltawire_server.settings.sources import SHORT_NAMES, variable
from tests.support.pages.text import MADE, cell, code, escaped, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

    from deltawire_server.settings.fields import KeyPath
    from deltawire_server.settings.model import Section

_START = """\
Each key can be set in the settings file, by its environment variable, and by its flag or `--set SECTION.KEY=VALUE`. Flags
override variables, which override the file. A secret has no flag, and tables can be set only in the file. `VLLM` in a
variable stands for the provider's id, in capitals and with `_` for other characters. All times are in seconds, all sizes
in bytes. `deltawire-server --check-config` prints the settings in effect.
"""


def page() -> str:
    """The page."""
    parts = ["# Settings\n", MADE, _START]
    for name, section in SECTIONS.items():
        parts += _section(name, section)
    return "\n".join(parts)


def _section(name: str, section: type[Section]) -> Iterator[str]:
    path: KeyPath = (name, "vllm") if name == "providers" else (name,)
    yield f"## {'providers.ID' if name == 'providers' else name}\n"
    yield escaped("\n".join(line.strip() for line in (section.__doc__ or "").splitlines()).strip()) + "\n"
    yield f"Changes in this section {'take effect on a reload (SIGHUP)' if name in RELOADED else 'require a restart'}.\n"
    rows = [
        (
            code(key),
            cell(expectation(field)),
            _default(field),
            "<br>".join(map(code, _ways((*path, key), field))),
            cell(field.description or ""),
        )
        for key, field in section.model_fields.items()
    ]
    yield table(("key", "values", "default", "variable, flag", "meaning"), rows)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    return "none" if default in (None, "", (), {}) else code(_toml(default))


def _ways(path: KeyPath, field: FieldInfo) -> list[str]:
    if is_table(field):
        return []
    names = [name for name, key in SHORT_NAMES.items() if key == path]
    flags = [] if is_secret(field) else [flag for flag, key in FLAGS.items() if key == path]
    return [variable(path), *names, *flags]
