from __future__ import annotations
import time
from pathlib import Path
from collections.abc import Iterator
import pytest
from tests import outside, s3_servers
from tests.s3_servers import seaweed
from tests.integration.test_extractor_s3 import InBucket
from tests.faults.machine import wait_for
from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests.outside import Template

@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made

def test_rss(made, scratch, seaweed):
    b = InBucket(made, scratch, seaweed, "copies")
    with b.own.serving(300) as service:
        wait_for(lambda: b.own.events().count("extracted") == 4, seconds=60)
        time.sleep(3)
        status = Path(f"/proc/{service.pid}/status").read_text()
        print("RSS", [l for l in status.splitlines() if "RSS" in l or "HWM" in l or "Threads" in l])
