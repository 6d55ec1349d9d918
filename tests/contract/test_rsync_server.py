"""Copies on a server with SSH and rsync: what only this kind of destination can do, or suffer."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import NOT_A_FILE
from pgkeep.adapters.destinations import rsync as rsync_module
from pgkeep.adapters.destinations.rsync import Options, RsyncDestination
from pgkeep.errors import ConfigurationError, FormatError, RefusedError, StorageError
from pgkeep.progress import Silent
from tests import clusters, ssh_server
from tests.contract import filesystems
from tests.contract.destination_contract import (
    ASIDE,
    FOLDER,
    MIB,
    NAME,
    PATH,
    Subject,
    content_of,
)
from tests.contract.rsync_subject import subject_at
from tests.ssh_server import SshServer

MANIFEST = ".manifest.json"


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server.running() as started:
        yield started


@pytest.fixture(scope="module")
def key(server: SshServer) -> Path:
    return server.let_in("plain")


@pytest.fixture
def plain(server: SshServer, key: Path, tmp_path: Path) -> Subject:
    """An account that may do anything."""
    directory = tmp_path / "there"
    directory.mkdir()
    return subject_at(server.destination(key, directory), directory, tmp_path)


# An account without a restriction


def test_only_the_account_reads_copies(plain: Subject, tmp_path: Path) -> None:
    plain.store(b"data")
    assert plain.get(PATH) == b"data"
    assert stat.S_IMODE((tmp_path / "there" / PATH).stat().st_mode) == 0o400


def test_names_are_taken_as_they_are(plain: Subject) -> None:
    names = ["2026-11-23_a%2Fb%20%5B1%5D.sql.gz", 'a b\'s "$(id)" `x` [1]*?\\.sql.gz', "- Zoë\n€#.sql.gz"]
    plain.put(f"{FOLDER}/2026-11-23_a%2Fb%20x.sql.gz", b"another")
    plain.source.write_bytes(b"data")
    with plain.destination.opened() as place, filesystems.opened(plain.source) as source:
        for path in [f"{FOLDER}/{name}" for name in names]:
            place.store(path, source, content_of(b"data"), Silent())
            assert plain.get(path) == b"data"
            assert place.content(path, Silent()) == content_of(b"data")
            assert place.read(path, 100) == b"data"
    with plain.destination.opened() as place, filesystems.opened(plain.source) as source:
        paths = [f"{FOLDER}/{name}" for name in names]
        assert place.sizes(dict.fromkeys(paths, "")) == dict.fromkeys(paths, 4)
        assert {each.path for each in place.files(["daily"])} >= set(paths)
        for path in paths:
            plain.put(path, b"spoilt")
            place.store(path, source, content_of(b"data"), Silent(), aside=f"{path.rpartition('/')[2]}.damaged-1")
            assert plain.get(f"{path}.damaged-1") == b"spoilt"


def test_a_target_s_path_may_hold_spaces(server: SshServer, key: Path, tmp_path: Path) -> None:
    directory = tmp_path / "it's  a $HOME [place]"
    directory.mkdir()
    subject = subject_at(server.destination(key, directory), directory, tmp_path)
    subject.store(b"data")
    assert subject.get(PATH) == b"data"
    assert not (tmp_path / "it's").exists()


def test_many_copies_are_listed_at_once(server: SshServer, key: Path) -> None:
    paths = [f"daily/2026-{n // 1000:02}-01/{n:05}.sql.gz" for n in range(20_000)]
    with filesystems.mounted("tmpfs") as there:
        for path in paths:
            if path.endswith("000.sql.gz"):
                (there / path).parent.mkdir(parents=True)
            os.close(os.open(there / path, os.O_CREAT | os.O_WRONLY))
        before, started = server.sessions(), time.monotonic()
        with server.destination(key, there).opened() as place:
            assert place.sizes(dict.fromkeys(paths, "")) == dict.fromkeys(paths, 0)
            assert [each.path for each in place.files(["daily"])] == paths
            assert place.sizes({paths[0]: ""}) == {paths[0]: 0}
        assert server.sessions() - before == 2
        assert time.monotonic() - started < 15


def test_small_files_come_together_to_a_reader(server: SshServer, plain: Subject) -> None:
    wanted = {f"daily/2026-11-{n:02}/x.sql.gz{MANIFEST}": os.urandom(100) for n in range(1, 29)}
    for path, data in {**wanted, "daily/2026-11-01/x.sql.gz": b"a dump", f"daily/big{MANIFEST}": bytes(5000)}.items():
        plain.put(path, data)
    with plain.destination.opened(to_read=True) as place:
        before = server.sessions()
        assert {path: place.read(path, 1000) for path in wanted} == wanted
        assert server.sessions() - before == 1
        with pytest.raises(FormatError, match="larger than 1000 bytes"):
            place.read(f"daily/big{MANIFEST}", 1000)
        assert place.read(f"daily/big{MANIFEST}", 5000) == bytes(5000)


def test_files_are_read_while_others_are_open(plain: Subject) -> None:
    for name in ("a", "b", "c"):
        plain.put(f"{FOLDER}/{name}", name.encode())
    with (
        plain.destination.opened(to_read=True) as place,
        place.opened_file(f"{FOLDER}/a") as first,
        place.opened_file(f"{FOLDER}/b") as second,
    ):
        assert place.read(f"{FOLDER}/c", 10) == b"c"
        assert place.content(f"{FOLDER}/c", Silent()) == content_of(b"c")
        assert (first.read(0, 10), second.read(0, 10)) == (b"a", b"b")


def test_what_is_no_file_is_no_copy(plain: Subject, tmp_path: Path) -> None:
    plain.put("victim", b"precious")
    folder = tmp_path / "there" / FOLDER
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "there" / "victim")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    paths = [f"{FOLDER}/{name}" for name in ("link", "directory", "fifo")]
    with plain.destination.opened() as place:
        assert place.sizes(dict.fromkeys(paths, "")) == dict.fromkeys(paths, NOT_A_FILE)
        assert list(place.files(["daily"])) == []
        for path in paths:
            assert place.content(path, Silent()) is None
            with pytest.raises(FormatError, match="not a regular file"):
                place.read(path, 100)
            with pytest.raises(FormatError, match="not a regular file"), place.opened_file(path):
                pass
    plain.store(b"whole", paths[0], aside="link.damaged-1")
    assert plain.get(paths[0]) == b"whole"
    assert (folder / "link.damaged-1").is_symlink()
    assert plain.get("victim") == b"precious"


def test_a_link_instead_of_a_folder_is_told(plain: Subject, tmp_path: Path) -> None:
    """Followed when writing and not when listing, it would have every copy looked for in vain."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "there" / "daily").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="daily is not a directory"):
        plain.store(b"data")
    assert os.listdir(tmp_path / "elsewhere") == []
    assert (tmp_path / "there" / "daily").is_symlink()


def test_what_was_set_aside_before_is_kept(plain: Subject) -> None:
    plain.put(PATH, b"damaged again")
    plain.put(f"{FOLDER}/{ASIDE}", b"damaged")
    with pytest.raises(StorageError, match="exists already"):
        plain.store(b"whole", aside=ASIDE)
    with pytest.raises(RefusedError, match="must begin so"):
        plain.store(b"whole", aside="another")
    assert plain.get(PATH) == b"damaged again"
    assert plain.get(f"{FOLDER}/{ASIDE}") == b"damaged"


def test_damage_that_keeps_size_and_time_is_seen_and_mended(plain: Subject, tmp_path: Path) -> None:
    data = os.urandom(MIB)
    plain.store(data)
    copy = tmp_path / "there" / PATH
    before = copy.stat()
    plain.put(PATH, data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    with plain.destination.opened() as place:
        assert place.content(PATH, Silent()) not in (None, content_of(data))
    plain.store(data, aside=ASIDE)
    assert plain.get(PATH) == data
    assert plain.names(FOLDER) == {NAME, ASIDE}


def test_a_large_file_is_read_with_little_room_here(plain: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(4 * MIB) * 20
    plain.put(PATH, data)
    with filesystems.mounted("tmpfs") as small:
        with monkeypatch.context() as patched:
            patched.setattr("tempfile.tempdir", str(small))
            with plain.destination.opened() as place:
                assert place.content(PATH, Silent()) == content_of(data)
                with pytest.raises(StorageError, match="bytes free") as caught, place.opened_file(PATH):
                    pass
                assert "TMPDIR" in caught.value.hint
        assert os.listdir(small) == []


def test_a_source_that_has_lost_its_name_is_sent(plain: Subject) -> None:
    """The vault may remove a backup while it is copied."""
    plain.source.write_bytes(b"data")
    with plain.destination.opened() as place, filesystems.opened(plain.source) as source:
        plain.source.unlink()
        place.store(PATH, source, content_of(b"data"), Silent())
    assert plain.get(PATH) == b"data"


def test_nothing_is_asked_of_rsync_that_deletes() -> None:
    sources = sorted(Path(rsync_module.__file__).parent.glob("rsync*.py"))
    assert len(sources) > 3
    for path in sources:
        words = [word for word in ("--del", "--remove", "--existing", "--prune", "--force") if word in path.read_text()]
        assert words == [], path


# Accounts that may do less


@pytest.fixture
def append_only(server: SshServer, tmp_path: Path) -> Subject:
    directory = tmp_path / "adding"
    directory.mkdir()
    key = server.let_in(
        f"{tmp_path.name}-adding", f"{ssh_server.need_rrsync('-no-overwrite')} -no-del -no-overwrite {directory}"
    )
    return subject_at(server.destination(key, "/"), directory, tmp_path)


def test_an_account_that_may_only_add(append_only: Subject) -> None:
    append_only.store(b"data")
    with append_only.destination.opened() as place:
        assert place.content(PATH, Silent()) == content_of(b"data")
        place.write_marker(b"first")
        assert place.read_marker() == b"first"
        assert ["begins anew" in warning for warning in place.warnings] == [True, False]
        assert "sent back" in place.warnings[1]
        with pytest.raises(StorageError, match="can't be replaced"):
            place.write_marker(b"second")
    with pytest.raises(RefusedError, match="never overwritten"):
        append_only.store(b"newer")
    with pytest.raises(RefusedError, match="never overwritten") as caught:
        append_only.store(b"newer", aside=ASIDE)
    assert "rename the damaged file on the server" in caught.value.hint
    assert append_only.get(PATH) == b"data"
    assert append_only.names(FOLDER) == {NAME}


def test_a_trial_tells_whether_an_account_may_overwrite(append_only: Subject, plain: Subject) -> None:
    """In an account that may only add the file of the first trial stays as it is."""
    for first in (True, False):
        probe = append_only.destination.probe(Silent())
        assert any("it can only add" in finding for finding in probe.findings)
        assert any("a file was written" in finding for finding in probe.findings) == first
    probe = plain.destination.probe(Silent())
    assert any("can overwrite what is there" in finding for finding in probe.findings)
    assert probe.lock == "none"


def test_an_account_that_may_only_read(server: SshServer, tmp_path: Path) -> None:
    directory = tmp_path / "there"
    directory.mkdir()
    key = server.let_in(tmp_path.name, f"{ssh_server.need_rrsync()} -ro {directory}")
    subject = subject_at(server.destination(key, "/"), directory, tmp_path)
    subject.put(PATH, b"data")
    with subject.destination.opened(to_read=True) as place:
        assert [each.path for each in place.files(["daily"])] == [PATH]
        with place.opened_file(PATH) as file:
            assert file.read(1, 2) == b"at"
    with pytest.raises(StorageError, match="only half"):
        subject.store(b"data", f"{PATH}2")


def test_an_rsync_without_fsync_is_warned_of(server: SshServer, tmp_path: Path) -> None:
    refusal = 'case "$SSH_ORIGINAL_COMMAND" in *--fsync*) echo "rsync: --fsync: unknown option" >&2; exit 1;; esac'
    key = server.let_in_by_script(tmp_path.name, f'{refusal}\nexec sh -c "$SSH_ORIGINAL_COMMAND"')
    subject = subject_at(server.destination(key, tmp_path / "there"), tmp_path / "there", tmp_path)
    (tmp_path / "there").mkdir()
    subject.source.write_bytes(b"data")
    with subject.destination.opened() as place, filesystems.opened(subject.source) as source:
        place.store(PATH, source, content_of(b"data"), Silent())
        assert len(place.warnings) == 1
        assert "3.2.4" in place.warnings[0]
    assert subject.get(PATH) == b"data"


# What is wrong with a server, and with us


def refusal(destination: RsyncDestination) -> str:
    """Class, message and hint of the error when it is opened."""
    with pytest.raises((StorageError, RefusedError, ConfigurationError)) as caught, destination.opened():
        pass
    return f"{type(caught.value).__name__}: {caught.value.message} | {caught.value.hint}"


def test_a_server_whose_key_has_changed(server: SshServer, key: Path, tmp_path: Path) -> None:
    ssh_server.make_key(tmp_path / "other")
    public = (tmp_path / "other.pub").read_text().split()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {public[0]} {public[1]}\n")
    told = refusal(server.destination(key, tmp_path, known_hosts_file=known))
    assert "RefusedError" in told
    assert f"another host key than the one in {known}" in told
    assert f"ssh-keyscan -p {server.port} 127.0.0.1" in told
    assert known.read_text().count("\n") == 1


def test_a_server_that_is_not_known(server: SshServer, key: Path, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.touch()
    told = refusal(server.destination(key, tmp_path, known_hosts_file=known))
    assert f"no host key in {known}" in told
    assert known.read_text() == ""
    assert "does not exist" in refusal(server.destination(key, tmp_path, known_hosts_file=tmp_path / "missing"))


def test_keys_that_do_not_fit(server: SshServer, tmp_path: Path) -> None:
    ssh_server.make_key(tmp_path / "stranger")
    assert f"refuses the key {tmp_path}/stranger" in refusal(server.destination(tmp_path / "stranger", tmp_path))
    ssh_server.make_key(tmp_path / "closed", "passphrase")
    assert "passphrase" in refusal(server.destination(tmp_path / "closed", tmp_path))
    (tmp_path / "text").write_text("hello")
    assert "no private SSH key" in refusal(server.destination(tmp_path / "text", tmp_path))
    (tmp_path / "torn").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nxx\n-----END OPENSSH PRIVATE KEY-----\n")
    assert "no private key that ssh understands" in refusal(server.destination(tmp_path / "torn", tmp_path))
    assert "does not exist" in refusal(server.destination(tmp_path / "missing", tmp_path))


@pytest.mark.parametrize("damage", ["mode", "end", "returns"])
def test_a_key_as_secrets_are_mounted(server: SshServer, plain: Subject, tmp_path: Path, damage: str) -> None:
    key = server.let_in(tmp_path.name)
    data = key.read_bytes()
    key.write_bytes({"mode": data, "end": data.rstrip(b"\n"), "returns": data.replace(b"\n", b"\r\n")}[damage])
    key.chmod(0o444)
    plain.put(PATH, b"data")
    with server.destination(key, tmp_path / "there").opened() as place:
        assert place.read(PATH, 100) == b"data"
    assert stat.S_IMODE(key.stat().st_mode) == 0o444


def test_servers_that_can_not_be_reached(server: SshServer, key: Path, tmp_path: Path) -> None:
    told = refusal(server.destination(key, tmp_path, port=ssh_server.free_port()))
    assert "refuses the connection" in told
    target = "backup@no-such-host.invalid:/x"
    nowhere = Options(target=target, key_file=key, known_hosts_file=server.known_hosts)
    assert "can't be resolved" in refusal(RsyncDestination(nowhere))


def test_directories_that_are_not_there(server: SshServer, key: Path, tmp_path: Path) -> None:
    told = refusal(server.destination(key, tmp_path / "missing"))
    assert f"{tmp_path}/missing does not exist" in told
    assert "mkdir -m 700" in told
    assert not (tmp_path / "missing").exists()
    (tmp_path / "file").touch()
    assert "is not a directory" in refusal(server.destination(key, tmp_path / "file"))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("PATH=/nowhere; rsync --server", "has no rsync"),
        ('echo "Welcome!"; exec sh -c "$SSH_ORIGINAL_COMMAND"', "a login must print nothing"),
        ("echo 'rsync: -e.LsfxCIvu: unknown option' >&2; exit 1", "3.2.4 or newer"),
        ("exit 3", "has cut the connection"),
    ],
)
def test_servers_that_are_not_fit(server: SshServer, tmp_path: Path, script: str, words: str) -> None:
    key = server.let_in_by_script(f"{tmp_path.name}", script)
    told = refusal(server.destination(key, tmp_path))
    assert words in told or words.replace("a login", "an account's login") in told


def test_an_account_without_rights(server: SshServer, tmp_path: Path) -> None:
    as_nobody = "exec setpriv --reuid=65534 --regid=65534 --clear-groups"
    key = server.let_in_by_script(tmp_path.name, f'{as_nobody} sh -c "$SSH_ORIGINAL_COMMAND"')
    with clusters.scratch_directory() as directory:
        (directory / "there").mkdir(0o755)
        subject = subject_at(server.destination(key, directory / "there"), directory / "there", tmp_path)
        with pytest.raises(StorageError, match="lets this account not") as caught:
            subject.store(b"data")
        assert "chown" in caught.value.hint
        (directory / "there").chmod(0o700)
        assert "lets this account not" in refusal(server.destination(key, directory / "there"))


def test_a_full_disk_there(server: SshServer, key: Path, tmp_path: Path) -> None:
    with filesystems.mounted("tmpfs") as path:
        subject = subject_at(server.destination(key, path), path, tmp_path)
        with pytest.raises(StorageError, match="is full") as caught:
            subject.store(os.urandom(40 * MIB))
        assert durable.is_full(caught.value)
        assert str(path) in caught.value.message
        assert subject.names(FOLDER) == set()
        partial = path / FOLDER / ".pgkeep-partial"
        subprocess.run(["rm", "-rf", partial], check=True)
        subject.store(b"fits")


@pytest.mark.parametrize(
    "target",
    ["", "host", "/path", "host::module", "-oProxyCommand=x:/y", "a@-b:/x", "a b:/x", "rsync://host/x", "a@:/x"],
)
def test_targets_that_name_no_directory(target: str) -> None:
    with pytest.raises(ConfigurationError, match="names no directory"):
        RsyncDestination(Options(target=target, key_file=Path("/k"), known_hosts_file=Path("/h")))


def test_targets_and_labels() -> None:
    for target in ("host:/x", "me@host:/x y/z", "me@[::1]:/x", "host:x", "host:/"):
        made = RsyncDestination(Options(target=target, key_file=Path("/k"), known_hosts_file=Path("/h")))
        assert made.label == target.rstrip("/")
        assert made.kind == "rsync"
