"""A container engine, and an image of this machine's Python that stands in for the one that the Dockerfile begins with."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import TYPE_CHECKING, Any, Self

from deltawire import AsyncClient
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "server/deploy/docker"
DIST = ROOT / ".cache/dist"
WHEELS = DIST / "wheels"
"""The libraries that the Dockerfile installs, which `make deploy` has checked against their hashes."""

METRICS_PORT = "9464"
WAIT = 60.0

# What wheels for Linux expect of every system, beside libc.
_LIBRARIES = "libpthread.so.0 libdl.so.2 librt.so.1 libutil.so.1 libm.so.6 libresolv.so.2 libgcc_s.so.1 libstdc++.so.6"


def run(*command: str | Path, **options: Any) -> str:  # noqa: ANN401 (those of subprocess.run)
    """Run a command to its end; what it prints is in the error if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


class Engine:
    """Podman, with images and containers of its own; leaving removes all of them."""

    def __init__(self) -> None:
        # The engine accepts only short paths.
        self._folder = folder = Path(tempfile.mkdtemp(prefix="deltawire-", dir="/var/tmp"))
        # cgroupfs and runc, because neither needs systemd.
        self.command = ["podman", "--root", f"{folder}/root", "--runroot", f"{folder}/run"]
        self.command += ["--cgroup-manager", "cgroupfs", "--runtime", "runc"]

    def __call__(self, *arguments: str) -> str:
        """Run it and return what it prints."""
        return run(*self.command, *arguments)

    def build(self) -> dict[str, Any]:
        """Build the image with `make image`, on this machine's Python, without a network.

        Returns:
            What the engine says of the image; its name is the first one in `RepoTags`.
        """
        base = re.search(r"^ARG PYTHON=(.+)$", (DOCKER / "Dockerfile").read_text("utf-8"), re.MULTILINE)
        assert base
        _python(self._folder / "python")
        archive = shutil.make_archive(f"{self._folder}/python", "tar", self._folder / "python")
        self("import", "--quiet", archive, base[1])
        (self._folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        mounts = f"--volume {WHEELS}:/wheels:ro --volume {self._folder}/pip.conf:/etc/pip.conf:ro"
        # Docker's format, because that of OCI has no health checks; chroot needs neither cgroups nor a network of its own.
        variables = {"BUILDAH_FORMAT": "docker", "BUILDAH_ISOLATION": "chroot", "BUILDAH_LAYERS": "false"}
        make = ("make", "--no-print-directory", "image", f"ENGINE={' '.join(self.command)}", f"FLAGS={mounts}")
        name = run(*make, cwd=ROOT, env=os.environ | variables).splitlines()
        [image] = json.loads(self("image", "inspect", name[-1]))
        assert isinstance(image, dict)
        return image

    @contextmanager
    def running(self, *arguments: str, flags: Sequence[str] = ()) -> Iterator[Container]:
        """Run a container as a hardened host does: no capabilities, no new privileges, a read-only root file system.

        Args:
            arguments: The image and the arguments of its program.
            flags: More flags of `podman run`.
        """
        # No more than this process may have: without the capability to raise limits, the defaults are refused.
        limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        given = [f"--ulimit={name}={min(1024, resource.getrlimit(kind)[1])}" for name, kind in limits.items()]
        # Health checks would be run by systemd.
        own = ["--network=host", "--cgroupns=host", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all"]
        own += ["--security-opt=no-new-privileges", "--no-healthcheck", *given, *flags]
        identifier = self("create", *own, *arguments).strip()
        try:
            self("start", identifier)
            yield Container(self, identifier)
        finally:
            self("rm", "--force", "--time=0", identifier)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Not `system reset`, which also removes the networks of every other engine on the machine.
        self("rmi", "--all", "--force")
        if (self._folder / "root/overlay").is_mount():
            run("umount", self._folder / "root/overlay")
        shutil.rmtree(self._folder)


class Container:
    """A running container."""

    def __init__(self, engine: Engine, identifier: str) -> None:
        self._engine = engine
        self._identifier = identifier

    def execute(self, *command: str) -> str:
        """Run a command in it and return what it prints."""
        return self._engine("exec", self._identifier, *command)

    def wait_until(self, *command: str) -> None:
        """Repeat a command in it until it succeeds."""
        deadline = time.monotonic() + WAIT
        while True:
            try:
                self.execute(*command)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise AssertionError(self.log()) from None
                time.sleep(0.2)
            else:
                return

    def log(self) -> str:
        """All that its processes have written so far."""
        command = [*self._engine.command, "logs", self._identifier]
        return subprocess.run(command, stdout=PIPE, stderr=STDOUT, text=True, check=True, timeout=WAIT).stdout

    def users(self) -> set[str]:
        """The users of its processes as this machine sees them: a number, if none here has a name for it."""
        return {*self._engine("top", self._identifier, "huser").split()[1:]}

    def stop(self) -> int:
        """Send it the image's stop signal, and return its exit status; 137 if it did not end."""
        self._engine("stop", f"--time={WAIT:g}", self._identifier)
        return int(self._engine("inspect", "--format={{.State.ExitCode}}", self._identifier))


@asynccontextmanager
async def serving(
    engine: Engine, image: Mapping[str, Any], vllm: str, *arguments: str, flags: Sequence[str] = ()
) -> AsyncIterator[Container]:
    """Run the gateway in a container until its health check succeeds, and chat; after the block, SIGTERM must end it with 0.

    Args:
        engine: Has the image.
        image: What `Engine.build` returned.
        vllm: The URL of vLLM.
        arguments: More flags of the gateway.
        flags: More flags of `podman run`.
    """
    port, metrics = free_port(), free_port()
    kind, *check = image["Healthcheck"]["Test"]
    assert kind == "CMD"
    listeners = ["--vllm-url", vllm, "--listen", f"127.0.0.1:{port}", "--metrics-listen", f"127.0.0.1:{metrics}"]
    with engine.running(image["RepoTags"][0], *listeners, *arguments, flags=flags) as container:
        await asyncio.to_thread(container.wait_until, *(word.replace(METRICS_PORT, str(metrics)) for word in check))
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            answer = await client.chat.create("hi", model="fake", timeout=WAIT)
        assert answer.usage.completion_tokens
        yield container
        assert await asyncio.to_thread(container.stop) == 0


def _python(folder: Path) -> None:
    """Fill a folder with the files that an image with Python and pip has: those of this machine's."""
    executable, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    target = folder / "usr/local/lib" / library.name
    left_out = shutil.ignore_patterns("test", "site-packages", "idlelib", "tkinter", "_tkinter*", "config-*")
    shutil.copytree(library, target, ignore=left_out)
    import pip

    shutil.copytree(Path(pip.__file__).parent, target / "site-packages/pip")
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "run", "usr/local/bin"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    shutil.copy(executable, folder / "usr/local/bin/python")
    (folder / "usr/local/bin/python3").symlink_to("python")
    (folder / "usr/local/bin/pip").write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    (folder / "usr/local/bin/pip").chmod(0o755)
    shell = Path("/bin/sh").resolve()
    shutil.copy(shell, folder / "bin/sh")
    programs = [executable, shell, *(target / "lib-dynload").glob("*.so")]
    linked = {word for program in programs for word in _linked(program) if word.startswith("/")}
    system = next(Path(word).parent for word in linked if Path(word).name == "libc.so.6")
    for path in {*map(Path, linked), *(system / name for name in _LIBRARIES.split())}:
        copy = folder / path.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _linked(program: Path) -> list[str]:
    return subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout.split()
