"""Every attack, by area."""

from tests.hostile.attacks.doors import DOORS
from tests.hostile.attacks.memory import MEMORY
from tests.hostile.attacks.requests import REQUESTS
from tests.hostile.attacks.schemas import SCHEMAS

ATTACKS = (*SCHEMAS, *REQUESTS, *DOORS, *MEMORY)

__all__ = ["ATTACKS"]
