"""The generated index is current."""

from labeleff.index import PATH, build_index, render
from labeleff.pages import FOLDER, render_pages


def test_index_is_current():
    assert PATH.read_text() == render(), "run: python -m labeleff.index"


def test_pages_of_components_are_current():
    wanted = render_pages()
    assert {path.name: path.read_text() for path in FOLDER.glob("*")} == wanted, "run: python -m labeleff.index"


def test_pages_say_what_a_reader_needs():
    page = render_pages()["strategies.md"]
    section = page[page.index("## bcp\n") : page.index("## bcp_pretrain\n")]
    assert "learns from: labelled, unlabelled (optional)" in section
    assert "[arXiv:2305.00673](https://arxiv.org/abs/2305.00673)" in section
    assert "[bcp.py](../../labeleff/strategies/bcp.py)" in section
    assert "| `dice` | `squared` | Form of the Dice loss. (`squared`, `linear`) |" in section
    assert "| `decay` | `0.99` | Decay λ of the teacher's moving average; constant, without a ramp. |" in section
    assert "put a [`bcp_pretrain`](#bcp_pretrain) stage before" in section
    assert "Args:" not in page
    assert "``" not in page.replace("```", "")


def test_index_knows_every_component_with_a_summary():
    index = build_index()
    assert {"bcp", "bcp_pretrain", "mean_teacher", "supervised"} <= set(index["strategy"])
    for kind in index.values():
        for name, entry in kind.items():
            assert entry["summary"], name
