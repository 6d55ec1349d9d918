"""The deployment guide, command by command and in its order, as its reader types them.

Where a command can't do what the guide says of it, the outcome that docs/guide-differences.md promises is tested, and
the working form beside it. The guide's own implementation fails here: it makes no backup as written, and where it is
mended, restores wrongly, never returns from ``extractor.py`` and knows no ``cleanup``.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import re
import time

import pytest

from tests.e2e.stack import SERVICES, USERS, VOLUMES, Stack, wait_until

AGENT = "ontology-manager-backup-agent-1"
EXTRACTOR = "ontology-manager-backup-extractor-1"
DATABASE = "ontology-manager-db-1"
DUMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.sql\.gz")
COUNT_OF_USERS = f"{USERS}\n"
# The rows themselves: a count alone would not notice other rows.
CONTENT = "SELECT md5(string_agg(users::text, ',' ORDER BY id)) FROM users"


@pytest.fixture
def today(stack: Stack) -> Stack:
    """The stack with a daily backup of today at the destination: the guide's commands ask ``date``, in UTC."""
    if not (stack.external / "daily" / _day()).is_dir():
        stack.said(f"docker exec {AGENT} /usr/local/bin/backup.py daily")
        stack.said(f"docker exec {EXTRACTOR} /usr/local/bin/extractor.py")
    return stack


class TestSteps:
    """Steps 1 to 6: from the application's directory to backups that are there."""

    def test_1_directories(self, project: Stack) -> None:
        project.said("mkdir -p backup-agent backup-extractor")
        project.said("mkdir -p external_storage")
        command = "cat >> .gitignore << 'EOF'\n\n# Backup data (local only)\nexternal_storage/\nEOF"
        project.said(command)
        assert "external_storage/\n" in (project.directory / ".gitignore").read_text()

    def test_4_services_volumes_and_names_are_the_guides(self, project: Stack) -> None:
        """In place of its steps 2 to 4: the Compose file is there, scripts and Dockerfiles come with the sources."""
        assert set(project.said("docker-compose config --services").split()) == {"db", *SERVICES}
        document = project.said("docker-compose config")
        names = re.findall(r"container_name: (.+)", document)
        assert set(names) == {project.container(service) for service in ("db", *SERVICES)}
        for volume in VOLUMES:
            assert f"name: ontology-manager-{volume}" in document

    def test_5_password_is_exported(self, project: Stack) -> None:
        """Nobody reads the variable: it does no harm."""
        printed = project.said('export DB_PASSWORD=$(cat secrets/db_password.txt)\nprintf %s "$DB_PASSWORD"')
        assert printed == project.password
        assert "DB_PASSWORD:" not in project.said(
            "export DB_PASSWORD=$(cat secrets/db_password.txt); docker-compose config"
        )

    def test_5_build(self, project: Stack) -> None:
        done = project.shell("docker-compose build backup-agent backup-extractor", timeout_seconds=600)
        assert done.return_code == 0, done.stderr

    def test_5_up_brings_the_vault_too(self, project: Stack) -> None:
        done = project.shell("docker-compose up -d backup-agent backup-extractor", timeout_seconds=600)
        assert done.return_code == 0, done.stderr
        for service in SERVICES:
            assert project.inspect(service, "{{.State.Running}}") == "true"

    def test_5_logs_tell_of_the_backup(self, project: Stack) -> None:
        """They follow without end, so they are left after a while."""
        wait_until(lambda: project.extracted("daily"), "the first copy", say=project.trouble)
        followed = "timeout 3 docker-compose logs -f backup-agent backup-extractor"
        printed = project.shell(followed).stdout.decode()
        newest = project.sealed("daily")[-1]
        assert AGENT in printed
        assert EXTRACTOR in printed
        assert newest in printed

    def test_6_the_initial_backup_is_there(self, stack: Stack) -> None:
        """In place of ``sleep 120``: it was waited for."""
        listed = stack.said(f"docker exec {AGENT} ls -lah /backups/active/daily/")
        dump = _only_dump(listed)
        for suffix in ("", ".sha256", ".manifest.json"):
            assert f"{dump}{suffix}\n" in listed
        assert re.search(rf"-r--r----- .* {dump}\n", listed), listed

    def test_6_appending_fails(self, stack: Stack) -> None:
        """No shell expands the glob of a redirection; a file of that name is not made either."""
        before = stack.digests()
        append = f"docker exec {AGENT} sh -c \"echo 'test' >> /backups/active/daily/*.sql.gz\""
        done = stack.shell(f'{append} || echo "✅ Immutable protection working!"')
        assert done.stdout.decode() == "✅ Immutable protection working!\n"
        assert "Operation not permitted" in done.stderr
        stack.assert_untouched(before)

    def test_6_the_copy_is_there(self, today: Stack) -> None:
        listed = today.said("ls -lah external_storage/daily/$(date +%Y-%m-%d)/")
        dump = _only_dump(listed)
        assert re.search(rf"-r--r--r-- .* {dump}\n", listed), listed

    def test_6_checksums(self, today: Stack) -> None:
        command = "cd external_storage/daily/$(date +%Y-%m-%d)/ && sha256sum -c *.sha256"
        lines = today.said(command).splitlines()
        assert lines == [f"{dump.name}: OK" for dump in today.extracted("daily") if dump.parent.name == _day()]


class TestTests:
    """The guide's tests 1 to 5."""

    def test_1_manual_creation(self, stack: Stack) -> None:
        before = stack.sealed("daily")
        made = _backed_up(stack, "daily")
        assert made > before[-1]
        assert made in stack.said(f"docker exec {AGENT} ls -lah /backups/active/daily/")

    @pytest.mark.parametrize("user", ["", "-u 0 "], ids=["agent", "root"])
    def test_2_cannot_modify(self, stack: Stack, user: str) -> None:
        before = stack.digests()
        printed = stack.said(f'''docker exec {user}{AGENT} sh -c "
  cd /backups/active/daily && 
  BACKUP_FILE=\\$(ls -t *.sql.gz | head -1) &&
  echo 'hack' >> \\$BACKUP_FILE
" 2>&1 | grep -q "Operation not permitted" && echo "✅ PASS: Cannot modify" || echo "❌ FAIL: Can modify"''')  # noqa: W291
        assert printed == "✅ PASS: Cannot modify\n"
        stack.assert_untouched(before)

    @pytest.mark.parametrize("user", ["", "-u 0 "], ids=["agent", "root"])
    def test_2_cannot_delete(self, stack: Stack, user: str) -> None:
        before = stack.digests()
        printed = stack.said(f'''docker exec {user}{AGENT} sh -c "
  cd /backups/active/daily && 
  BACKUP_FILE=\\$(ls -t *.sql.gz | head -1) &&
  rm \\$BACKUP_FILE
" 2>&1 | grep -q "Operation not permitted" && echo "✅ PASS: Cannot delete" || echo "❌ FAIL: Can delete"''')  # noqa: W291
        assert printed == "✅ PASS: Cannot delete\n"
        stack.assert_untouched(before)

    def test_3_the_extractor_only_reads(self, stack: Stack) -> None:
        before = stack.digests()
        printed = stack.said(f'''docker exec {EXTRACTOR} sh -c "
  cd /backups/active/daily && 
  echo 'test' > test.txt
" 2>&1 | grep -q "Read-only file system" && echo "✅ PASS: Extractor read-only" || echo "❌ FAIL: Extractor can write"''')  # noqa: W291, E501
        assert printed == "✅ PASS: Extractor read-only\n"
        stack.assert_untouched(before)

    def test_3_a_forced_pass_returns(self, stack: Stack) -> None:
        """With every backup copied, and without a second loop beside the service."""
        sealed = stack.sealed("daily")
        begun = time.monotonic()
        stack.said(f"docker exec {EXTRACTOR} /usr/local/bin/extractor.py", timeout_seconds=60)
        assert time.monotonic() - begun < 30.0
        assert set(sealed) <= {path.name for path in stack.extracted("daily")}
        assert len(stack.said(f"docker top {EXTRACTOR} -o pid,args").splitlines()) == 2

    def test_3_external_storage(self, today: Stack) -> None:
        listed = set(DUMP.findall(today.said("ls -lah external_storage/daily/$(date +%Y-%m-%d)/")))
        assert {name for name in today.sealed("daily") if name.startswith(_day())} <= listed

    def test_4_the_loop_sees_the_first_directory_only(self, today: Stack) -> None:
        """Its ``cd`` is relative, so the next directory is looked for inside the first."""
        there = sorted(path for path in today.external.glob(f"*/{_day()}") if path.is_dir())
        assert len(there) > 1, "one directory would not tell the loops apart"
        printed = today.said("""for dir in external_storage/*/$(date +%Y-%m-%d)/; do
  if [ -d "$dir" ]; then
    echo "Verifying $dir"
    cd "$dir" && sha256sum -c *.sha256
  fi
done
""")
        assert [line for line in printed.splitlines() if line.startswith("Verifying")] == [f"Verifying {_shown(today)}"]
        checked = set(re.findall("(.+): OK\n", printed))
        assert (
            {name.removesuffix(".sha256") for name in os.listdir(there[0]) if name.endswith(".sha256")}
            >= checked
            > set()
        )

    def test_4_with_a_subshell_it_sees_all(self, today: Stack) -> None:
        there = sorted(path for path in today.external.glob(f"*/{_day()}") if path.is_dir())
        checksummed = {path.stem for each in there for path in each.glob("*.sha256")}
        printed = today.said("""for dir in external_storage/*/$(date +%Y-%m-%d)/; do
  echo "Verifying $dir"
  (cd "$dir" && sha256sum -c *.sha256)
done
""")
        assert printed.count("Verifying") == len(there)
        assert set(re.findall("(.+): OK\n", printed)) >= checksummed

    def test_5_disaster_recovery(self, today: Stack) -> None:
        create = f'docker exec {DATABASE} psql -U app -d postgres -c "CREATE DATABASE test_restore;"'
        assert today.said(create) == "CREATE DATABASE\n"
        try:
            self._restore(today)
        finally:
            drop = f'docker exec {DATABASE} psql -U app -d postgres -c "DROP DATABASE test_restore;"'
            assert today.said(drop) == "DROP DATABASE\n"

    def _restore(self, stack: Stack) -> None:
        newest = "LATEST_BACKUP=$(ls -t external_storage/daily/*/*.sql.gz | head -1)"
        assert stack.said(f'{newest}; basename "$LATEST_BACKUP"').strip() == stack.sealed("daily")[-1]
        restore = f'gunzip -c "$LATEST_BACKUP" | docker exec -i {DATABASE} psql -U app -d test_restore'
        done = stack.shell(f"{newest}\n{restore}")
        assert done.return_code == 0
        assert "ERROR" not in done.stdout.decode() + done.stderr
        count = f'docker exec {DATABASE} psql -U app -d test_restore -c "SELECT COUNT(*) FROM users;"'
        assert re.search(rf"^ *{USERS}$", stack.said(count), flags=re.MULTILINE)
        assert stack.psql(CONTENT, "test_restore") == stack.psql(CONTENT)
        assert stack.psql("SELECT count(*) FROM orders", "test_restore") == "20000"


class TestMonitoring:
    def test_audit_log(self, stack: Stack) -> None:
        lines = stack.said(f"docker exec {AGENT} cat /backups/logs/backup_audit.jsonl | tail -10").splitlines()
        records = [json.loads(line) for line in lines]
        assert 2 <= len(records) <= 10
        for earlier, (line, later) in zip(lines, zip(lines[1:], records[1:], strict=True), strict=False):
            assert later["previous"] == hashlib.sha256(earlier.encode()).hexdigest(), line
        assert stack.sealed("daily")[-1] in "\n".join(lines)

    def test_extraction_log(self, stack: Stack) -> None:
        command = f"docker exec {EXTRACTOR} cat /backups/logs/extraction_audit.jsonl | tail -10"
        records = [json.loads(line) for line in stack.said(command).splitlines()]
        assert 1 <= len(records) <= 10
        assert stack.extracted("daily")[-1].name in json.dumps(records)

    def test_cron_log(self, stack: Stack) -> None:
        printed = stack.said(f"docker exec {AGENT} cat /backups/logs/cron.log")
        assert stack.sealed("daily")[0] in printed
        assert stack.password not in printed

    @pytest.mark.parametrize("tier", ["Hourly", "Daily", "Weekly"])
    def test_inventory_counts_nothing_without_a_shell_in_the_container(self, stack: Stack, tier: str) -> None:
        directory = f"/backups/active/{tier.lower()}"
        guide = f'echo "{tier}: $(docker exec {AGENT} ls {directory}/*.sql.gz 2>/dev/null | wc -l)"'
        assert stack.said(guide) == f"{tier}: 0\n"
        working = f"echo \"{tier}: $(docker exec {AGENT} sh -c 'ls {directory}/*.sql.gz' 2>/dev/null | wc -l)\""
        sealed = len(stack.sealed(tier.lower()))
        counted = int(stack.said(working).removeprefix(f"{tier}: "))
        assert 0 < sealed <= counted

    def test_disk_usage(self, stack: Stack) -> None:
        done = stack.shell(f"docker exec {AGENT} du -sh /backups/active/*")
        assert done.return_code != 0
        assert "No such file or directory" in done.stderr
        printed = stack.said(f"docker exec {AGENT} sh -c 'du -sh /backups/active/*'")
        assert re.search(r"^\S+\t/backups/active/daily$", printed, flags=re.MULTILINE)

    def test_external_storage(self, stack: Stack) -> None:
        assert "external_storage/daily\n" in stack.said("du -sh external_storage/*")
        found = stack.said('find external_storage -name "*.sql.gz" -type f').split()
        assert {path.name for path in stack.extracted("daily")} <= {path.rpartition("/")[2] for path in found}


class TestMaintenance:
    @pytest.mark.parametrize("tier", ["hourly", "daily", "weekly"])
    def test_manual_trigger(self, stack: Stack, tier: str) -> None:
        before = stack.sealed(tier)
        made = _backed_up(stack, tier)
        assert made not in before
        assert made in stack.sealed(tier)

    def test_force_extraction(self, stack: Stack) -> None:
        sealed = {tier: stack.sealed(tier) for tier in ("hourly", "daily", "weekly", "globals")}
        stack.said(f"docker exec {EXTRACTOR} /usr/local/bin/extractor.py")
        for tier, names in sealed.items():
            assert set(names) <= {path.name for path in stack.extracted(tier)}

    @pytest.mark.parametrize("first", ["+49", "+1"], ids=["guide", "every"])
    def test_removing_by_hand_is_refused(self, stack: Stack, first: str) -> None:
        """The guide's loop has nothing to do before the 49th backup, so it is tried on all of them too."""
        before, sealed = stack.digests(), len(stack.sealed("hourly"))
        printed = stack.shell(f'''docker exec {AGENT} sh -c "
  cd /backups/active/hourly &&
  for file in \\$(ls -t *.sql.gz | tail -n {first}); do
    chattr -i \\"\\$file\\"
    rm -f \\"\\$file\\" \\"\\$file.sha256\\" \\"\\$file.manifest.json\\"
  done
"''')
        refusals = printed.stderr.count("rm: cannot remove")
        assert refusals == 0 if first == "+49" else refusals >= 3 * sealed > 0
        assert printed.stderr.count("Operation not permitted") >= refusals
        stack.assert_untouched(before)


class TestTroubleshooting:
    def test_fallback_modes(self, stack: Stack) -> None:
        done = stack.shell(f"docker exec {AGENT} ls -l /backups/active/daily/*.sql.gz")
        assert done.return_code != 0
        assert "No such file or directory" in done.stderr
        sealed = len(stack.sealed("daily"))
        lines = stack.said(f"docker exec {AGENT} sh -c 'ls -ln /backups/active/daily/*.sql.gz'").splitlines()
        assert len(lines) >= sealed > 0
        assert all(re.match(r"-r--r----- +\d+ 10002 10002 ", line) for line in lines), lines

    def test_database_connection(self, stack: Stack) -> None:
        printed = stack.said(f'''docker exec {AGENT} sh -c "
  PGPASSWORD=\\$(cat /run/secrets/db_password) psql -h db -U app -d app_db -c 'SELECT 1;'
"''')
        assert "(1 row)" in printed

    def test_extractor_logs(self, stack: Stack) -> None:
        assert stack.extracted("daily")[-1].name in stack.said("docker-compose logs backup-extractor")
        stack.said(f"docker exec {EXTRACTOR} /usr/local/bin/extractor.py")

    def test_disk_space(self, stack: Stack) -> None:
        assert "ontology-manager-backup-active" in stack.said("docker system df -v")

    def test_cleanup_keeps_what_is_not_due(self, stack: Stack) -> None:
        before = stack.digests()
        printed = stack.said(f"docker exec {AGENT} /usr/local/bin/backup.py cleanup")
        assert re.match(r"0 removed, [1-9]\d* kept", printed)
        stack.assert_untouched(before)


class TestChecklist:
    """What its boxes and its security notes ask for and no command of it shows."""

    def test_every_service_is_healthy(self, stack: Stack) -> None:
        def all_healthy() -> bool:
            return all(stack.health(service) == "healthy" for service in SERVICES)

        wait_until(all_healthy, "health", say=stack.trouble)
        assert [stack.inspect(service, "{{.RestartCount}}") for service in SERVICES] == ["0", "0", "0"]

    @pytest.mark.parametrize("service", SERVICES)
    def test_every_services_doctor_is_content(self, stack: Stack, service: str) -> None:
        done = stack.shell(f"docker exec {stack.container(service)} pgkeep doctor --json")
        checks = json.loads(done.stdout)["checks"]
        assert [each for each in checks if each["status"] == "fail"] == []
        assert done.return_code == 0
        by_name = {each["name"]: each for each in checks}
        assert by_name["capabilities"]["status"] == by_name["clock"]["status"] == "ok"
        assert ("pg_dump" in by_name) == (service == "backup-agent")
        assert ("protection" in by_name) == (service == "backup-vault")
        assert ("destination external" in by_name) == (service == "backup-extractor")

    def test_networks(self, stack: Stack) -> None:
        form = "{{range $name, $network := .NetworkSettings.Networks}}{{$name}} {{end}}"
        networks = {service: stack.inspect(service, form).split() for service in ("db", *SERVICES)}
        assert networks == {
            "db": ["ontology-manager_data_net"],
            "backup-agent": ["ontology-manager_data_net"],
            "backup-vault": ["none"],
            "backup-extractor": ["ontology-manager_backend_net"],
        }

    def test_labels(self, stack: Stack) -> None:
        for service in SERVICES:
            assert stack.inspect(service, '{{index .Config.Labels "com.ontology-manager.service"}}') == service
            purpose = "one-way-extraction" if service == "backup-extractor" else "immutable-backups"
            assert stack.inspect(service, '{{index .Config.Labels "com.ontology-manager.security"}}') == purpose

    def test_rights(self, stack: Stack) -> None:
        for service in SERVICES:
            host = json.loads(stack.inspect(service, "{{json .HostConfig}}"))
            assert host["CapDrop"] == ["ALL"]
            assert "no-new-privileges:true" in host["SecurityOpt"]
            assert host["ReadonlyRootfs"]
            assert host["Memory"] > 0
            assert host["PidsLimit"] > 0
            assert not host["Privileged"]
            added = {"LINUX_IMMUTABLE", "SETGID", "SETPCAP", "SETUID"} if service == "backup-vault" else set()
            assert {name.removeprefix("CAP_") for name in host["CapAdd"] or []} == added

    def test_no_volume_without_a_name(self, stack: Stack) -> None:
        """The base image of the agent declares one for a server's data."""
        for service in SERVICES:
            mounts = json.loads(stack.inspect(service, "{{json .Mounts}}"))
            names = {mount["Name"] for mount in mounts if mount["Type"] == "volume"}
            assert names <= {f"ontology-manager-{volume}" for volume in VOLUMES}

    def test_the_password_is_nowhere_to_be_seen(self, stack: Stack) -> None:
        for service in ("db", *SERVICES):
            assert stack.password not in stack.inspect(service, "{{json .}}")
            assert stack.password not in stack.logs(service)


def _backed_up(stack: Stack, tier: str) -> str:
    """Run the guide's command; the dump that it says it made, which must be where the tier is."""
    done = stack.shell(f"docker exec {AGENT} /usr/local/bin/backup.py {tier}")
    assert done.return_code == 0, done.stderr
    found = re.search(rf"sealed app_db as {tier}/({DUMP.pattern}) ", done.stderr)
    assert found, done.stderr
    return found[1]


def _day() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")


def _shown(stack: Stack) -> str:
    """The first of today's directories, as a loop of the guide's prints it."""
    first = min(str(path.relative_to(stack.directory)) for path in stack.external.glob(f"*/{_day()}"))
    return f"{first}/"


def _only_dump(listed: str) -> str:
    """The newest dump in the output of ``ls``. Fails where there is none."""
    found: list[str] = sorted(set(DUMP.findall(listed)))
    assert found, listed
    return found[-1]
