"""The Llama models by all the names that they have, and which entry of a provider's listing a name means.

A Llama has a descriptor, which its makers and llama-stack call it by ("Llama3.1-8B-Instruct"), and a repository on the
Hugging Face hub ("meta-llama/Llama-3.1-8B-Instruct"), after which a vLLM names what it serves unless it is told another
name. Who registers one may use either.
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
    """A Llama as its makers published it.

    Attributes:
        family: Its generation, or "safety" for models that classify content.
        descriptor: Its makers' name for it, with the variant after a colon if there are several; no two have the same.
        repository: Where it is on the Hugging Face hub. Two that differ only in how many files hold the weights share one.
        max_sequence_length: Tokens of prompt and answer together that it was made for; a provider may allow fewer.
    """

    family: str
    descriptor: str
    repository: str
    max_sequence_length: int


KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel("llama2", "Llama-2-7b", "meta-llama/Llama-2-7b", 4_096),
    KnownModel("llama2", "Llama-2-13b", "meta-llama/Llama-2-13b", 4_096),
    KnownModel("llama2", "Llama-2-70b", "meta-llama/Llama-2-70b", 4_096),
    KnownModel("llama2", "Llama-2-7b-chat", "meta-llama/Llama-2-7b-chat", 4_096),
    KnownModel("llama2", "Llama-2-13b-chat", "meta-llama/Llama-2-13b-chat", 4_096),
    KnownModel("llama2", "Llama-2-70b-chat", "meta-llama/Llama-2-70b-chat", 4_096),
    KnownModel("llama3", "Llama-3-8B", "meta-llama/Llama-3-8B", 8_192),
    KnownModel("llama3", "Llama-3-70B", "meta-llama/Llama-3-70B", 8_192),
    KnownModel("llama3", "Llama-3-8B-Instruct", "meta-llama/Llama-3-8B-Instruct", 8_192),
    KnownModel("llama3", "Llama-3-70B-Instruct", "meta-llama/Llama-3-70B-Instruct", 8_192),
    KnownModel("llama3_1", "Llama3.1-8B", "meta-llama/Llama-3.1-8B", 131_072),
    KnownModel("llama3_1", "Llama3.1-70B", "meta-llama/Llama-3.1-70B", 131_072),
    KnownModel("llama3_1", "Llama3.1-405B:bf16-mp8", "meta-llama/Llama-3.1-405B", 131_072),
    KnownModel("llama3_1", "Llama3.1-405B:bf16-mp16", "meta-llama/Llama-3.1-405B", 131_072),
    KnownModel("llama3_1", "Llama3.1-405B", "meta-llama/Llama-3.1-405B-FP8", 131_072),
    KnownModel("llama3_1", "Llama3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", 131_072),
    KnownModel("llama3_1", "Llama3.1-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", 131_072),
    KnownModel("llama3_1", "Llama3.1-405B-Instruct:bf16-mp8", "meta-llama/Llama-3.1-405B-Instruct", 131_072),
    KnownModel("llama3_1", "Llama3.1-405B-Instruct:bf16-mp16", "meta-llama/Llama-3.1-405B-Instruct", 131_072),
    KnownModel("llama3_1", "Llama3.1-405B-Instruct", "meta-llama/Llama-3.1-405B-Instruct-FP8", 131_072),
    KnownModel("llama3_2", "Llama3.2-1B", "meta-llama/Llama-3.2-1B", 131_072),
    KnownModel("llama3_2", "Llama3.2-3B", "meta-llama/Llama-3.2-3B", 131_072),
    KnownModel("llama3_2", "Llama3.2-11B-Vision", "meta-llama/Llama-3.2-11B-Vision", 131_072),
    KnownModel("llama3_2", "Llama3.2-90B-Vision", "meta-llama/Llama-3.2-90B-Vision", 131_072),
    KnownModel("llama3_2", "Llama3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", 131_072),
    KnownModel("llama3_2", "Llama3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", 131_072),
    KnownModel("llama3_2", "Llama3.2-11B-Vision-Instruct", "meta-llama/Llama-3.2-11B-Vision-Instruct", 131_072),
    KnownModel("llama3_2", "Llama3.2-90B-Vision-Instruct", "meta-llama/Llama-3.2-90B-Vision-Instruct", 131_072),
    KnownModel(
        "llama3_2", "Llama3.2-1B-Instruct:int4-qlora-eo8", "meta-llama/Llama-3.2-1B-Instruct-QLORA_INT4_EO8", 8_192
    ),
    KnownModel(
        "llama3_2",
        "Llama3.2-1B-Instruct:int4-spinquant-eo8",
        "meta-llama/Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8",
        8_192,
    ),
    KnownModel(
        "llama3_2", "Llama3.2-3B-Instruct:int4-qlora-eo8", "meta-llama/Llama-3.2-3B-Instruct-QLORA_INT4_EO8", 8_192
    ),
    KnownModel(
        "llama3_2",
        "Llama3.2-3B-Instruct:int4-spinquant-eo8",
        "meta-llama/Llama-3.2-3B-Instruct-SpinQuant_INT4_EO8",
        8_192,
    ),
    KnownModel("llama3_3", "Llama3.3-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", 131_072),
    KnownModel("llama4", "Llama-4-Scout-17B-16E", "meta-llama/Llama-4-Scout-17B-16E", 262_144),
    KnownModel("llama4", "Llama-4-Maverick-17B-128E", "meta-llama/Llama-4-Maverick-17B-128E", 262_144),
    KnownModel("llama4", "Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct", 10_485_760),
    KnownModel(
        "llama4", "Llama-4-Maverick-17B-128E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct", 1_048_576
    ),
    KnownModel(
        "llama4",
        "Llama-4-Maverick-17B-128E-Instruct:fp8",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        1_048_576,
    ),
    KnownModel("safety", "Llama-Guard-4-12B", "meta-llama/Llama-Guard-4-12B", 8_192),
    KnownModel("safety", "Llama-Guard-3-11B-Vision", "meta-llama/Llama-Guard-3-11B-Vision", 131_072),
    KnownModel("safety", "Llama-Guard-3-1B:int4", "meta-llama/Llama-Guard-3-1B-INT4", 131_072),
    KnownModel("safety", "Llama-Guard-3-1B", "meta-llama/Llama-Guard-3-1B", 131_072),
    KnownModel("safety", "Llama-Guard-3-8B", "meta-llama/Llama-Guard-3-8B", 131_072),
    KnownModel("safety", "Llama-Guard-3-8B:int8", "meta-llama/Llama-Guard-3-8B-INT8", 131_072),
    KnownModel("safety", "Llama-Guard-2-8B", "meta-llama/Llama-Guard-2-8B", 4_096),
)
"""All of them, by family."""


def names_of(name: str) -> tuple[str, ...]:
    """Every other name of the model of this name: its repository, then its descriptors as `KNOWN_MODELS` has them.

    Args:
        name: A repository or a descriptor, letter for letter; of anything else no other name is known.
    """
    return _OTHER_NAMES.get(name, ())


def served_as(wanted: str, listing: Sequence[ServedModel]) -> ServedModel | None:
    """The entry of a provider's listing that a name means; `None` if none does, or if it is not certain which.

    That is the entry of just this id, else of another name of the model. Else the only one that was loaded from what is
    wanted: a vLLM that was given a name to serve a model under still says from where it loaded it.

    Args:
        wanted: An id of the listing's, or a repository or a descriptor, known or not.
        listing: What the provider serves.
    """
    names = (wanted, *names_of(wanted))
    for name in names:
        for served in listing:
            if served.id == name:
                return served
    loaded = [served for served in listing if served.engine_root in names]
    # A LoRA adapter is another model than the one whose weights it changes.
    return loaded[0] if len(loaded) == 1 and not loaded[0].base_model else None


def _other_names() -> Mapping[str, tuple[str, ...]]:
    models: dict[str, list[str]] = {}
    for known in KNOWN_MODELS:
        models.setdefault(known.repository, [known.repository]).append(known.descriptor)
    return MappingProxyType(
        {name: tuple(other for other in names if other != name) for names in models.values() for name in names}
    )


_OTHER_NAMES = _other_names()
