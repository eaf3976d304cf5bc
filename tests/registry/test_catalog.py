from __future__ import annotations

from collections import Counter

import pytest

from deltawire_server.registry.catalog import KNOWN_MODELS, names_of, served_as
from deltawire_server.upstream.base import ServedModel

REPOSITORY = "meta-llama/Llama-3.1-8B-Instruct"
DESCRIPTOR = "Llama3.1-8B-Instruct"
SHARED = "meta-llama/Llama-3.1-405B"
SHARED_BY_8, SHARED_BY_16 = "Llama3.1-405B:bf16-mp8", "Llama3.1-405B:bf16-mp16"


def test_the_catalogue_is_whole() -> None:
    """Entries, repositories, descriptors and names are as many as the original's, family by family and in its order."""
    repositories = {known.repository for known in KNOWN_MODELS}
    descriptors = {known.descriptor for known in KNOWN_MODELS}
    assert (len(KNOWN_MODELS), len(repositories), len(descriptors)) == (45, 43, 45)
    assert len(repositories | descriptors) == 88
    assert list(Counter(known.family for known in KNOWN_MODELS).items()) == [
        ("llama2", 6),
        ("llama3", 4),
        ("llama3_1", 10),
        ("llama3_2", 12),
        ("llama3_3", 1),
        ("llama4", 5),
        ("safety", 7),
    ]
    assert all(repository.startswith("meta-llama/") for repository in repositories)


def test_sequence_lengths() -> None:
    """Each length is that of the family, but for what was made for other lengths."""
    lengths = Counter((known.family, known.max_sequence_length) for known in KNOWN_MODELS)
    assert lengths == {
        ("llama2", 4096): 6,
        ("llama3", 8192): 4,
        ("llama3_1", 131072): 10,
        ("llama3_2", 131072): 8,
        ("llama3_2", 8192): 4,
        ("llama3_3", 131072): 1,
        ("llama4", 262144): 2,
        ("llama4", 10485760): 1,
        ("llama4", 1048576): 2,
        ("safety", 8192): 1,
        ("safety", 131072): 5,
        ("safety", 4096): 1,
    }
    short = [
        known.descriptor for known in KNOWN_MODELS if known.family == "llama3_2" and known.max_sequence_length == 8192
    ]
    assert all(":int4-" in descriptor for descriptor in short)


@pytest.mark.parametrize("variant", ["", "-Instruct"])
def test_a_repository_with_two_descriptors_leads_to_the_later(variant: str) -> None:
    """Read from the first to the last, as the original did, the repositories of 405B end at their 16 files."""
    repository = f"meta-llama/Llama-3.1-405B{variant}"
    twice = [repository for repository, count in Counter(each.repository for each in KNOWN_MODELS).items() if count > 1]
    assert twice == ["meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B-Instruct"]
    descriptors = {known.repository: known.descriptor for known in KNOWN_MODELS}
    assert descriptors[repository] == f"Llama3.1-405B{variant}:bf16-mp16"


@pytest.mark.parametrize(
    ("repository", "descriptor"),
    [
        (REPOSITORY, DESCRIPTOR),
        ("meta-llama/Llama-2-7b-chat", "Llama-2-7b-chat"),
        ("meta-llama/Llama-3.1-405B-FP8", "Llama3.1-405B"),
        ("meta-llama/Llama-3.2-3B-Instruct-SpinQuant_INT4_EO8", "Llama3.2-3B-Instruct:int4-spinquant-eo8"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "Llama-4-Maverick-17B-128E-Instruct:fp8"),
        ("meta-llama/Llama-Guard-3-8B-INT8", "Llama-Guard-3-8B:int8"),
    ],
)
def test_names_lead_to_each_other(repository: str, descriptor: str) -> None:
    """A descriptor has a repository, also where the two are written differently, and the other way around."""
    assert names_of(repository) == (descriptor,)
    assert names_of(descriptor) == (repository,)


def test_names_of_a_repository_with_two_descriptors() -> None:
    """All three are names of the one model: the repository comes first, then the catalogue's order."""
    assert names_of(SHARED) == (SHARED_BY_8, SHARED_BY_16)
    assert names_of(SHARED_BY_8) == (SHARED, SHARED_BY_16)
    assert names_of(SHARED_BY_16) == (SHARED, SHARED_BY_8)


def test_every_name_is_known_by_its_others() -> None:
    """No name is left out, none leads to itself, and what a name leads to leads back."""
    for known in KNOWN_MODELS:
        for name in (known.repository, known.descriptor):
            others = names_of(name)
            assert others
            assert name not in others
            assert all(name in names_of(other) for other in others)


@pytest.mark.parametrize("name", ["", "llama3.1-8b-instruct", "Llama3.1-8B-Instruct ", "Qwen/Qwen3-8B"])
def test_other_names_are_unknown(name: str) -> None:
    """Names are taken letter for letter."""
    assert names_of(name) == ()


@pytest.mark.parametrize(
    ("wanted", "listing", "expected"),
    [
        pytest.param("a", [ServedModel("b"), ServedModel("a")], "a", id="its own id"),
        pytest.param("a", [ServedModel("b"), ServedModel("A")], None, id="another case"),
        pytest.param(DESCRIPTOR, [ServedModel(REPOSITORY)], REPOSITORY, id="descriptor, served as repository"),
        pytest.param(REPOSITORY, [ServedModel(DESCRIPTOR)], DESCRIPTOR, id="repository, served as descriptor"),
        pytest.param(DESCRIPTOR, [ServedModel(REPOSITORY.lower())], None, id="repository in another case"),
        pytest.param(
            DESCRIPTOR, [ServedModel(REPOSITORY), ServedModel(DESCRIPTOR)], DESCRIPTOR, id="its own id before others"
        ),
        pytest.param(
            SHARED_BY_8,
            [ServedModel(SHARED_BY_16), ServedModel(SHARED)],
            SHARED,
            id="the repository before descriptors",
        ),
        pytest.param(
            SHARED, [ServedModel(SHARED_BY_16), ServedModel(SHARED_BY_8)], SHARED_BY_8, id="descriptors in their order"
        ),
        pytest.param("org/m", [ServedModel("small", "org/m")], "small", id="served under a name of its own"),
        pytest.param(DESCRIPTOR, [ServedModel("small", REPOSITORY)], "small", id="descriptor, loaded from repository"),
        pytest.param(
            "org/m",
            [ServedModel("org/m", "/other"), ServedModel("small", "org/m")],
            "org/m",
            id="its own id before the root",
        ),
        pytest.param(
            "org/m", [ServedModel("one", "org/m"), ServedModel("two", "org/m")], None, id="two loaded from it"
        ),
        pytest.param(
            SHARED_BY_8,
            [ServedModel("one", SHARED), ServedModel("two", SHARED_BY_8)],
            None,
            id="two loaded from names of it",
        ),
        pytest.param("org/m", [ServedModel("adapter", "org/m", "base")], None, id="an adapter loaded from it"),
        pytest.param("adapter", [ServedModel("adapter", "/a", "base")], "adapter", id="an adapter by its id"),
        pytest.param("a", [], None, id="nothing served"),
    ],
)
def test_what_of_a_listing_a_name_means(wanted: str, listing: list[ServedModel], expected: str | None) -> None:
    """The nearest reading wins, and where it is not certain which is meant, none is taken."""
    served = served_as(wanted, listing)
    assert (served.id if served else None) == expected
