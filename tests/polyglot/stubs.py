"""Generates and compiles the stubs of every language, several at once; `make polyglot` installs the compilers."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltawire import v1
from tests.polyglot.documented import script
from tests.polyglot.programs import PROTOS, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

LANGUAGES = ROOT / "tests" / "polyglot" / "languages"
JAVA_CLIENT = ROOT / "client" / "java"
DESCRIPTORS = Path(v1.__path__[0]) / "descriptors.binpb"

TIMEOUT = 600.0
"""Seconds that one language may take. The slowest takes a tenth of it; a busy machine may need more."""

JARS = ":".join((JAVA_CLIENT / "debian-jars").read_text(encoding="utf-8").split())
"""The class path of gRPC for Java. With `error_prone_annotations`, which guava's classes name, javac gives no warning."""

# Each runs in a folder of its own that has `protos`, the descriptor set, and the language's programs in `program`. The
# README's commands write to gen/. The slowest come first.
_BUILDS = {
    # Warnings are errors, also in the generated files. What includes gRPC's headers is one file, since they take longer to
    # read than all the rest; the others are compiled side by side, without optimizing.
    "C++": """
        (cd gen/cpp && printf '#include "%s"\\n' deltawire/v1/*.grpc.pb.cc) | cat - program/chat.cc >client.cc
        (echo client.cc; find gen/cpp -name '*.pb.cc' ! -name '*.grpc.pb.cc') |
            xargs --max-args=1 --max-procs="$(nproc)" sh -c \
            'g++ -std=c++17 -O0 -Wall -Wextra -Werror -Igen/cpp -c "$0" -o "$0.o"'
        g++ $(find . -name '*.o') -o chat $(pkg-config --libs grpc++ protobuf)
    """,
    # vendor/ is assembled beforehand, see `_vendor`. The cache, which runs share, holds gRPC and what it needs.
    "Go": f"""
        cp -r gen/go/* {ROOT}/client/go/codec program/stubs
        cd program
        export GO111MODULE=on GOFLAGS=-mod=vendor GOPROXY=off GOCACHE={ROOT}/.cache/go
        go build -o ../chat .
        go vet . deltawire.dev/go/deltawire/v1
    """,
    # The second of Java's own compilers would take longer than it saves.
    "Java": f"""
        find gen/java -name '*.java' |
            xargs javac -J-XX:TieredStopAtLevel=1 -Xlint:all -Werror -encoding UTF-8 -cp {JARS} -d classes
    """,
    # The compiler checks the stubs of both generators and the programs that use them. A browser gets its page as one file.
    "TypeScript": """
        cp program/*.ts program/package.json program/tsconfig.json .
        node_modules/.bin/tsc --project .
        node out/request.js
        node_modules/.bin/esbuild page.ts --bundle --format=iife --outfile=page/page.js --log-level=warning
        printf '<!doctype html><title>page</title><script src="page.js"></script>' >page/index.html
    """,
    "Ruby": """
        ruby -w -I gen/ruby -e 'ARGV.each { |file| require file }' $(cd gen/ruby && find . -name '*.rb' -printf '%P\\n')
    """,
    "PHP": """
        php program/load.php gen/php
    """,
    "C#": """
        test -n "$(find gen/csharp -name ChatCompletion.cs)"
    """,
}


@dataclass(frozen=True)
class Build:
    """What came of a language's commands: their output, and the folder in which they ran."""

    folder: Path
    status: int
    output: str


def _vendor(program: Path) -> None:
    """Make vendor/ from the sources that Debian installs, and `modules.txt`, which says what is in it."""
    sources = Path("/usr/share/gocode/src")
    vendor, stubs = program / "vendor", program / "stubs"
    stubs.mkdir()
    (stubs / "go.mod").write_text("module deltawire.dev/go\n\ngo 1.19\n", encoding="utf-8")
    (stubs / "deltawire" / "v1").mkdir(parents=True)
    lines: list[str] = []
    for line in (program / "go.mod").read_text(encoding="utf-8").splitlines():
        if not line.startswith("\t"):
            continue
        module, version = line.split()
        own = module == "deltawire.dev/go"
        place = vendor / module
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(stubs if own else sources / module)
        lines += [f"# {module} {version}" + (" => ./stubs" if own else ""), "## explicit; go 1.19"]
        if own:
            lines += ["deltawire.dev/go/codec", "deltawire.dev/go/deltawire/v1"]
        else:
            lines += sorted({str(file.parent.relative_to(sources)) for file in (sources / module).rglob("*.go")})
    lines.append("# deltawire.dev/go => ./stubs")
    (vendor / "modules.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def workspace(folder: Path) -> None:
    """Copy the files that the README's commands read, in the layout of a clone, without links to files that they could change."""
    shutil.copytree(PROTOS, folder / "protos")
    descriptors = folder / "client" / "deltawire" / "v1" / DESCRIPTORS.name
    descriptors.parent.mkdir(parents=True)
    shutil.copy(DESCRIPTORS, descriptors)
    (folder / "node_modules").symlink_to(LANGUAGES / "typescript" / "node_modules")


def _build(language: str, folder: Path) -> Build:
    folder.mkdir()
    workspace(folder)
    name = {"C++": "cpp", "C#": "csharp"}.get(language, language.lower())
    program = LANGUAGES / name
    if program.is_dir():
        shutil.copytree(program, folder / "program", ignore=shutil.ignore_patterns("node_modules"))
    if language == "Go":
        _vendor(folder / "program")
    done = subprocess.run(
        # Tests run at the same time, and go first.
        ["nice", "-n", "5", "bash", "-euo", "pipefail", "-c", script(language) + "\n" + _BUILDS[language]],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
        check=False,
    )
    return Build(folder, done.returncode, done.stdout.decode())


class Builds:
    """The builds of all languages, as many at once as there are processors; each test waits for the one it needs."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._pool = pool
        self._builds: dict[str, Future[Build]] = {}

    def begin(self, languages: set[str]) -> None:
        """Begin the builds of these languages, in the order of the table above, but those that have begun."""
        for language in _BUILDS:
            if language in languages and language not in self._builds:
                folder = self._folder / str(len(self._builds))
                self._builds[language] = self._pool.submit(_build, language, folder)

    def result(self, language: str) -> Build:
        """Wait for a language's build, which must have succeeded."""
        self.begin({language})
        build = self._builds[language].result()
        assert build.status == 0, build.output
        return build


@contextmanager
def building(folder: Path) -> Iterator[Builds]:
    """Builds in this folder; on leaving, those that have not begun are dropped."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield Builds(folder, pool)
        pool.shutdown(wait=True, cancel_futures=True)
