"""The generated index is current."""

from labeleff.index import PATH, build_index, render


def test_index_is_current():
    assert PATH.read_text() == render(), "run: python -m labeleff.index"


def test_index_knows_every_component_with_a_summary():
    index = build_index()
    assert {"bcp", "bcp_pretrain", "mean_teacher", "supervised"} <= set(index["strategy"])
    for kind in index.values():
        for name, entry in kind.items():
            assert entry["summary"], name
