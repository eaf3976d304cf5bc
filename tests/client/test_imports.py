"""What `import deltawire` imports: nothing that takes long. Counted in a process of its own, since tests import everything."""

from __future__ import annotations

import json
import subprocess
import sys
from graphlib import TopologicalSorter

import grimp
import pytest

import deltawire

_LIST = """
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported(statement: str) -> set[str]:
    """The modules that a statement imports in a new process."""
    program = _LIST.format(statement=statement)
    return set(json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout))


def test_no_circle() -> None:
    """No module needs itself, through others or for types."""
    graph = grimp.build_graph("deltawire", exclude_type_checking_imports=False)
    # The package itself names all of its modules, for type checkers.
    modules = graph.modules - {"deltawire"}
    TopologicalSorter({each: graph.find_modules_directly_imported_by(each) for each in modules}).prepare()


def test_the_package_alone() -> None:
    """Nothing but itself: each name is imported when it is first used."""
    assert imported("import deltawire") == {"deltawire", "deltawire._version"}


def test_the_blocking_client() -> None:
    """Neither the asynchronous client, nor the command line, nor what only a failed call or a function tool needs."""
    modules = imported("from deltawire import Client")
    assert "grpc" in modules
    unneeded = {"argparse", "deltawire._aio", "deltawire._cli", "google.rpc", "google.protobuf.json_format", "pydantic"}
    assert not modules & (unneeded | {"pathlib", "secrets", "uuid"})


@pytest.mark.parametrize("name", deltawire.__all__)
def test_every_name(name: str) -> None:
    """It is found in its module, by attribute and by `dir`."""
    assert getattr(deltawire, name) is not None
    assert name in dir(deltawire)


def test_no_name_twice() -> None:
    """The table of modules has public names only, each once."""
    names = [name for each in deltawire._MODULES.values() for name in each]
    assert len(names) == len(set(names))
    assert set(names) <= set(deltawire.__all__)


def test_the_messages_without_an_import() -> None:
    """`deltawire.v1` is there as an attribute too."""
    assert "deltawire.v1" in imported("import deltawire; deltawire.v1")


def test_a_name_that_does_not_exist() -> None:
    """An AttributeError, as of any module, so an ImportError where it is imported."""
    with pytest.raises(AttributeError, match="module 'deltawire' has no attribute 'Unknown'"):
        getattr(deltawire, "Unknown")  # noqa: B009 -- mypy would refuse the attribute
