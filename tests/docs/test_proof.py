"""What is published of the campaigns is what they found."""

import json
import shutil
from pathlib import Path

import pytest
from proof import publish
from proof.__main__ import CAMPAIGNS
from proof.record import RESULTS, ROOT, Campaign, Row, parser

pytestmark = pytest.mark.once

DOCUMENTS = "docs/durability.md", "README.md"


def test_the_published_tables_are_made_from_the_committed_results(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, tmp_path / name)
    document, readme = (str(tmp_path / name) for name in DOCUMENTS)
    publish.main(["--document", document, "--chaos", document, readme])
    for name in DOCUMENTS:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "run proof.publish"


def test_nothing_bad_is_among_the_committed_results():
    documents = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert set(documents) <= set(CAMPAIGNS)
    for name, document in documents.items():
        assert document["campaign"] == name
        assert document["rows"], name
        assert all(row["cases"] > 0 and row["bad"] == 0 for row in document["rows"]), name


def test_each_campaign_is_a_module():
    for name in CAMPAIGNS:
        assert Path(ROOT, "tests/proof", f"{name}.py").is_file()


def test_a_bad_restore_is_published_as_such(tmp_path, capsys):
    options = parser("some", "").parse_args(["--results", str(tmp_path), "--seed", "3", "--quick"])
    campaign = Campaign("some", options, tmp_path)
    campaign.add(Row("killed", 1200, 0))
    campaign.add(Row("cut", 34, 2, "of ext4"))
    assert campaign.bad == 2
    assert "cut: 34 cases, 2 bad. of ext4" in capsys.readouterr().out
    lines = publish.table(tmp_path)
    assert lines[0].startswith("1,234 cases, 2 bad; taken on")
    assert lines[1] == "A sample only of: some."
    assert "| killed | 1,200 | 0 |  |" in lines
    assert "| cut | 34 | 2 | of ext4 |" in lines
    assert json.loads((tmp_path / "some.json").read_text())["seed"] == 3
