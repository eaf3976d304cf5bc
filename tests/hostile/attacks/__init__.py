"""Every attack, by area."""

from tests.hostile.attacks.access import ACCESS
from tests.hostile.attacks.doors import DOORS
from tests.hostile.attacks.memory import MEMORY
from tests.hostile.attacks.registry import REGISTRY
from tests.hostile.attacks.requests import REQUESTS
from tests.hostile.attacks.schemas import SCHEMAS

ATTACKS = (*SCHEMAS, *REQUESTS, *REGISTRY, *MEMORY, *DOORS, *ACCESS)

__all__ = ["ATTACKS"]
