"""The page shows the tables and nothing else, loads nothing, and works in a browser."""

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from labeleff.report.analysis import TABLES, analyse
from labeleff.report.figures import styles
from labeleff.report.page import DIGITS, csv_text, exact, saving, short, write_report
from labeleff.sweep.collect import collect

from ..sweep.fake import fake_sweep

NASTY = "<b>bold</b> & \"quoted\" 'text' $x$ {{ 1 + 1 }}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two data sets, a clear gain, a run left out, published numbers, pictures, a warning."""
    folder = fake_sweep(
        tmp_path_factory.mktemp("sweep"),
        methods=("supervised", "bcp"),
        budgets=(2, "all"),
        draws=3,
        datasets=("one", "two"),
        gain={"bcp": 0.3},
        patients=6,
        left_out=("two-bcp-nall-d2",),
        pictures=True,
        deviations=(f"bcp: {NASTY}",),
        note=NASTY,
        published=[
            {
                "method": "BCP",
                "labelled": 2,
                "dice": 0.8785,
                "source": f"https://example.org {NASTY}",
                "selection": "test set",
            }
        ],
    )

    (path,) = (folder / "runs").glob("one-bcp-n2-d1-*/summary.json")
    warned = {"warnings": [{"stage": 1, "step": 40, "words": f"it collapses {NASTY}"}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | warned))
    for number, place in enumerate(sorted((folder / "runs").iterdir())):
        made = {
            "cpu": "a processor",
            "cores": 2,
            "system": "Linux",
            "python": "3.12.1",
            "gpus": [] if number else [NASTY],
        }
        (place / "environment.json").write_text(json.dumps(made | {"packages": {"torch": "2.9", "labeleff": "0.2"}}))
    return folder


@pytest.fixture(scope="module")
def analysis(sweep):
    return analyse(collect(sweep))


@pytest.fixture(scope="module")
def folder(analysis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(analysis, folder) == folder / "index.html"
    return folder


class Page(HTMLParser):
    """Cells of tables, tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.tags, self.seen, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "data-table" in found:
            self.inside = [found, ""]

    def handle_data(self, data):
        self.seen.append(data)
        if self.inside:
            self.inside[1] += data

    def handle_endtag(self, tag):
        if self.inside and tag == "span":
            self.cells.append(tuple(self.inside))
            self.inside = None


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text())


def test_warnings_of_runs_are_listed_by_run(folder):
    said = f"bcp, 2 labels, draw 1, seed 0: stage 1, step 40: it collapses {NASTY}"
    assert said in Page((folder / "index.html").read_text()).seen


def test_machines_are_told_apart(analysis, page):
    rows = analysis.tables["machines"]
    assert [(row["runs"], row["gpus"]) for row in rows] == [(len(analysis.collected.records) - 1, ""), (1, NASTY)]
    told = [cell for cell, _ in page.cells if cell["data-table"] == "machines" and cell["data-column"] == "runs"]
    assert len(told) == 2
    assert any(f"{NASTY}, a processor" in text for text in page.seen)


def test_csv_files_are_the_tables(analysis, folder):
    for name, columns in TABLES.items():
        with (folder / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert tuple(header) == columns
        assert len(rows) == len(analysis.tables[name])
        for read, row in zip(rows, analysis.tables[name], strict=True):
            for text, value in zip(read, row.values(), strict=True):
                if value is None:
                    assert text == ""
                elif isinstance(value, float):
                    assert float(text) == value, "every digit is there"
                else:
                    assert text == str(value)


def check_cells(folder, page):
    """Check every number of a page against the CSV files beside it, and return their rows by table."""
    files = {}
    for name in TABLES:
        with (folder / f"{name}.csv").open(newline="") as file:
            files[name] = list(csv.DictReader(file))
    for found, text in page.cells:
        value = files[found["data-table"]][int(found["data-row"])][found["data-column"]]
        assert found["data-value"] == value
        if value in ("", "nan"):
            assert text == "–"
        elif math.isinf(float(value)):
            assert text == "∞"
        elif text == "<0.001":
            assert float(value) < 0.001
        else:
            decimals = len(text.partition(".")[2])
            assert abs(float(text) - float(value)) <= 0.5 * 10**-decimals + 1e-12, (found, text)
            assert decimals or float(value).is_integer() or DIGITS.get(found["data-column"]) == 0
    return files


def test_every_number_on_the_page_is_a_rounded_cell(folder, page):
    files = check_cells(folder, page)
    shown = {(found["data-table"], found["data-column"], int(found["data-row"])) for found, _ in page.cells}
    for name, column in (("curves", "mean"), ("differences", "difference"), ("cost", "seconds"), ("runs", "dice")):
        assert {row for table, of, row in shown if (table, of) == (name, column)} == set(range(len(files[name])))


def test_the_page_loads_nothing(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "srcset", "poster", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        if tag == "script":
            assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#") or attributes["href"].removesuffix(".csv") in TABLES
    style = "".join(page.seen)
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)


def test_names_and_notes_are_text(page):
    said = "".join(page.seen)
    assert said.count(NASTY) >= 3, "note, deviation, source"
    assert sum(tag == "b" for tag, _ in page.tags) == 1, "the warning's own"


def test_left_out_runs_are_counted_and_named(page):
    said = "".join(page.seen)
    assert "1 run is left out" in said
    assert re.search(r"two-bcp-nall-d2-s0-\w+\s*missing: it has not been run", said)
    assert "23 of 24 planned runs" in said


def test_answers_savings_and_settings_are_said(analysis, page):
    said = "".join(page.seen).replace("\u00a0", " ")
    for sentence in (s for sentences in analysis.answers.values() for s in sentences):
        assert sentence in said
    assert "not reached" in said
    assert "≥" in said


def test_figures_are_well_formed_and_take_the_colour_of_the_page(folder):
    names = {path.name for path in (folder / "figures").glob("*")}
    assert names == {f"{kind}-{d}.svg" for kind in ("learning_curve", "cases", "cost", "ranks") for d in ("one", "two")}
    for name in names:
        text = (folder / "figures" / name).read_text()
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title")
        assert root[0].text.endswith(name.rpartition("-")[2].removesuffix(".svg"))
        assert "currentColor" in text
        assert "#010203" not in text
        assert "DejaVu" not in text
        assert not re.search(r"\b(20\d\d-\d\d-\d\dT|matplotlib v)", text)


def test_identifiers_are_unique(page):
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_equal_results_give_equal_bytes(analysis, folder, tmp_path):
    write_report(analysis, tmp_path)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == len(TABLES) + 1 + 8
    assert not [path for path in files if (folder / path).read_bytes() != (tmp_path / path).read_bytes()]


def test_pictures_are_inside_and_the_page_stays_small(folder, page):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 * 2 * 3
    assert {a["alt"].split()[0] for a in pictures} == {"best", "median", "worst"}
    assert (folder / "index.html").stat().st_size < 3e6


def test_one_draw_one_method_and_no_runs(tmp_path):
    one = fake_sweep(tmp_path / "a", methods=("supervised", "bcp"), budgets=(2,), draws=1, classes=("only",))
    alone = fake_sweep(tmp_path / "b", methods=("supervised",), budgets=(2, 4), draws=2, classes=("only",))
    empty = fake_sweep(tmp_path / "c", budgets=(2,), draws=1, left_out=("-",))
    text = {
        sweep.name: write_report(analyse(collect(sweep)), sweep / "report").read_text() for sweep in (one, alone, empty)
    }
    assert "no interval can be given" in text["a"]
    assert "Ranks need two methods" in text["a"]
    assert "No pictures" in text["a"]
    assert "nothing is compared" in text["b"]
    assert "No run is whole" in text["c"]
    assert (tmp_path / "b" / "report" / "figures" / "learning_curve-phantom.svg").exists()


@pytest.mark.parametrize(
    ("censored", "factor", "said"),
    [
        ("above", math.inf, "not reached by supervised at any budget"),
        ("below", 0.0, "supervised is better already with its fewest labels"),
        (None, 2.0, "supervised needs more labels for that score"),
        (None, 1.0, "supervised gets there with as many labels"),
        (None, 0.5, "supervised gets there with fewer labels"),
    ],
)
def test_savings_in_words(censored, factor, said):
    assert saving({"baseline": "supervised", "censored": censored, "factor": factor}) == said


def test_verdicts_fit_in_a_column():
    given = (
        "gain by the interval; too few draws for a test",
        "no evidence of a gain",
        "fewer than 2 draws: no interval",
    )
    assert [short(verdict) for verdict in given] == [
        "gain (interval)",
        "no evidence",
        "fewer than 2 draws: no interval",
    ]


def test_styles_are_told_apart():
    found = styles([f"method{i}" for i in range(20)], "method0")
    assert found["method0"].css == "currentColor"
    assert len({(look.colour, look.marker, look.dash) for look in found.values()}) == 20


def test_a_method_looks_the_same_on_all_data_sets_of_a_page(tmp_path):
    missing = [f"one-mean_teacher-n2-d{draw}" for draw in range(3)]
    folder = fake_sweep(tmp_path / "sweep", datasets=("one", "two"), budgets=(2,), patients=3, left_out=missing)
    text = write_report(analyse(collect(folder)), tmp_path / "report").read_text()
    dots = dict.fromkeys(re.findall(r'style="color: ([^"]+)"></i>(\w+)</th>', text))
    assert len(dots) == len({method for _, method in dots}) == 3
    assert text.count("</i>mean_teacher</th>") < text.count("</i>bcp</th>")


def test_cells():
    assert [exact(v) for v in (None, 0.1 + 0.2, math.inf, math.nan, 3, "x")] == [
        "",
        "0.30000000000000004",
        "inf",
        "nan",
        "3",
        "x",
    ]
    assert csv_text(("a", "b"), [{"b": 'x, "y"', "a": None}]) == 'a,b\n,"x, ""y"""\n'


# -- in a browser -------------------------------------------------------------------------------------------------------

CHECK = """
<script>
addEventListener('load', () => {
  const table = document.querySelector('#comparisons ~ div table.sortable'), heads = [...table.tHead.rows[0].cells];
  const column = name => heads.findIndex(head => head.textContent === name);
  const shown = () => [...table.tBodies[0].rows].filter(row => row.offsetParent);
  const values = name => shown().map(row => row.cells[column(name)].querySelector('[data-value]')?.dataset.value ?? '');
  const select = (name, value) => {
    const found = document.querySelector(`select[name=${name}]`);
    found.value = value;
    found.dispatchEvent(new Event('change', { bubbles: true }));
  };
  const result = { width: innerWidth, wide: document.documentElement.scrollWidth, first: shown().length };
  result.over = table.parentElement.scrollWidth - table.parentElement.clientWidth;
  document.querySelectorAll('details').forEach(part => part.open = true);
  result.open = document.documentElement.scrollWidth;
  heads[column('Mean')].firstElementChild.click();
  result.up = [heads[column('Mean')].getAttribute('aria-sort'), values('Mean')];
  heads[column('Difference')].firstElementChild.click();
  heads[column('Difference')].firstElementChild.click();
  const order = name => heads[column(name)].getAttribute('aria-sort');
  result.down = [order('Difference'), values('Difference'), order('Mean')];
  select('method', 'bcp'); select('metric', 'hd95');
  result.methods = shown().map(row => row.dataset.method + row.dataset.metric + row.dataset.class);
  select('dataset', 'two');
  result.hidden = shown().length;
  result.said = document.querySelector('output').textContent;
  select('dataset', ''); select('method', ''); select('class', '');
  result.classes = shown().length;
  result.colours = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill];
  document.querySelector('.zoom').click();
  result.dialog = document.querySelector('dialog').open;
  document.querySelector('dialog').close();
  parent.postMessage(result, '*');
});
</script>
"""


def browse(page, width, height, *, screenshot=None):
    """Open a page without a window; return its DOM after its scripts ran."""
    what = [f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--virtual-time-budget=3000", f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}",
    ]  # fmt: skip
    done = subprocess.run([*command, *what, page.as_uri()], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def browsed(folder, tmp_path_factory):
    """What the page says of itself in frames of two widths and themes, all in one start of the browser."""
    place = tmp_path_factory.mktemp("browser")
    # the message from a frame of 400 pixels: a window of the browser has at least 500
    (place / "page.html").write_text((folder / "index.html").read_text().replace("</body>", CHECK + "</body>"))
    frames = "".join(
        f"<iframe name='{theme}-{width}' src='page.html#{theme}' width={width} height=6000 style='border:0'></iframe>"
        for theme, width in LOOKS
    )
    (place / "frames.html").write_text(
        "<!doctype html><body style='margin:0'><script>addEventListener('message', event => {"
        "const frame = [...document.querySelectorAll('iframe')].find(one => one.contentWindow === event.source);"
        "document.body.setAttribute('data-' + frame.name, JSON.stringify(event.data)); });</script>"
        f"{frames}</body>"
    )
    tags = dict(Page(browse(place / "frames.html", 3600, 6000)).tags)
    browse(place / "frames.html", 3600, 2000, screenshot=place / "page.png")
    return tags["body"], place / "page.png"


LOOKS = [(theme, width) for theme in ("light", "dark") for width in (1280, 400)]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
@pytest.mark.parametrize(("theme", "width"), LOOKS)
def test_in_a_browser(browsed, theme, width):
    said, picture = browsed
    assert picture.stat().st_size > 10_000
    result = json.loads(said[f"data-{theme}-{width}"])
    assert result["width"] == width
    assert result["wide"] <= width
    assert result["open"] <= width, "details opened"
    assert result["over"] <= 0 or width < 1280, "the table of comparisons is not cut"
    assert result["first"] == 4, "two methods at two budgets: mean Dice only"
    direction, means = result["up"]
    assert direction == "ascending"
    assert [float(v) for v in means] == sorted(float(v) for v in means)
    direction, differences, other = result["down"]
    assert direction == "descending"
    assert other is None
    assert differences[-2:] == ["", ""], "the baseline has no difference: last"
    assert [float(v) for v in differences[:-2]] == sorted((float(v) for v in differences[:-2]), reverse=True)
    assert result["methods"] == ["bcphd95mean"] * 2
    assert result["hidden"] == 0, "the table is that of the other data set"
    assert result["said"] == "2 of 96 rows"
    assert result["classes"] == 12
    assert result["dialog"]
    background, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in result["colours"])
    assert (background > 600 > 300 > ink) if theme == "light" else (background < 150 < 500 < ink)
