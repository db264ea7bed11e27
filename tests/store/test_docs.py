"""Each guarantee of the store's page names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "how-to" / "store.md").read_text().split("## What is promised")[1].split("## ")[0]
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")][1:]


def test_each_guarantee_names_tests_that_exist():
    assert len(ROWS) >= 10
    for what, _, named in ROWS:
        files = re.findall(r"`(test_\w+\.py)`", named)
        assert files, what
        sources = "".join((HERE / file).read_text() for file in files)
        for test in re.findall(r"`(test_\w+)`", named):
            assert f"def {test}(" in sources, test
        for part in re.findall(r'under "([^"]+)"', named):
            assert f"# ---- {part} ---" in sources, part
