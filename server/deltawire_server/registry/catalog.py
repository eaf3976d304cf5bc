"""All names of the Llama models, and which entry of a provider's listing a name refers to.

A Llama model has a descriptor ("Llama3.1-8B-Instruct"), which Meta and llama-stack use, and a repository on the Hugging Face hub
("meta-llama/Llama-3.1-8B-Instruct"), which is vLLM's default name for the model. A registration may use either.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltawire_server.upstream.base import ServedModel


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published Llama model.

    Attributes:
        family: Its generation, or "safety" for models that classify content.
        descriptor: Meta's name, with the variant after a colon if there are several; unique.
        repository: Its repository on the Hugging Face hub; shared by models that differ only in the number of weight files.
        max_sequence_length: Limit of prompt and answer together in tokens; a provider may have a lower one.
    """

    family: str
    descriptor: str
    repository: str
    max_sequence_length: int


KNOWN_MODELS: tuple[KnownModel, ...] = tuple(
    KnownModel(family, descriptor, f"meta-llama/{name}", max_sequence_length)
    for family, descriptor, name, max_sequence_length in (
        ("llama2", "Llama-2-7b", "Llama-2-7b", 4_096),
        ("llama2", "Llama-2-13b", "Llama-2-13b", 4_096),
        ("llama2", "Llama-2-70b", "Llama-2-70b", 4_096),
        ("llama2", "Llama-2-7b-chat", "Llama-2-7b-chat", 4_096),
        ("llama2", "Llama-2-13b-chat", "Llama-2-13b-chat", 4_096),
        ("llama2", "Llama-2-70b-chat", "Llama-2-70b-chat", 4_096),
        ("llama3", "Llama-3-8B", "Llama-3-8B", 8_192),
        ("llama3", "Llama-3-70B", "Llama-3-70B", 8_192),
        ("llama3", "Llama-3-8B-Instruct", "Llama-3-8B-Instruct", 8_192),
        ("llama3", "Llama-3-70B-Instruct", "Llama-3-70B-Instruct", 8_192),
        ("llama3_1", "Llama3.1-8B", "Llama-3.1-8B", 131_072),
        ("llama3_1", "Llama3.1-70B", "Llama-3.1-70B", 131_072),
        ("llama3_1", "Llama3.1-405B:bf16-mp8", "Llama-3.1-405B", 131_072),
        ("llama3_1", "Llama3.1-405B:bf16-mp16", "Llama-3.1-405B", 131_072),
        ("llama3_1", "Llama3.1-405B", "Llama-3.1-405B-FP8", 131_072),
        ("llama3_1", "Llama3.1-8B-Instruct", "Llama-3.1-8B-Instruct", 131_072),
        ("llama3_1", "Llama3.1-70B-Instruct", "Llama-3.1-70B-Instruct", 131_072),
        ("llama3_1", "Llama3.1-405B-Instruct:bf16-mp8", "Llama-3.1-405B-Instruct", 131_072),
        ("llama3_1", "Llama3.1-405B-Instruct:bf16-mp16", "Llama-3.1-405B-Instruct", 131_072),
        ("llama3_1", "Llama3.1-405B-Instruct", "Llama-3.1-405B-Instruct-FP8", 131_072),
        ("llama3_2", "Llama3.2-1B", "Llama-3.2-1B", 131_072),
        ("llama3_2", "Llama3.2-3B", "Llama-3.2-3B", 131_072),
        ("llama3_2", "Llama3.2-11B-Vision", "Llama-3.2-11B-Vision", 131_072),
        ("llama3_2", "Llama3.2-90B-Vision", "Llama-3.2-90B-Vision", 131_072),
        ("llama3_2", "Llama3.2-1B-Instruct", "Llama-3.2-1B-Instruct", 131_072),
        ("llama3_2", "Llama3.2-3B-Instruct", "Llama-3.2-3B-Instruct", 131_072),
        ("llama3_2", "Llama3.2-11B-Vision-Instruct", "Llama-3.2-11B-Vision-Instruct", 131_072),
        ("llama3_2", "Llama3.2-90B-Vision-Instruct", "Llama-3.2-90B-Vision-Instruct", 131_072),
        ("llama3_2", "Llama3.2-1B-Instruct:int4-qlora-eo8", "Llama-3.2-1B-Instruct-QLORA_INT4_EO8", 8_192),
        ("llama3_2", "Llama3.2-1B-Instruct:int4-spinquant-eo8", "Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8", 8_192),
        ("llama3_2", "Llama3.2-3B-Instruct:int4-qlora-eo8", "Llama-3.2-3B-Instruct-QLORA_INT4_EO8", 8_192),
        ("llama3_2", "Llama3.2-3B-Instruct:int4-spinquant-eo8", "Llama-3.2-3B-Instruct-SpinQuant_INT4_EO8", 8_192),
        ("llama3_3", "Llama3.3-70B-Instruct", "Llama-3.3-70B-Instruct", 131_072),
        ("llama4", "Llama-4-Scout-17B-16E", "Llama-4-Scout-17B-16E", 262_144),
        ("llama4", "Llama-4-Maverick-17B-128E", "Llama-4-Maverick-17B-128E", 262_144),
        ("llama4", "Llama-4-Scout-17B-16E-Instruct", "Llama-4-Scout-17B-16E-Instruct", 10_485_760),
        ("llama4", "Llama-4-Maverick-17B-128E-Instruct", "Llama-4-Maverick-17B-128E-Instruct", 1_048_576),
        ("llama4", "Llama-4-Maverick-17B-128E-Instruct:fp8", "Llama-4-Maverick-17B-128E-Instruct-FP8", 1_048_576),
        ("safety", "Llama-Guard-4-12B", "Llama-Guard-4-12B", 8_192),
        ("safety", "Llama-Guard-3-11B-Vision", "Llama-Guard-3-11B-Vision", 131_072),
        ("safety", "Llama-Guard-3-1B:int4", "Llama-Guard-3-1B-INT4", 131_072),
        ("safety", "Llama-Guard-3-1B", "Llama-Guard-3-1B", 131_072),
        ("safety", "Llama-Guard-3-8B", "Llama-Guard-3-8B", 131_072),
        ("safety", "Llama-Guard-3-8B:int8", "Llama-Guard-3-8B-INT8", 131_072),
        ("safety", "Llama-Guard-2-8B", "Llama-Guard-2-8B", 4_096),
    )
)
"""All models, by family."""


def names_of(name: str) -> tuple[str, ...]:
    """The other names of a model: its repository, then its descriptors in the order of `KNOWN_MODELS`.

    Args:
        name: A repository or a descriptor, exactly; for any other text the result is empty.
    """
    return _OTHER_NAMES.get(name, ())


def served_as(wanted: str, listing: Sequence[ServedModel]) -> ServedModel | None:
    """The entry of a provider's listing that a name refers to; `None` if there is none, or if it is ambiguous.

    That is the entry with this id, else with another name of the model. Else the only entry that was loaded from a path or
    repository of one of these names: vLLM reports it also for a model with another served name.

    Args:
        wanted: An id of the listing, a repository or a descriptor.
        listing: The listing of the provider.
    """
    names = (wanted, *names_of(wanted))
    for name in names:
        for served in listing:
            if served.id == name:
                return served
    loaded = [served for served in listing if served.engine_root in names]
    # A LoRA adapter is another model than its base model.
    return loaded[0] if len(loaded) == 1 and not loaded[0].base_model else None


def _other_names() -> Mapping[str, tuple[str, ...]]:
    models: dict[str, list[str]] = {}
    for known in KNOWN_MODELS:
        models.setdefault(known.repository, [known.repository]).append(known.descriptor)
    return MappingProxyType(
        {name: tuple(other for other in names if other != name) for names in models.values() for name in names}
    )


_OTHER_NAMES = _other_names()
